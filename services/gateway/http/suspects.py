"""Which requests were there when engines died: one that ends engines must not end them all.

Model: an engine that dies takes all its requests with it, and nobody says which one it died of. So its death is held
against each of them, once for each life of an engine, until the request is answered or `_REMEMBERED_S` are over.

    1 death     it is asked again as any other request is: nearly always something else was the cause
    2 deaths    it is asked only while no other such request is, so that the next death shows which one it was
    3 deaths    it is refused, and so is whoever sends the same body again

The bodies are told apart by a hash, which is taken only while something is held against any of them.

Limits: who changes a word of the request has another one, and a client that hangs up before the engine dies is not seen.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from hashlib import blake2b

from vcot.services.gateway.http.answers import Refusal

MAX_DEATHS = 3
_REMEMBERED_S = 600.0
_MAX_REMEMBERED = 4_096


@dataclass
class _Record:
    forget_at: float
    lives: set[str] = field(default_factory=set)
    """Of engines that died with it."""


class Suspects:
    """Used on one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._records: dict[bytes, _Record] = {}
        """By the body's hash; those that are forgotten first come first."""
        self._turn = asyncio.Lock()

    @asynccontextmanager
    async def in_turn(self, body: bytes) -> AsyncIterator[None]:
        """Let a request through, one at a time of those that two engines died with. Raises Refusal as `check` does."""
        self.check(body)
        if self._num_deaths(body) < MAX_DEATHS - 1:
            yield
            return
        async with self._turn:
            self.check(body)
            yield

    def check(self, body: bytes) -> None:
        """Raise Refusal for a request that too many engines died with."""
        if self._num_deaths(body) >= MAX_DEATHS:
            message = (
                f"{MAX_DEATHS} engines died while they worked on this request, so it is refused for "
                f"{_REMEMBERED_S / 60:.0f} minutes; change it (fewer tokens, choices or images, or a simpler schema)"
            )
            raise Refusal(422, "engines_died", message)

    def blame(self, body: bytes, life: str) -> None:
        """That life of an engine ended with the request in it."""
        key = _hash(body)
        record = self._records.pop(key, None) or _Record(0.0)
        record.lives.add(life)
        record.forget_at = self._clock() + _REMEMBERED_S
        self._records[key] = record
        if len(self._records) > _MAX_REMEMBERED:
            del self._records[next(iter(self._records))]

    def forget(self, body: bytes) -> None:
        """It was answered."""
        if self._records:
            self._records.pop(_hash(body), None)

    def _num_deaths(self, body: bytes) -> int:
        self._forget_old()
        record = self._records.get(_hash(body)) if self._records else None
        return len(record.lives) if record is not None else 0

    def _forget_old(self) -> None:
        now = self._clock()
        while self._records and next(iter(self._records.values())).forget_at <= now:
            del self._records[next(iter(self._records))]


def _hash(body: bytes) -> bytes:
    return blake2b(body, digest_size=16).digest()
