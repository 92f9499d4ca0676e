"""Which requests were there when engines died: one that ends engines must not end them all.

Model: an engine that dies takes all its requests with it, and nobody says which one it died of. So its death is held
against each of them, once for each life of an engine, until the request is answered or `_REMEMBERED_S` are over.

    1 death     it is asked again as any other request is: nearly always something else was the cause
    2 deaths    it is asked only while no other such request is, so that the next death shows which one it was
    3 deaths    it is refused, and so is whoever sends the same body again

The bodies are told apart by a hash (`hash_of`), which is asked for only while something is held against any of them.

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


Key = Callable[[], bytes | None]
"""Gives the hash of a request's body; None where it is not known, and then nothing is known of the request."""


def hash_of(body: bytes) -> bytes:
    """What tells bodies apart."""
    return blake2b(body, digest_size=16).digest()


class Suspects:
    """Used on one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._records: dict[bytes, _Record] = {}
        """By the body's hash; those that are forgotten first come first."""
        self._turn = asyncio.Lock()

    @asynccontextmanager
    async def in_turn(self, key: Key) -> AsyncIterator[None]:
        """Let a request through, one at a time of those that two engines died with. Raises Refusal as `check` does."""
        self.check(key)
        if self._num_deaths(key) < MAX_DEATHS - 1:
            yield
            return
        async with self._turn:
            self.check(key)
            yield

    def check(self, key: Key) -> None:
        """Raise Refusal for a request that too many engines died with."""
        if self._num_deaths(key) >= MAX_DEATHS:
            message = (
                f"{MAX_DEATHS} engines died while they worked on this request, so it is refused for "
                f"{_REMEMBERED_S / 60:.0f} minutes; change it (fewer tokens, choices or images, or a simpler schema)"
            )
            raise Refusal(422, "engines_died", message)

    def blame(self, key: Key, life: str) -> None:
        """That life of an engine ended with the request in it."""
        if (hashed := key()) is None:
            return
        record = self._records.pop(hashed, None) or _Record(0.0)
        record.lives.add(life)
        record.forget_at = self._clock() + _REMEMBERED_S
        self._records[hashed] = record
        if len(self._records) > _MAX_REMEMBERED:
            del self._records[next(iter(self._records))]

    def forget(self, key: Key) -> None:
        """It was answered."""
        if self._records and (hashed := key()) is not None:
            self._records.pop(hashed, None)

    @property
    def are_there(self) -> bool:
        """Whether something is held against any request."""
        self._forget_old()
        return bool(self._records)

    def _num_deaths(self, key: Key) -> int:
        record = self._records.get(key() or b"") if self.are_there else None
        return len(record.lives) if record is not None else 0

    def _forget_old(self) -> None:
        now = self._clock()
        while self._records and next(iter(self._records.values())).forget_at <= now:
            del self._records[next(iter(self._records))]
