"""Whose an engine is, and which weights it holds: written down in the engine itself, so that no gateway can miss it.

Model: vLLM keeps one string for whoever changes its weights, its weight version (`GET /weight_info`, `POST
/update_weight_version`, 1 ms each, also under load; no pause is needed). A new process says "default". A gateway writes a
`Held` there: who it is, what it verified the engine to hold, and a beat that it raises at each health check.

    take      refused where another's beat moves; wait until one has stood still for `lease_s` -> write ours -> ours still?
    tell      ours still? -> write what the engine holds now; None before anything in it is changed
    renew     ours still? -> raise the beat
    release   say "default", so that the next gateway need not wait

An engine that says anything else than what it was told last was started anew, or belongs to another gateway; whoever finds
that stops at once. An owner that could not renew in time stops by itself, before anybody may take its place. A beat is
judged by the reader's own clock, and only while the engine answers promptly: one that is busy loading lets nobody renew.

There is no compare-and-set, so two may find an engine free at once. Each writes at most `settle` after it read, and waits
twice as long before it looks again (Fischer's mutual exclusion): the last one that wrote finds itself, the others do not.
One whose writing took longer may have overwritten an owner who looked before that. So it goes on only when that one has
found out at its next renewal, or stopped by itself for want of one.

Limits: a client of the engine that loads weights and says nothing is not seen here. A gateway that was halted between
letting a request in and sending it may send it to an engine that has another owner by then.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from pydantic import ValidationError

from vcot.pipeline.errors import CheckpointError, ServerError
from vcot.pipeline.files import read_record, write_record
from vcot.pipeline.records import Record

_FREE = "default"
_OWNER_FILE = "gateway.json"
_RELEASE_TIMEOUT_S = 2.0
_CURRENT = 0.75
"""Of a lease, in which an owner must renew; else it stops by itself."""
_MAX_TAKES = 10
"""How often a claim is tried on an engine that is too busy to answer in time."""


class Held(Record):
    """A weight version as a gateway writes it."""

    weights: str | None
    """Digest of what was verified; None while that changes."""
    owner: str
    """The run that the gateway serves."""
    life: str
    """One taking of one engine."""
    where: str
    """Where the gateway answers, for people."""
    beat: int = 0


class OwnerFile(Record):
    """`gateway.json`."""

    id: str


class DisownedError(ServerError):
    """The engine was started anew, or is another gateway's."""


@dataclass(frozen=True)
class Owner:
    """A gateway, as others see it. Two that are alive at once have different ids."""

    id: str
    where: str
    lives: set[str] = field(default_factory=set, compare=False)
    """Of its claims that are held now. Mutated by those."""


class Engine(Protocol):
    """The calls that it takes; vcot.services.gateway.fleet.upstream.Upstream has them. Both raise ServerError."""

    async def version(self) -> str:
        """The weight version."""

    async def set_version(self, version: str) -> None:
        """Replace it."""


def find_owner(run_directory: Path, where: str) -> Owner:
    """The gateway of that run, whose serving lock the caller holds: so an earlier one with this id is not alive any more.

    A copy of the run is another: the file's inode counts. Raises CheckpointError for a damaged file.
    """
    path = run_directory / _OWNER_FILE
    own = read_record(path, OwnerFile, CheckpointError, remedy="delete it, and another one is made")
    if own is None:
        own = OwnerFile(id=uuid.uuid4().hex)
        write_record(path, own)
    return Owner(f"{own.id}-{path.stat().st_ino}", where)


def parse_version(version: str) -> Held | None:
    """What a gateway wrote, or None for anything else."""
    try:
        return Held.model_validate_json(version)
    except ValidationError:
        return None


