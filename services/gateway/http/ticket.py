"""A request's way to an engine, as whoever carries it sees that; who decides it is dispatch.py."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from vcot.pipeline.records import CheckpointRef
from vcot.services.engine.vllm import Endpoint
from vcot.services.gateway.fleet.ends import EngineFault
from vcot.services.gateway.http.suspects import Key


@dataclass(frozen=True)
class Ask:
    """A request, as far as the choice of its engine depends on it."""

    model: str
    """A checkpoint's name, or an alias."""
    expect: str | None
    """The digest that must answer, where the client names one."""
    image: int | None
    """Key of its first image (services/gateway/fleet/routing.py); None where it has none."""
    key: Key
    """Of its body, for suspects.py."""


@dataclass(frozen=True)
class Assignment:
    """Where a request goes: it is admitted there."""

    replica: str
    life: str
    """Another one is another process, with connections of its own."""
    endpoint: Endpoint
    ref: CheckpointRef
    """The weights that it is answered by."""


class Ticket(Protocol):
    """One request on its way."""

    async def assign(self) -> Assignment:
        """The engine that it goes to. Raises Refusal."""

    async def fail(self, fault: EngineFault) -> Assignment | None:
        """The next one, after that fault; None where its answer has begun. Raises Refusal where nobody is left to ask."""

    def answered(self) -> None:
        """Its engine answered it whole."""


class Dispatch(Protocol):
    """Who decides: a Dispatcher of this process, or a way to that of another."""

    def ticket(self, ask: Ask) -> AbstractAsyncContextManager[Ticket]:
        """Held while the request is on its way; at its end the request is with no engine. Raises Refusal."""

    def on_end(self, listener: Callable[[str], None]) -> None:
        """Have `listener` told the life of each engine that is gone: what it was asked is not answered any more."""
