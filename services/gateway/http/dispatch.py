"""Which engine a request goes to, and which one after a fault: the decisions, apart from the bytes that are carried.

Model: a request asks for a ticket, is assigned an engine that holds the weights that it asks for, and stays admitted there
until it is answered, failed or given up; so a swap, which waits until nobody is admitted, never meets a request. The one
process that has the fleet decides, for itself or for others that carry requests (services/gateway/workers).

An engine that breaks off, answers with 500, 502, 503 or half a JSON, is full, or answers as another model than it was
asked for (a fall-back from an adapter to its base) did not answer: the same request goes to one other replica that holds
the same checkpoint; where engines are full, to each. Where there is no other, an engine that is well is asked once more:
vLLM answers with a bare 500 where its API takes an image to be with its engine that is not, and sends it along the next
time. With an image it is asked up to four times, since that may happen again. Where a swap began meanwhile, the request
waits for its end first. That is safe as long as nothing of an answer is with the client, since an unanswered sample has no
effect.

A client can make any engine fail its own request. So a fault speaks against an engine only where the engine, asked how it
is, is not well; what sound engines answer with 5xx is the request's own fault, and is told as 422, streamed or not. A
request that was there each time when engines died is refused, too (suspects.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from vcot.pipeline.errors import ServerError
from vcot.pipeline.records import CheckpointRef
from vcot.services.checkpoints.registry import Checkpoint
from vcot.services.gateway.fleet.ends import End, EngineFault
from vcot.services.gateway.fleet.group import Fleet, NotServedError, RestingError, Wish
from vcot.services.gateway.fleet.replica import Replica
from vcot.services.gateway.fleet.upstream import Upstream
from vcot.services.gateway.http.answers import Refusal, stamp_headers
from vcot.services.gateway.http.metrics import Metrics
from vcot.services.gateway.http.suspects import Suspects
from vcot.services.gateway.http.ticket import Ask, Assignment, Ticket

MAX_WAIT_S = 600.0
"""How long a request that meets a swap waits for it."""
_RETRY_AFTER_S = 5
_REST_RETRY_AFTER_S = 60
_AGAIN_AFTER_S = 0.2
"""Before the same engine is asked once more: what was on its way to it is there by then."""
_MAX_ASKED_WITH_IMAGE = 4


class Dispatcher:
    """Decides for a fleet; used on its event loop."""

    def __init__(self, fleet: Fleet, metrics: Metrics, max_wait_s: float) -> None:
        """A request that meets a swap waits for it, at most `max_wait_s`."""
        self.fleet = fleet
        self.metrics = metrics
        self.max_wait_s = max_wait_s
        self.suspects = Suspects()

    def on_end(self, listener: Callable[[str], None]) -> None:
        """See Dispatch."""
        self.fleet.end_listeners.append(listener)

    @asynccontextmanager
    async def ticket(self, ask: Ask) -> AsyncIterator[Ticket]:
        """See Dispatch."""
        async with self.suspects.in_turn(ask.key):
            ticket = _Ticket(self, ask)
            try:
                yield ticket
            finally:
                ticket.leave("unknown")


@dataclass(frozen=True)
class _Seat:
    """A request that is admitted."""

    replica: Replica
    upstream: Upstream
    target: Checkpoint
    life: str


class _Ticket:
    """See Ticket. Mutated by one request's task."""

    def __init__(self, dispatcher: Dispatcher, ask: Ask) -> None:
        self._fleet = dispatcher.fleet
        self._metrics = dispatcher.metrics
        self._suspects = dispatcher.suspects
        self._max_wait_s = dispatcher.max_wait_s
        self._ask = ask
        self._wish = Wish(ask.model, ask.expect, self._resolve, ask.image)
        self._tried: list[Replica] = []
        self._seat: _Seat | None = None

    async def assign(self) -> Assignment:
        try:
            return await self._enter(*await self._find())
        except ServerError as error:
            raise _unavailable(error) from None

    async def fail(self, fault: EngineFault) -> Assignment | None:
        seat = self._seat
        assert seat is not None
        if fault.is_broken is None:
            fault.is_broken = not await seat.upstream.is_sound()
            fault.was_there = fault.is_broken and fault.was_sent
        self.leave("broken" if fault.is_broken else "unknown")
        self._count(fault, seat.replica, seat.life)
        if fault.has_begun:
            return None
        try:
            return await self._enter(*await self._after(fault, seat.replica, seat.target))
        except ServerError as error:
            raise _unavailable(error) from None

    def answered(self) -> None:
        self.leave("answered")
        self._suspects.forget(self._ask.key)

    def leave(self, end: End) -> None:
        """Be with no engine any more; repeating it changes nothing."""
        seat, self._seat = self._seat, None
        if seat is not None:
            seat.replica.leave(seat.target.ref.digest, end)

    async def _enter(self, replica: Replica, target: Checkpoint) -> Assignment:
        """Be admitted there, or where it goes from there; nothing is waited for between finding and admitting."""
        while True:
            life = replica.life
            try:
                upstream = replica.admit(target.ref.digest)
            except EngineFault as fault:
                self._count(fault, replica, life)
                replica, target = await self._after(fault, replica, target)
            else:
                self._seat = _Seat(replica, upstream, target, life)
                return Assignment(replica.name, life, upstream.endpoint, target.ref)

    def _count(self, fault: EngineFault, replica: Replica, life: str) -> None:
        self._metrics.count_fault(replica.name, fault.reason)
        if fault.was_there:
            self._suspects.blame(self._ask.key, life)

    async def _after(self, fault: EngineFault, replica: Replica, target: Checkpoint) -> tuple[Replica, Checkpoint]:
        """Who is asked the same after `fault` of `replica`. Raises Refusal, ServerError."""
        self._suspects.check(self._ask.key)
        self._tried.append(replica)
        other = self._next(fault, target.ref.digest)
        if other is None:
            raise _final(fault) from None
        self._metrics.count_retry(fault.reason)
        if other is replica:
            await asyncio.sleep(_AGAIN_AFTER_S)
        if not other.gate.admission.serves(target.ref.digest):  # a swap began
            return await self._find()
        return other, target

    def _next(self, fault: EngineFault, digest: str) -> Replica | None:
        """Another replica or, where that may help, the one that was tried last."""
        if fault.reason == "429":
            return self._fleet.route(digest, self._ask.image, self._tried)
        again = None if fault.is_broken else self._tried[-1]
        if len(self._tried) == 1:
            return self._fleet.route(digest, self._ask.image, self._tried) or again
        may_drift = self._ask.image is not None  # it may have been on its way there, too
        return again if may_drift and len(self._tried) < _MAX_ASKED_WITH_IMAGE else None

    async def _find(self) -> tuple[Replica, Checkpoint]:
        """A replica that serves what is asked for. Raises Refusal, ServerError."""
        try:
            replica, target = await self._fleet.find(self._wish, self._max_wait_s)
        except NotServedError as error:
            trial = self._fleet.trial if self._fleet.is_held_up(self._resolve()) else None
            raise _not_live(self._ask.model, self._resolve().ref.name, error.live, trial) from None
        _check_expected(target.ref, self._ask.expect)
        return replica, target

    def _resolve(self) -> Checkpoint:
        """The checkpoint that the model's name means now. Raises Refusal."""
        checkpoint = self._fleet.resolve(self._ask.model, self._ask.expect)
        if checkpoint is None:
            name = self._ask.model[:100]
            message = f"no checkpoint or alias {name!r}; {self._fleet.registry.suggest(name)}"
            raise Refusal(404, "model_not_found", message)
        return checkpoint