@dataclass
class Claim:
    """On one engine, by one replica; mutated by its own methods, on one event loop."""

    engine: Engine
    owner: Owner
    lease_s: float
    is_shared: bool
    """Whether others can reach the engine; one of our own listens in a private directory."""
    _life: str = field(default_factory=lambda: uuid.uuid4().hex)
    _said: tuple[Held, ...] = ()
    """What the engine may say: what it was told last, and what it was told then without an answer."""
    _renewed_at: float = float("-inf")
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def is_current(self) -> bool:
        """Whether nobody else can have taken the engine."""
        return not self.is_shared or time.monotonic() - self._renewed_at < _CURRENT * self.lease_s

    async def take(self) -> None:
        """Make the engine ours. Raises ServerError where it is another's, or does not answer."""
        settle_s = self.lease_s / 30
        async with self._turn:
            if not self.is_shared:
                await self._sign()
                return
            for _ in range(_MAX_TAKES):
                read_at = await self._until_free()
                await self._sign()
                if time.monotonic() - read_at <= settle_s:
                    break
                await asyncio.sleep(_CURRENT * self.lease_s)
            else:
                raise ServerError("the engine took too long to say whose it is; it is asked again")
            await asyncio.sleep(2 * settle_s)
            await self._check()

    async def tell(self, weights: str | None) -> None:
        """Write down what the engine holds now. Raises DisownedError, ServerError."""
        async with self._turn:
            held = await self._check()
            await self._write(held.model_copy(update={"weights": weights, "beat": held.beat + 1}))

    async def renew(self) -> None:
        """See that the engine is still ours and holds what it was told, and stay its owner. Raises as `tell` does."""
        async with self._turn:
            held = await self._check()
            if self.is_shared:
                await self._write(held.model_copy(update={"beat": held.beat + 1}))

    async def keep(self) -> None:
        """Renew until cancelled, or until it is another's; whoever tells the engine something then finds that."""
        while True:
            await asyncio.sleep(self.lease_s / 6)
            try:
                await self.renew()
            except DisownedError:
                return
            except ServerError:
                continue  # it is busy, as while it loads

    async def release(self) -> None:
        """Let others have it at once. Where the engine does not answer, they wait for the lease's end."""
        self.owner.lives.discard(self._life)
        if not self.is_shared or not self._said:
            return
        with contextlib.suppress(ServerError, TimeoutError):
            async with asyncio.timeout(_RELEASE_TIMEOUT_S), self._turn:
                await self._check()
                await self.engine.set_version(_FREE)
        self._said = ()

    async def _until_free(self) -> float:
        """Wait until nobody owns the engine; the time just before that was asked. Raises ServerError where somebody does."""
        seen, since = None, 0.0
        while True:
            asked = time.monotonic()
            held = parse_version(await self.engine.version())
            if held is not None and held.life in self.owner.lives - {self._life}:
                raise ServerError("this gateway has that engine already, under another address; take one of them out")
            if held is None or held.owner == self.owner.id:
                return asked
            if seen is not None and held != seen:
                raise ServerError(
                    f"the engine belongs to the gateway at {held.where}; stop that one, or give this one another engine "
                    "(serve.upstreams, `vcot replicas add`)"
                )
            answered = time.monotonic()
            if seen is None or answered - asked > self.lease_s / 4:
                seen, since = held, answered
            elif asked - since >= self.lease_s:
                return asked
            await asyncio.sleep(self.lease_s / 15)

    async def _check(self) -> Held:
        """What the engine says, if that is what it was told. Raises DisownedError, ServerError."""
        version = await self.engine.version()
        held = parse_version(version)
        if held is None or held not in self._said:
            if held is not None and held.owner != self.owner.id:
                raise DisownedError(f"the engine belongs to the gateway at {held.where} now")
            raise DisownedError(
                f"vLLM says that it holds {version[:100]!r}, and was told otherwise: it was started anew, or changed by "
                "someone else"
            )
        self._said = (held,)
        return held

    async def _sign(self) -> None:
        """Write down that the engine is ours, and that nobody knows what it holds."""
        self.owner.lives.add(self._life)
        await self._write(Held(weights=None, owner=self.owner.id, life=self._life, where=self.owner.where))

    async def _write(self, held: Held) -> None:
        self._said = (*self._said, held)
        began = time.monotonic()
        await self.engine.set_version(held.model_dump_json())
        self._said, self._renewed_at = (held,), began
