"""The replicas behind one gateway, and which of them answers a request.

Model: each replica supervises one vLLM server (replica.py). A request goes to those that are live and hold the
checkpoint that it asks for, by image and load (routing.py); what they hold is changed by rollout.py, within `steered`. A
request that meets a change waits in a line (line.py) until what it asks for is served, also where the change went wrong and
the server is started anew.

Limits: one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

from vcot.pipeline.errors import CheckpointError, ServerError, SwapError, VcotError
from vcot.services.checkpoints.registry import Checkpoint, Registry
from vcot.services.engine.serve_section import ServeSection
from vcot.services.engine.vllm import Progress
from vcot.services.gateway.fleet.gate import Changes
from vcot.services.gateway.fleet.lease import Lease
from vcot.services.gateway.fleet.remote import RemoteServer
from vcot.services.gateway.fleet.replica import Replica, Server, Supervision
from vcot.services.gateway.fleet.roster import Roster
from vcot.services.gateway.fleet.routing import choose
from vcot.services.gateway.stamps import stamp
from vcot.services.gateway.swap.calibration import Calibration
from vcot.services.gateway.swap.claim import Owner
from vcot.services.gateway.swap.plan import Plan
from vcot.services.gateway.swap.verified import SwapLimits

Launch = Callable[[Checkpoint, int, str | None], Server]
"""Makes a server of our own: what it is to hold, its number (never used twice), and its devices."""
_PHASES = ("live", "draining", "swapping", "resting", "loading", "dead")
"""From the best that a replica can be in to the worst."""


@dataclass(frozen=True)
class Wish:
    """What a request asks for; those that are equal wait in one queue."""

    model: str
    expect: str | None
    """The digest that must answer, where one is named."""
    target: Callable[[], Checkpoint] = field(compare=False)
    """What that means now. Raises what the request is refused with where it means nothing."""
    image: int | None = field(compare=False)
    """Key of its first image (routing.py)."""


class NotServedError(ServerError):
    """No replica holds the checkpoint, while others are served."""

    def __init__(self, live: Checkpoint) -> None:
        super().__init__(f"{live.ref.name} is live")
        self.live = live


class RestingError(ServerError):
    """The servers rest, on purpose."""

    def __init__(self) -> None:
        super().__init__("the servers rest while a training has their GPUs; try again later, or see `vcot replicas`")


class Fleet:
    """Mutated by its own methods only, on one event loop."""

    def __init__(
        self,
        registry: Registry,
        settings: ServeSection,
        roster: Roster,
        launch: Launch,
        progress: Progress,
        *,
        max_lora_rank: int | None = None,
        can_sleep: bool = False,
        limits: SwapLimits | None = None,
        supervision: Supervision | None = None,
        owner: Owner | None = None,
    ) -> None:
        """`owner` is this gateway, as others are told of it."""
        self.registry = registry
        self.changes = Changes()
        self.replicas: list[Replica] = []
        self.warnings: list[str] = []
        """What an operator should know, though it stops nothing."""
        self.settings = settings
        self.max_lora_rank = max_lora_rank
        self.limits = limits or SwapLimits()
        self.can_sleep = can_sleep
        """Whether servers of our own have vLLM's sleep mode."""
        self.lease: Lease | None = None
        """Of the rest that they are at (rest.py); None while they serve."""
        self.trial: Checkpoint | None = None
        """What one replica serves to whoever expects its digest, registered or not (rollout.py)."""
        self.trial_owners: set[str] = set()
        """The commands that have it on trial."""
        self.trial_asked = 0.0
        """When it was last asked for; monotonic."""
        self.end_listeners: list[Callable[[str], None]] = []
        """Told each life of a server that ended (Replica.life)."""
        self._steering = asyncio.Lock()
        self._roster = roster
        self._launch = launch
        self._progress = progress
        self._calibration = Calibration(settings.dtype)
        """Of the servers of our own."""
        self._owner = owner or Owner(uuid.uuid4().hex, f"process {os.getpid()} on {socket.gethostname()}")
        self._supervision = supervision or Supervision(settings.hang_timeout_s)
        self._numbers = itertools.count()
        self._tasks: dict[Replica, asyncio.Task[None]] = {}
        self._crash: asyncio.Future[None]
        for url in roster.now.upstreams:
            self._make_remote(url)
        for _ in range(roster.now.num_own):
            self.make_own()

    async def run(self) -> None:
        """Serve until cancelled. Raises the error where the very first start fails on every replica."""
        self._crash = asyncio.get_running_loop().create_future()
        try:
            for replica in self.replicas:
                self.start(replica)
            await self._first_start()
            await self._crash
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _first_start(self) -> None:
        """Until one replica serves; raises the first one's error where none can."""
        await self.changes.wait_for(
            lambda: (
                self._crash.done() or any(r.has_served for r in self.replicas) or all(r.failure for r in self.replicas)
            ),
            None,
        )
        failure = self.replicas[0].failure
        if failure is not None and not any(replica.has_served for replica in self.replicas):
            raise failure

    # Requests

    def route(self, digest: str, image: int | None, tried: Collection[Replica] = ()) -> Replica | None:
        """A replica for a request for that checkpoint, other than those `tried`; one that was tried has waited already."""
        able = [r for r in self.replicas if r.gate.admission.serves(digest) and r.breaker.allows and r not in tried]
        if not tried:
            able = [replica for replica in able if replica.gate.admission.has_room]
        if len(able) < 2:
            return able[0] if able else None
        return choose(able, image)

    async def find(self, wish: Wish, max_wait_s: float) -> tuple[Replica, Checkpoint]:
        """A replica for what `wish` means, looked at again after each change: a swap may change what an alias means.

        Waits at most `max_wait_s`, behind who wished for the same before, and only while something changes.
        Raises NotServedError, ServerError, and what `wish` raises.
        """
        target = wish.target()
        replica = self.route(target.ref.digest, wish.image)
        if replica is not None and not (replica.gate.admission.is_ramping and self.changes.line.has(wish)):
            return replica, target
        met = {replica: replica.failure for replica in self.replicas} if self.is_changing else {}

        def is_time() -> bool:
            digest = wish.target().ref.digest
            return self.route(digest, wish.image) is not None or not self._may_serve(digest, met)

        await self.changes.line.wait(wish, is_time, max_wait_s)
        target = wish.target()
        if (replica := self.route(target.ref.digest, wish.image)) is not None:
            return replica, target
        raise self._not_served(target)

    def _may_serve(self, digest: str, met: Mapping[Replica, VcotError | None]) -> bool:
        """Whether waiting may help who met replicas in a change, and their last failure to start."""
        states = [replica.gate.admission for replica in self.replicas]
        is_held_back = any(state.serves(digest) and not state.has_room for state in states)
        comes_back = any(r.gate.admission.phase in ("dead", "loading") and r.failure is met[r] for r in met)
        return self.is_changing or is_held_back or comes_back

    @property
    def is_changing(self) -> bool:
        """Whether waiting may help."""
        return self._steering.locked() or any(replica.gate.admission.is_changing for replica in self.replicas)

    def _not_served(self, target: Checkpoint) -> ServerError:
        if any(replica.gate.admission.serves(target.ref.digest) for replica in self.replicas):
            return ServerError(f"{target.ref.name} failed too often; it is tried again in a moment")
        if self.lease is not None:
            return RestingError()
        live = self.live
        if live is not None and not self.is_changing:
            return NotServedError(live)
        admission = self.best.gate.admission
        return ServerError(f"no checkpoint is live ({admission.phase}: {admission.message}); try again later")

    # State

    @property
    def best(self) -> Replica:
        """The replica that is furthest; it stands for all where one line must do."""
        return min(self.replicas, key=lambda replica: _PHASES.index(replica.gate.admission.phase))

    @property
    def live(self) -> Checkpoint | None:
        """What the registry says is live, or at least what a replica holds."""
        held = [c for r in self.replicas if (c := r.gate.admission.checkpoint) is not None]
        return next((c for c in held if c.ref.name == self.registry.live()), held[0] if held else None)

    def resolve(self, name: str, digest: str | None) -> Checkpoint | None:
        """What a request for that name or alias means, which may expect a digest; None where it means nothing.

        A stamp means those weights only.
        """
        name, at, _ = (asked := name).partition("@")
        trial = self.trial
        if trial is not None and (trial.ref.name, trial.ref.digest) == (name, digest):
            self.trial_asked = time.monotonic()
            return trial
        found = self.registry.find(name)
        is_meant = found is not None and (not at or asked == stamp(found.ref, name))
        return found if is_meant else None

    def is_held_up(self, wanted: Checkpoint) -> bool:
        """Whether it is served again once the present trial is over."""
        if self.trial is None:
            return False
        plan = self.replicas[0].plan
        live = self.registry.find(self.registry.live() or "")
        return live is not None and wanted in (live, *plan.adapters(live))

    def served(self) -> Iterator[Checkpoint]:
        """All that can be asked for now."""
        found = {c.ref.name: c for replica in self.replicas for c in replica.gate.admission.served}
        yield from found.values()

    # Replicas

    @contextlib.asynccontextmanager
    async def steered(self) -> AsyncIterator[None]:
        """For whoever changes what replicas hold, or takes one away: one at a time, and whoever waited looks again."""
        try:
            async with self._steering:
                yield
        finally:
            self.changes.notify()

    def add(self, url: str | None) -> Replica:
        """Start one more server, or use the one at `url`; it takes requests once it is verified. Raises SwapError."""
        if url is not None and _name_of(url) in {replica.name for replica in self.replicas}:
            raise SwapError(f"{url} is a replica already; give another server")
        if self.lease is not None:
            raise SwapError("the servers rest; add one when they serve again")
        self._roster.add(url)
        replica = self.make_own() if url is None else self._make_remote(url)
        self.start(replica)
        return replica

    async def remove(self, name: str) -> None:
        """Let a replica's requests end, then drop it.

        Raises CheckpointError for an unknown name, SwapError for the last one and for one that goes with its trial.
        """
        async with self.steered():
            replica = next((replica for replica in self.replicas if replica.name == name), None)
            if replica is None:
                raise CheckpointError(f"no replica {name!r}; there are {', '.join(r.name for r in self.replicas)}")
            if replica.plan.pinned is not None:
                raise SwapError(
                    f"replica {name} was started for the trial of {replica.plan.pinned.ref.name}, and goes when that ends; "
                    "take away another"
                )
            others = [other for other in self.replicas if other is not replica and other.plan.pinned is None]
            if not any(other.gate.admission.phase == "live" for other in others):
                raise SwapError(f"replica {name} is the only one that serves; add another first")
            self._roster.remove(replica.url)
            await self.retire(replica)

    def make_own(self, pinned: Checkpoint | None = None, devices: str | None = None) -> Replica:
        """One more server of ours, not started yet; `pinned` is what it is to hold until that is live."""
        number = next(self._numbers)
        devices = devices or self.settings.devices_of(number)
        replica = self._make(f"vllm-{number}", lambda checkpoint: self._launch(checkpoint, number, devices), pinned)
        replica.devices = devices
        return replica

    def _make_remote(self, url: str) -> Replica:
        server = RemoteServer(url, self.settings.start_timeout_s)
        return self._make(_name_of(url), lambda _: server, url=url)

    def _make(
        self,
        name: str,
        launch: Callable[[Checkpoint], Server],
        pinned: Checkpoint | None = None,
        url: str | None = None,
    ) -> Replica:
        plan = Plan(self.registry, self.warn, pinned)
        calibration = self._calibration if url is None else Calibration(self.settings.dtype)
        say = self._say_of(name)
        replica = Replica(
            name, launch, plan, self.changes, say, self.warn, calibration, self._owner, self._supervision, url=url
        )
        replica.on_end = self._tell_end
        self.replicas.append(replica)
        return replica

    def _tell_end(self, life: str) -> None:
        for listener in tuple(self.end_listeners):
            listener(life)

    def start(self, replica: Replica) -> None:
        """Begin to supervise it."""
        task = self._tasks[replica] = asyncio.create_task(replica.run())
        task.add_done_callback(self._on_end)

    def _on_end(self, task: asyncio.Task[None]) -> None:
        """A supervision that ends by itself is a bug, which ends the gateway aloud."""
        if not task.cancelled() and not self._crash.done() and (error := task.exception()) is not None:
            self._crash.set_exception(error)
            self.changes.notify()

    async def retire(self, replica: Replica) -> None:
        """Let its requests end, as far as they do in time, then stop it and forget it."""
        with contextlib.suppress(SwapError, ServerError):
            await replica.gate.drain(f"taking {replica.name} away", self.limits.drain_s)
        self.replicas.remove(replica)
        task = self._tasks.pop(replica)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        self.changes.notify()

    def warn(self, message: str) -> None:
        """Say it once, and keep it for the operator."""
        if message not in self.warnings:
            self.warnings.append(message)
            self._progress(f"warning: {message}")

    def _say_of(self, name: str) -> Progress:
        """Progress of one replica, named where there are several."""
        return lambda message: self._progress(f"{name}: {message}" if len(self.replicas) > 1 else message)


def _name_of(url: str) -> str:
    return url.partition("://")[2]
