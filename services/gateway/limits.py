"""What one request may take: a place, a slot, bytes, time. ASGI middleware around the proxy.

Model: a request takes a place as it arrives, or is turned away with 429; its body is read whole, then it waits its turn
for one of the slots, and leaves both at its end. A client that hangs up, in the queue or later, has its work cancelled.
One that sends its body too slowly gets 408, and one that stops reading its answer is cut off, so that neither holds a slot
that others could use. With `x-vcot-deadline-s` (how many seconds the client still waits) all of it, the engine's work
included, ends by then, with 504.

Limits: an answer that has begun when its deadline comes is cut off, since its status is sent already; a stream ends with an
error event.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.gateway.answers import Refusal, error_event, header_value, send_refusal

DEADLINE_HEADER = "x-vcot-deadline-s"
_RETRY_AFTER_S = 2


@dataclass
class Places:
    """How full it is; pure, mutated by one Slots only."""

    max_in_flight: int
    max_queued: int
    taken: int = 0
    in_flight: int = 0

    @property
    def queued(self) -> int:
        """Requests that wait for their turn, or whose body is still being read."""
        return self.taken - self.in_flight

    def take(self) -> None:
        """Take a place. Raises Refusal where all are taken."""
        if self.taken >= self.max_in_flight + self.max_queued:
            message = f"{self.in_flight} requests are in flight and {self.queued} wait; send it again later"
            raise Refusal(429, "overloaded", message, retry_after_s=_RETRY_AFTER_S)
        self.taken += 1


class Slots:
    """Lets requests in, first come, first served."""

    def __init__(self, max_in_flight: int, max_queued: int) -> None:
        self.places = Places(max_in_flight, max_queued)
        self._free = asyncio.Semaphore(max_in_flight)

    @contextmanager
    def place(self) -> Iterator[None]:
        """Be in the house, or raise Refusal."""
        self.places.take()
        try:
            yield
        finally:
            self.places.taken -= 1

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Wait for one's turn."""
        async with self._free:
            self.places.in_flight += 1
            try:
                yield
            finally:
                self.places.in_flight -= 1


class ClientStalledError(Exception):
    """The client does not read what it is sent."""


class Limits:
    """The middleware. The application behind it gets the whole body in one message, and need not watch for hang-ups."""

    def __init__(
        self,
        app: ASGIApp,
        slots: Slots,
        max_body_bytes: int,
        *,
        max_read_s: float = 60.0,
        max_write_s: float = 30.0,
    ) -> None:
        self._app = app
        self._slots = slots
        self._max_body_bytes = max_body_bytes
        self._max_read_s = max_read_s
        self._max_write_s = max_write_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request within its limits, unless its client hangs up first."""
        answer = _Answer(send, self._max_write_s)
        deadline_s = None
        try:
            deadline_s = parse_deadline(header_value(scope, DEADLINE_HEADER))
            with self._slots.place():
                async with asyncio.timeout(deadline_s):
                    await self._answer(scope, receive, answer)
        except Refusal as refusal:
            await send_refusal(scope, send, refusal)
        except TimeoutError:
            message = f"no answer within the {deadline_s:g} s of {DEADLINE_HEADER}; allow more, or ask for less"
            if not answer.has_begun:
                await send_refusal(scope, send, Refusal(504, "deadline_exceeded", message))
            elif answer.is_stream:
                event = b"\n\n" + error_event(message, "deadline_exceeded", 504)
                with contextlib.suppress(ClientStalledError):
                    await answer.send({"type": "http.response.body", "body": event})
        except ClientStalledError:
            pass  # an answer without an end makes the server close the connection

    async def _answer(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        body = await self._read(scope, receive)
        if body is not None:
            await _unless(_hang_up(receive), self._in_turn(scope, body, answer))

    async def _in_turn(self, scope: Scope, body: bytes, answer: _Answer) -> None:
        async def receive() -> Message:
            return {"type": "http.request", "body": body, "more_body": False}

        async with self._slots.slot():
            await self._app(scope, receive, answer.send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None where the client hung up. Raises Refusal."""
        self._check_size(declared_size(header_value(scope, "content-length")))
        try:
            async with asyncio.timeout(self._max_read_s):
                return await self._read_all(receive)
        except TimeoutError:
            message = f"the request was not there after {self._max_read_s:g} s; send it faster"
            raise Refusal(408, "body_timeout", message, headers={"connection": "close"}) from None

    async def _read_all(self, receive: Receive) -> bytes | None:
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            self._check_size(size)
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
    """Passes an answer on to a client that must keep reading."""

    def __init__(self, send: Send, max_write_s: float) -> None:
        self.has_begun = False
        self.is_stream = False
        self._send = send
        self._max_write_s = max_write_s

    async def send(self, message: Message) -> None:
        """Raises ClientStalledError where the client takes nothing for too long."""
        if not self.has_begun:
            self.has_begun, self.is_stream = True, _is_event_stream(message)
        try:
            async with asyncio.timeout(self._max_write_s):
                await self._send(message)
        except TimeoutError:
            raise ClientStalledError from None


def _is_event_stream(start: Message) -> bool:
    return any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in start["headers"])


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _unless(happens: Awaitable[None], work: Awaitable[None]) -> None:
    """Do `work`; if the other happens first, cancel it."""
    event, task = asyncio.ensure_future(happens), asyncio.ensure_future(work)
    try:
        await asyncio.wait({event, task}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        event.cancel()
        if not task.done():
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
