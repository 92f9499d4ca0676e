"""The worker's end of the line: asks the deciding process where its requests go."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, assert_never

from starlette.types import Receive, Scope, Send

from vcot.services.engine.serve_section import ServeSection
from vcot.services.gateway.fleet.ends import EngineFault
from vcot.services.gateway.http.answers import Refusal, raw_headers, send_refusal
from vcot.services.gateway.http.bodies import MAX_BYTES
from vcot.services.gateway.http.exchange import Ended, exchange_of
from vcot.services.gateway.http.limits import Slots
from vcot.services.gateway.http.ticket import Ask, Assignment, Ticket
from vcot.services.gateway.workers.wire import (
    TO_WORKER,
    Asked,
    Assigned,
    Begin,
    Called,
    Counted,
    Failed,
    Gone,
    Line,
    Over,
    Refused,
    Replied,
    Suspicious,
    latin_headers,
)

_MAX_NAME = 1_000
"""Of what a client calls a model: no checkpoint has a longer name, and what is longer is as unknown without its end."""


class RemoteDispatch(Line):
    """A Dispatch (services/gateway/http/ticket.py) by the process at the other end; its `call` is an ASGI application."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: asyncio.Future[ServeSection] = asyncio.get_running_loop().create_future()
        """What the recipe says."""
        self._end_listeners: list[Callable[[str], None]] = []
        self.is_suspicious = False
        """Whether requests' keys are to be told."""
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[Any]] = {}

    def receive(self, line: bytes) -> None:
        """One message of the deciding process."""
        match message := TO_WORKER.validate_json(line):
            case Begin():
                self.begun.set_result(message.settings)
            case Assigned() | Replied():
                self._resolve(message.id, message)
            case Refused():
                self._resolve(message.id, message.refusal)
            case Gone():
                for listener in self._end_listeners:
                    listener(message.life)
            case Suspicious():
                self.is_suspicious = message.are_there
            case _:
                assert_never(message)

    def connection_lost(self, error: Exception | None) -> None:
        """The deciding process is gone."""
        super().connection_lost(error)
        for number in list(self._waiting):
            self._resolve(number, _ending())

    @asynccontextmanager
    async def ticket(self, ask: Ask) -> AsyncIterator[Ticket]:
        """See Dispatch."""
        ticket = _RemoteTicket(self, next(self._numbers), ask)
        try:
            yield ticket
        finally:
            ticket.leave()

    def on_end(self, listener: Callable[[str], None]) -> None:
        """See Dispatch."""
        self._end_listeners.append(listener)

    def count(self, ended: Ended) -> None:
        """Have a request counted."""
        self.send(Counted(ended=ended))

    async def call(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Have the deciding process answer a request that is no inference. An ASGI application."""
        body = b""
        while len(body) <= MAX_BYTES:
            message = await receive()
            if message["type"] == "http.disconnect":  # half a request may read as a whole one
                return
            body += message.get("body", b"")
            if not message.get("more_body", False):
                break
        called = Called(
            id=next(self._numbers),
            method=scope["method"],
            path=scope["path"],
            query=scope["query_string"].decode("latin-1"),
            headers=latin_headers(scope["headers"]),
            body=body.decode("latin-1"),
            client=scope.get("client"),
        )
        try:
            replied = await self.ask(called.id, called)
        except Refusal as refusal:
            await send_refusal(scope, send, refusal)
            return
        assert isinstance(replied, Replied)
        exchange_of(scope).refused = replied.refused
        headers = raw_headers(replied.headers)
        await send({"type": "http.response.start", "status": replied.status, "headers": headers})
        await send({"type": "http.response.body", "body": replied.body.encode("latin-1")})

    async def ask(self, number: int, message: Asked | Failed | Called) -> Assigned | Replied:
        """Say something, and wait for what is said to it. Raises Refusal."""
        if self.ended.is_set():
            raise _ending()
        waiting = self._waiting[number] = asyncio.get_running_loop().create_future()
        self.send(message)
        try:
            answer = await waiting
        finally:
            del self._waiting[number]
        if isinstance(answer, Refusal):
            raise answer
        assert isinstance(answer, Assigned | Replied)
        return answer

    def _resolve(self, number: int, answer: Assigned | Replied | Refusal) -> None:
        waiting = self._waiting.get(number)  # None where its client has hung up
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)


def _ending() -> Refusal:
    return Refusal(503, "unavailable", "the gateway is ending; try again later", retry_after_s=5)


class _RemoteTicket:
    """See Ticket. Mutated by one request's task."""

    def __init__(self, line: RemoteDispatch, number: int, ask: Ask) -> None:
        self._line = line
        self._number = number
        self._ask = ask
        self._is_open = False

    async def assign(self) -> Assignment:
        ask = self._ask
        expect = None if ask.expect is None else ask.expect[:_MAX_NAME]
        asked = Asked(id=self._number, model=ask.model[:_MAX_NAME], expect=expect, image=ask.image, key=self._key())
        self._is_open = True
        to = await self._say(asked)
        assert to is not None
        return to

    async def fail(self, fault: EngineFault) -> Assignment | None:
        return await self._say(Failed.of(self._number, (self._ask.key() or b"").hex(), fault))

    def answered(self) -> None:
        self._end(was_answered=True)

    def leave(self) -> None:
        """Be with no engine any more; repeating it changes nothing."""
        self._end(was_answered=False)

    def _end(self, *, was_answered: bool) -> None:
        if self._is_open:
            self._is_open = False
            self._line.send(Over(id=self._number, was_answered=was_answered, key=self._key()))

    def _key(self) -> str | None:
        return (self._ask.key() or b"").hex() if self._line.is_suspicious else None

    async def _say(self, message: Asked | Failed) -> Assignment | None:
        answer = await self._line.ask(self._number, message)
        assert isinstance(answer, Assigned)
        return None if answer.to is None else answer.to.assignment


class TurnsElsewhere(Slots):
    """Places of this process, whose requests get their turn at the deciding one."""

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, *_: object) -> None:
        pass
