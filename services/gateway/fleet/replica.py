"""One supervised server: vLLM, the gate before it, and what it should hold.

Model: `run` starts the server (or waits for one that someone else runs) with the checkpoint that is to be live,
verifies it by its canary before any request is admitted, and when it is down, or supervising it failed, does the same
again, after a pause that doubles while it fails. What is to be live may change meanwhile: it is asked for again just before
requests are let in, and loaded in place. At rest (rest.py) a server sleeps, watched as ever, or is not started until it is
to wake.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar

from vcot.pipeline.errors import CheckpointError, ServerError, SwapError, VcotError
from vcot.services.checkpoints.registry import Checkpoint
from vcot.services.engine.vllm import Endpoint, Progress
from vcot.services.gateway.admin import ReplicaState
from vcot.services.gateway.fleet.admission import Phase
from vcot.services.gateway.fleet.breaker import Breaker
from vcot.services.gateway.fleet.ends import End, EngineFault
from vcot.services.gateway.fleet.gate import MAX_RAMP_S, Changes, Gate, first_of
from vcot.services.gateway.fleet.health import HEALTH_INTERVAL_S, Health, watch
from vcot.services.gateway.fleet.upstream import PULSE_TIMEOUT_S, Upstream
from vcot.services.gateway.swap.calibration import Calibration
from vcot.services.gateway.swap.claim import Owner
from vcot.services.gateway.swap.fingerprint import Fingerprint, read_fingerprint
from vcot.services.gateway.swap.plan import Plan
from vcot.services.gateway.swap.verified import put_adapter, verify_held
from vcot.services.gateway.swap.ways import check_reloadable

_log = logging.getLogger(__name__)
T = TypeVar("T")
_MAX_BACKOFF_S = 60.0
_LIVES = itertools.count(1)
"""Of all servers of this process: a name may come again, a life does not."""


class Server(Protocol):
    """What is supervised: vcot.services.engine.vllm.VllmServer, remote.RemoteServer, or another in tests."""

    @property
    def endpoint(self) -> Endpoint:
        """Where it answers."""

    @property
    def checkpoint(self) -> Checkpoint | None:
        """What it was started with; None where someone else started it."""

    async def start(self, progress: Progress) -> None:
        """Start, and wait until it answers. Raises ServerError."""

    async def wait(self) -> ServerError:
        """Wait until it died; how."""

    async def stop(self) -> None:
        """End it; repeating it changes nothing."""


@dataclass(frozen=True)
class Supervision:
    """How closely a replica is watched; seconds."""

    hang_timeout_s: float = 120.0
    health_interval_s: float = HEALTH_INTERVAL_S
    pulse_timeout_s: float = PULSE_TIMEOUT_S
    first_backoff_s: float = 1.0
    lease_s: float = 30.0
    """How long another gateway's beat must stand still before its engine is taken."""
    max_ramp_s: float = MAX_RAMP_S
    """How long at most an engine with empty caches is given few requests."""


