"""What one request may take: a place, a slot, bytes, and its client's time. ASGI middleware around the proxy.

Model: a request takes a place as it arrives, or is turned away with 429, as it is where the bodies of all requests that are
here would take more than `serve.max_held_mb`; its body is read whole, then it waits its turn
for one of the slots, and leaves both at its end. A client that hangs up, in the queue or later, has its work cancelled.
With `x-vcot-deadline-s` (how many seconds the client still waits) all of it, the engine's work included, ends by then, with
504. How long a client may take to send its request and to read its answer is the connection's business
(services/gateway/http/connection.py).

Limits: an answer that has begun when its deadline comes is cut off, since its status is sent already; a stream ends with an
error event.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vcot.services.gateway.http.answers import Refusal, error_event, header_value, send_refusal

DEADLINE_HEADER = "x-vcot-deadline-s"
_RETRY_AFTER_S = 2
PATIENCE_S = 0.05
"""How long a request goes on before its client is watched; for a quick one that would cost more than it saves."""


class Counts:
    """What requests hold, summed over the processes that take them: each adds to its own row of memory that they share.

    Without a lock: two that look at the same moment may both take the last place, so that a limit is passed by as many
    requests as there are other processes.
    """

    ROW_BYTES = 3 * 8

    def __init__(self, memory: memoryview | None = None, row: int = 0) -> None:
        """`memory` has ROW_BYTES for each process; without it there is one."""
        self._all = (memory or memoryview(bytearray(self.ROW_BYTES))).cast("q")
        self._first = row * 3

    @property
    def taken(self) -> int:
        """Places."""
        return sum(self._all[0::3])

    @property
    def in_flight(self) -> int:
        """Requests that have their turn."""
        return sum(self._all[1::3])

    @property
    def held_bytes(self) -> int:
        """Of the bodies of all requests that have a place."""
        return sum(self._all[2::3])

    def add(self, *, taken: int = 0, in_flight: int = 0, held_bytes: int = 0) -> None:
        """Count what this process takes, or (below zero) gives back."""
        for column, number in enumerate((taken, in_flight, held_bytes)):
            self._all[self._first + column] += number

    def clear(self) -> None:
        """Give back all that this row's process had: it is gone."""
        self._all[self._first : self._first + 3] = memoryview(bytes(self.ROW_BYTES)).cast("q")


@dataclass
class Places:
    """How full it is; `counts` are changed by one Slots of each process only."""

    max_in_flight: int
    max_queued: int
    max_held_bytes: int
    counts: Counts = field(default_factory=Counts)

    @property
    def taken(self) -> int:
        """Places that are taken."""
        return self.counts.taken

    @property
    def in_flight(self) -> int:
        """Requests that have their turn."""
        return self.counts.in_flight

    @property
    def held_bytes(self) -> int:
        """Of the bodies of all requests that have a place."""
        return self.counts.held_bytes

    @property
    def queued(self) -> int:
        """Requests that wait for their turn, or whose body is still being read."""
        return self.taken - self.in_flight

    def take(self) -> None:
        """Take a place. Raises Refusal where all are taken."""
        if self.taken >= self.max_in_flight + self.max_queued:
            message = f"{self.in_flight} requests are in flight and {self.queued} wait; send it again later"
            raise Refusal(429, "overloaded", message, retry_after_s=_RETRY_AFTER_S)
        self.counts.add(taken=1)

    def hold(self, num_bytes: int) -> None:
        """Hold so much more of a body. Raises Refusal where all bodies together are too large."""
        if self.held_bytes + num_bytes > self.max_held_bytes:
            message = (
                f"the {self.taken} requests that are here hold {self.held_bytes / 1e6:.0f} MB, and "
                f"{self.max_held_bytes / 1e6:g} MB are allowed (serve.max_held_mb); send it again later"
            )
            raise Refusal(429, "overloaded", message, retry_after_s=_RETRY_AFTER_S)
        self.counts.add(held_bytes=num_bytes)