def _unavailable(error: ServerError) -> Refusal:
    if isinstance(error, RestingError):
        return Refusal(503, "resting", str(error), retry_after_s=_REST_RETRY_AFTER_S)
    return Refusal(503, "unavailable", str(error), retry_after_s=_RETRY_AFTER_S)


def _final(fault: EngineFault) -> Refusal:
    """What the client is told where no replica is left to ask."""
    if fault.retry_after is not None:
        return Refusal(429, "engine_full", str(fault), headers={"retry-after": fault.retry_after})
    if fault.reason.isdecimal() and not fault.is_broken:
        return Refusal(422, "request_failed", f"{fault}; the engine is well, so the request is at fault: change it")
    return Refusal(502, "engine_lost", str(fault), retry_after_s=_RETRY_AFTER_S)


def _not_live(model: str, name: str, live: Checkpoint, trial: Checkpoint | None) -> Refusal:
    means = f"{model} means {name}" if model != name else f"{model} was asked for"
    if trial is not None:
        message = (
            f"{means}, but {trial.ref.name} is on trial; ask again in a moment (`vcot swap policy {name}` ends it)"
        )
        return Refusal(503, "checkpoint_on_trial", message, retry_after_s=_RETRY_AFTER_S)
    message = f"{means}, but {live.ref.name} is live; make it so with `vcot swap policy {name}`"
    return Refusal(409, "checkpoint_not_live", message, headers=stamp_headers(live.ref))


def _check_expected(ref: CheckpointRef, expect: str | None) -> None:
    """Raise Refusal unless these are the weights that the client expects."""
    if expect is not None and expect != ref.digest:
        message = (
            f"weights {expect[:19]} were expected, but {ref.name} with {ref.digest[:19]} is live; swap, or ask anew"
        )
        raise Refusal(409, "weights_not_live", message, headers=stamp_headers(ref))