@dataclass(eq=False)
class Replica:
    """Mutated by its own `run` and by the swap that is on, on one event loop."""

    name: str
    launch: Callable[[Checkpoint], Server]
    plan: Plan
    changes: Changes
    progress: Progress
    warn: Callable[[str], None]
    calibration: Calibration
    """Of servers of its server's kind."""
    owner: Owner
    """The gateway."""
    supervision: Supervision = Supervision()
    devices: str | None = None
    """CUDA_VISIBLE_DEVICES of a server of our own."""
    url: str | None = None
    """Of a server that someone else runs."""
    breaker: Breaker = field(default_factory=Breaker)
    num_restarts: int = 0
    failure: VcotError | None = None
    """Why its server did not start when that was last tried."""
    has_served: bool = False
    on_end: Callable[[str], None] = lambda _: None
    """Told each life of its server that ended."""

    def __post_init__(self) -> None:
        self.gate = Gate(self.changes, self.supervision.max_ramp_s)
        self._upstream: Upstream | None = None
        self._life = 0
        self._restart = asyncio.Event()
        self._rest = asyncio.Event()
        self.resting: Literal["sleep", "stop"] | None = None
        """How it rests, or is about to."""

    @property
    def life(self) -> str:
        """A name of its server's present life."""
        return f"{self.name}/{self._life}"

    @property
    def in_flight(self) -> int:
        """Requests that it works on."""
        return self.gate.admission.in_flight

    @property
    def upstream(self) -> Upstream:
        """The live server. Raises ServerError where there is none."""
        if self._upstream is None:
            raise ServerError(f"{self.name} is not up ({self.gate.admission.message}); try again later")
        return self._upstream

    @property
    def state(self) -> ReplicaState:
        """For the operator."""
        admission = self.gate.admission
        return ReplicaState(
            name=self.name,
            phase=admission.phase,
            message=admission.message,
            serves=tuple(checkpoint.ref for checkpoint in admission.served),
            in_flight=admission.in_flight,
            breaker=self.breaker.state,
            num_restarts=self.num_restarts,
        )

    def admit(self, digest: str) -> Upstream:
        """Let a request for that checkpoint in; `leave` must follow.

        Raises EngineFault where the engine may be another gateway's by now, ServerError where there is none.
        """
        upstream = self.upstream
        if not upstream.claim.is_current:
            message = f"{self.name} did not answer its gateway for so long that another one may have it"
            raise EngineFault("not_owned", message, is_broken=False)
        self.gate.admit(digest)
        self.breaker.begin()
        return upstream

    def leave(self, digest: str, end: End) -> None:
        """It is over, which may tell something of the server."""
        match end:
            case "answered":
                self.breaker.succeed()
            case "broken":
                self.breaker.fail()
            case "unknown":
                self.breaker.abandon()
        self.gate.leave(digest)

    def restart(self) -> None:
        """Take the server down and up again, with what it should hold then."""
        self._restart.set()

    async def run(self) -> None:
        """Serve until cancelled."""
        pause_s = 0.0
        while True:
            if self.resting:
                await self._until_woken()
            try:
                await self._serve_once()
            except Exception as fault:  # noqa: BLE001 - a bug ends one life of one server
                error = self._as_failure(fault)
                if self.resting:
                    continue
                was_live = self.gate.admission.phase == "dead"
                doubled = 0.0 if was_live else 2 * pause_s
                pause_s = min(_MAX_BACKOFF_S, doubled or self.supervision.first_backoff_s)
                if not was_live:
                    self.failure = error
                    self.gate.move("dead", _first_line(error))
                self.progress(f"{_first_line(error).rstrip(':;')}; starting it again in {pause_s:.0f} s")
                await asyncio.sleep(pause_s)
                self.num_restarts += 1
                self.gate.move("loading", "starting again")

    def _as_failure(self, error: Exception) -> VcotError:
        """What ended a server's life; a bug of ours is told with its traceback, and ends no more than that."""
        if isinstance(error, VcotError):
            return error
        _log.error("%s: its supervision failed", self.name, exc_info=error)
        return ServerError(
            f"a bug in supervising {self.name} ({type(error).__name__}: {error}); its traceback is in the log"
        )

    async def rest(self, way: Literal["sleep", "stop"], drain_s: float) -> None:
        """Let its requests end, then have its server sleep, or stop it; one that is not up is not started.

        Raises SwapError where requests take longer, and ServerError where it cannot sleep; it serves again then.
        """
        self.resting = way
        self._rest.set()
        await self._until_phase("live", "resting")
        try:
            if self.gate.admission.phase == "live":
                await self.gate.drain(f"to {way} while its GPU is needed", drain_s)
        except ServerError:
            await self._until_phase("resting")  # it died meanwhile
        except SwapError:
            self._end_rest()
            raise
        if self.gate.admission.phase != "swapping":
            return
        if way == "stop":
            self.restart()
            await self._until_phase("resting")
            return
        try:
            await self.upstream.sleep()
        except ServerError:
            self._end_rest()
            self.restart()
            raise
        self.gate.move("resting", "asleep while its GPU is needed")

    async def wake(self) -> None:
        """Serve again, verified as at any start; returns once it does, or its server did not start."""
        self._end_rest()
        self.failure = None
        if self._upstream is not None and self.gate.admission.phase == "resting":
            await self._wake_up(self._upstream)
        self.changes.notify()
        admission = self.gate.admission
        await self.changes.wait_for(lambda: admission.phase == "live" or self.failure is not None, None)

    async def _wake_up(self, upstream: Upstream) -> None:
        """Have the sleeping server go on with what it held, if it still holds it; else it is started anew."""
        admission = self.gate.admission
        self.gate.move("swapping", "waking up")
        try:
            await upstream.wake_up()
            assert admission.checkpoint is not None
            await verify_held(upstream, admission.checkpoint, upstream.fingerprint)
            for adapter in admission.adapters.values():
                await put_adapter(upstream, adapter, await asyncio.to_thread(self.plan.publish, adapter))
        except (VcotError, OSError) as error:
            self.warn(f"{self.name} did not wake as it slept, and its server is started anew: {error}")
            self.restart()
            return
        if admission.phase == "swapping":
            self.gate.move("live", "")

    def _end_rest(self) -> None:
        self.resting = None
        self._rest.clear()

    async def _until_phase(self, *phases: Phase) -> None:
        await self.changes.wait_for(lambda: self.gate.admission.phase in phases, None)

    async def _until_woken(self) -> None:
        self.gate.move("resting", "stopped while its GPU is needed")
        await self.changes.wait_for(lambda: not self.resting, None)
        self.gate.move("loading", "starting again")

    async def _serve_once(self) -> None:
        """One life of a server; always ends with an error."""
        self._life = next(_LIVES)
        self._restart.clear()
        server = self.launch(await asyncio.to_thread(self.plan.verified))
        try:
            if (error := await first_of(server.start(self._say), self._until_rest())) is not None:
                raise error
            async with self._claimed(server) as upstream:
                health = Health(self.supervision.hang_timeout_s)
                health.fault(time.monotonic(), 0, await upstream.pulse())  # of the process that is verified now
                self._say("asking the canary")
                keeping = asyncio.create_task(upstream.claim.keep())
                try:
                    checkpoint, adapters = await self._take_up(server, upstream)
                finally:
                    keeping.cancel()
                self.breaker.succeed()
                self._upstream, self.has_served = upstream, True
                self.gate.move("live", "", checkpoint, adapters)
                self.progress(f"{checkpoint.ref.name} is live")
                error = await self._until_down(server, upstream, health)
                self.gate.move("dead", _first_line(error))
                raise error
        finally:
            self._upstream = None
            self.on_end(self.life)
            await server.stop()

    @asynccontextmanager
    async def _claimed(self, server: Server) -> AsyncIterator[Upstream]:
        """A server that is up, and no other gateway's. Raises ServerError."""
        watched, is_shared = self.supervision, server.checkpoint is None
        upstream = Upstream(server.endpoint, self.calibration, self.owner, watched.lease_s, is_shared=is_shared)
        upstream.pulse_timeout_s = watched.pulse_timeout_s
        async with upstream:
            self._say("asking whose the engine is")
            try:
                await upstream.claim.take()
                yield upstream
            finally:
                await upstream.claim.release()

    async def _take_up(self, server: Server, upstream: Upstream) -> tuple[Checkpoint, list[Checkpoint]]:
        """Make a server that is up hold what it should, verified. Raises CheckpointError, ServerError.

        What it should hold is looked at last, with no wait between that and letting requests in: so the engine is told what
        it holds before it.
        """
        held, adapters = server.checkpoint, list[Checkpoint]()
        if held is not None:
            await self._verify_start(upstream, held, await self._read(held))
            await upstream.claim.tell(held.ref.digest)
        else:  # it may sleep since an earlier gateway's time
            await upstream.wake_up()
        while True:
            wanted = self.plan.checkpoint()
            if wanted != held:
                verified = await asyncio.to_thread(self.plan.verified)
                await self._bring_to(upstream, held, verified)
                await upstream.claim.tell(verified.ref.digest)
                held, adapters = verified, []
            elif missing := [a for a in self.plan.adapters(held) if a not in adapters]:
                try:
                    await put_adapter(upstream, missing[0], await asyncio.to_thread(self.plan.publish, missing[0]))
                    adapters.append(missing[0])
                except (SwapError, ServerError, CheckpointError, OSError) as error:
                    self.plan.exclude(missing[0], f"{error}")
            else:
                return held, adapters

    async def _read(self, checkpoint: Checkpoint) -> Fingerprint:
        return await asyncio.to_thread(read_fingerprint, checkpoint, self.calibration.dtype)

    async def _verify_start(self, upstream: Upstream, checkpoint: Checkpoint, fingerprint: Fingerprint) -> None:
        if checkpoint.manifest.canary is None:
            self.warn(f"checkpoint {checkpoint.ref.name} has no canary, so that it is what answers was not verified")
        try:
            await verify_held(upstream, checkpoint, fingerprint)
        except SwapError as error:
            raise ServerError(f"{error}; check serve.dtype against the checkpoint's own type") from None

    async def _bring_to(self, upstream: Upstream, held: Checkpoint | None, wanted: Checkpoint) -> None:
        """Load `wanted` in place. What a server of someone else's holds is anyone's guess, so that is no exception."""
        if held is not None:
            await asyncio.to_thread(_check_same_shape, held, wanted)
        fingerprint = await self._read(wanted)
        self._say(f"loading {wanted.ref.name} in place")
        await upstream.claim.tell(None)
        await upstream.flush_caches()  # refused while it works on requests, which would span the load
        await upstream.reload(wanted.directory)
        await self._verify_start(upstream, wanted, fingerprint)

    async def _until_down(self, server: Server, upstream: Upstream, health: Health) -> ServerError:
        interval_s = min(self.supervision.health_interval_s, self.supervision.lease_s / 6)
        watching = watch(upstream, lambda: self.in_flight, health, interval_s)
        return await first_of(server.wait(), self._until_restart(), watching)

    async def _until_restart(self) -> ServerError:
        await self._restart.wait()
        return ServerError("vLLM is stopped to rest" if self.resting else "vLLM is started anew to hold what it should")

    async def _until_rest(self) -> ServerError:
        await self._rest.wait()
        return ServerError("vLLM is not started while its GPU is needed")

    def _say(self, message: str) -> None:
        self.gate.admission.message = message
        self.progress(message)


def _check_same_shape(held: Checkpoint, wanted: Checkpoint) -> None:
    try:
        check_reloadable(held, wanted)
    except SwapError as error:
        raise ServerError(f"{error}; the server is started anew with it") from None


def _first_line(error: Exception) -> str:
    """The sentence; what follows it is the log's end."""
    return str(error).splitlines()[0]