class Slots:
    """Lets requests in, first come, first served: `with slots.place()`, then `async with slots`."""

    def __init__(self, max_in_flight: int, max_queued: int, max_held_bytes: int, counts: Counts | None = None) -> None:
        self.places = Places(max_in_flight, max_queued, max_held_bytes, counts or Counts())
        self._free = asyncio.Semaphore(max_in_flight)

    @contextmanager
    def place(self) -> Iterator[Callable[[int], None]]:
        """Hold a place for the duration of the block. Raises Refusal where none is free.

        The block is given what counts the bytes that it holds, which raises Refusal where all hold too many.
        """
        self.places.take()
        held = 0

        def hold(num_bytes: int) -> None:
            nonlocal held
            self.places.hold(num_bytes)
            held += num_bytes

        try:
            yield hold
        finally:
            self.places.counts.add(taken=-1, held_bytes=-held)

    async def __aenter__(self) -> None:
        """Wait for one's turn."""
        await self._free.acquire()
        self.places.counts.add(in_flight=1)

    async def __aexit__(self, *_: object) -> None:
        self.places.counts.add(in_flight=-1)
        self._free.release()


class Limits:
    """The middleware. The application behind it gets the whole body in one message, and need not watch for hang-ups."""

    def __init__(self, app: ASGIApp, slots: Slots, max_body_bytes: int) -> None:
        self._app = app
        self._slots = slots
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request within its limits, unless its client hangs up first."""
        answer = _Answer(send)
        deadline_s = None
        try:
            deadline_s = parse_deadline(header_value(scope, DEADLINE_HEADER))
            with self._slots.place() as hold:
                async with asyncio.timeout(deadline_s):
                    await self._answer(scope, receive, answer, hold)
        except Refusal as refusal:
            await send_refusal(scope, send, refusal)
        except TimeoutError:
            message = f"no answer within the {deadline_s:g} s of {DEADLINE_HEADER}; allow more, or ask for less"
            if not answer.has_begun:
                await send_refusal(scope, send, Refusal(504, "deadline_exceeded", message))
            elif answer.is_stream:
                event = b"\n\n" + error_event(message, "deadline_exceeded", 504)
                await send({"type": "http.response.body", "body": event})
            # else an answer without an end makes the server close the connection

    async def _answer(self, scope: Scope, receive: Receive, answer: _Answer, hold: Callable[[int], None]) -> None:
        body = await self._read(scope, receive, hold)
        if body is None:
            return

        async def receive_whole() -> Message:
            return {"type": "http.request", "body": body, "more_body": False}

        async with _WhileConnected(receive), self._slots:
            await self._app(scope, receive_whole, answer.send)

    async def _read(self, scope: Scope, receive: Receive, hold: Callable[[int], None]) -> bytes | None:
        """The whole body; None where the client hung up. Raises Refusal."""
        self._check_size(declared_size(header_value(scope, "content-length")))
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            self._check_size(size)
            hold(len(parts[-1]))
            if not message.get("more_body", False):
                return b"".join(parts)

    def _check_size(self, size: int) -> None:
        if size > self._max_body_bytes:
            message = (
                f"the request is larger than {self._max_body_bytes / 1e6:g} MB (serve.max_body_mb); send smaller images"
            )
            raise Refusal(413, "body_too_large", message)


def parse_deadline(value: str | None) -> float | None:
    """Seconds that the client still waits; None for no limit. Raises Refusal for what is no positive number."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise Refusal(
            400, "invalid_deadline", f"{DEADLINE_HEADER} is {value[:40]!r}; it is a positive number of seconds"
        )
    return seconds


def declared_size(value: str | None) -> int:
    """What `content-length` says; 0 where it says nothing, and then only reading tells."""
    return int(value) if value is not None and value.isdecimal() else 0


class _Answer:
    """Passes an answer on, and knows how far it is."""

    def __init__(self, send: Send) -> None:
        self.has_begun = False
        self.is_stream = False
        self._send = send

    async def send(self, message: Message) -> None:
        """One message of the answer."""
        if not self.has_begun:
            self.has_begun, self.is_stream = True, _is_event_stream(message)
        await self._send(message)


def _is_event_stream(start: Message) -> bool:
    return any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in start["headers"])


class _WhileConnected:
    """Ends what is in its `async with` when the client hangs up; as asyncio.timeout does at its time."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._is_gone = False
        self._watch: asyncio.Task[None] | None = None

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._num_cancelling = task.cancelling()
        self._begin = asyncio.get_running_loop().call_later(PATIENCE_S, self._begin_watch)

    def _begin_watch(self) -> None:
        self._watch = asyncio.create_task(self._until_gone())

    async def _until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._is_gone = True
        self._task.cancel()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._begin.cancel()
        if self._watch is not None:
            self._watch.cancel()
        if not self._is_gone:
            return False
        return self._task.uncancel() <= self._num_cancelling and kind is asyncio.CancelledError
