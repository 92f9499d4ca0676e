"""The deciding end of one worker's line: its requests' tickets are held here, and end with it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import assert_never

from starlette.types import Message

from vcot.services.gateway.http.answers import Refusal, raw_headers
from vcot.services.gateway.http.app import Deciding
from vcot.services.gateway.http.exchange import exchange_of
from vcot.services.gateway.http.ticket import Ask, Ticket
from vcot.services.gateway.workers.wire import (
    FROM_WORKER,
    Asked,
    Assigned,
    Called,
    Counted,
    Failed,
    Gone,
    Line,
    Over,
    Refused,
    Replied,
    Suspicious,
    Target,
    latin_headers,
)

_log = logging.getLogger(__name__)


class Desk(Line):
    """Used on the deciding process's event loop."""

    def __init__(self, deciding: Deciding, on_failure: Callable[[], None]) -> None:
        """`on_failure` is called after each request that an engine failed."""
        super().__init__()
        self._dispatcher = deciding.dispatcher
        self._turns = deciding.slots
        self._others = deciding.others
        self._on_failure = on_failure
        self._requests: dict[int, _Held] = {}
        self._calls: set[asyncio.Task[None]] = set()
        self._is_suspicious = False
        deciding.dispatcher.on_end(self._tell_end)

    def receive(self, line: bytes) -> None:
        """One message of the worker."""
        match message := FROM_WORKER.validate_json(line):
            case Asked():
                held = self._requests[message.id] = _Held(message)
                held.task = asyncio.create_task(self._hold(held))
            case Failed():
                self._requests[message.id].steps.put_nowait(message)
            case Over():
                self._end(message)
            case Counted():
                self._dispatcher.metrics.count(message.ended)
            case Called():
                call = asyncio.create_task(self._answer(message))
                self._calls.add(call)
                call.add_done_callback(self._calls.discard)
            case _:
                assert_never(message)

    def connection_lost(self, error: Exception | None) -> None:
        """The worker is gone, and so is what it carried."""
        super().connection_lost(error)
        self._dispatcher.fleet.end_listeners.remove(self._tell_end)
        for held in self._requests.values():
            held.cancel()

    def _end(self, over: Over) -> None:
        held = self._requests.pop(over.id, None)
        if held is None:
            return
        if over.was_answered and held.ticket is not None:
            held.key = over.key or held.key
            held.ticket.answered()
            self.tell_suspicion()
        held.cancel()

    async def _hold(self, held: _Held) -> None:
        """A request's ticket, until it is over."""
        asked = held.asked
        try:
            async with self._turns, self._dispatcher.ticket(held.ask) as held.ticket:
                to = await held.ticket.assign()
                self.send(Assigned(id=asked.id, to=Target.of(to)))
                while True:
                    failed = await held.steps.get()
                    held.key = failed.key
                    try:
                        other = await held.ticket.fail(failed.fault)
                    finally:
                        self._on_failure()
                    self.send(Assigned(id=asked.id, to=other and Target.of(other)))
        except Refusal as refusal:
            self.send(Refused.of(asked.id, refusal))
        except Exception:  # noqa: BLE001 - it fails one request, and is told
            _log.exception("a request's way to an engine failed")
            self.send(Refused.of(asked.id, Refusal(500, "internal_error", "the gateway failed; its log says how")))
        finally:
            held.ticket = None

    def _tell_end(self, life: str) -> None:
        self.send(Gone(life=life))

    def tell_suspicion(self) -> None:
        """Have the worker send its requests' keys as long as there are suspects."""
        if (are_there := self._dispatcher.suspects.are_there) != self._is_suspicious:
            self._is_suspicious = are_there
            self.send(Suspicious(are_there=are_there))

    async def _answer(self, called: Called) -> None:
        sent: list[Message] = []
        body = called.body.encode("latin-1")

        async def receive() -> Message:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "scheme": "http",
            "method": called.method,
            "path": called.path,
            "raw_path": called.path.encode(),
            "root_path": "",
            "query_string": called.query.encode("latin-1"),
            "headers": raw_headers(called.headers),
            "client": called.client,
            "server": None,
        }
        try:
            await self._others(scope, receive, send)
        except Exception:  # noqa: BLE001 - it fails one call, and is told
            _log.exception("%s %s failed", called.method, called.path[:100])
        start: Message = sent[0] if sent else {"status": 500, "headers": []}
        self.send(
            Replied(
                id=called.id,
                status=start["status"],
                headers=latin_headers(start["headers"]),
                body=b"".join(part.get("body", b"") for part in sent[1:]).decode("latin-1"),
                refused=exchange_of(scope).refused,
            )
        )


class _Held:
    """One request of a worker. Mutated by its Desk only."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.key = asked.key
        self.ask = Ask(asked.model, asked.expect, asked.image, self._hashed)
        self.steps: asyncio.Queue[Failed] = asyncio.Queue()
        self.ticket: Ticket | None = None
        self.task: asyncio.Task[None] | None = None

    def _hashed(self) -> bytes | None:
        return None if self.key is None else bytes.fromhex(self.key)

    def cancel(self) -> None:
        """It is over."""
        if self.task is not None:
            self.task.cancel()
