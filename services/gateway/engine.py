"""One supervised engine: the vLLM server, the gate before it, and the checkpoint that it should hold.

Model: `run` starts the server with the checkpoint that the registry says is live, verifies it by its canary before any
request is admitted, and when the server dies does the same again, after a pause that doubles while it fails. A swap goes
through here, one at a time.

Limits: one server. A gateway with several has one Engine for each, and a router that picks.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Protocol

from pipeline.errors import CheckpointError, ServerError, SwapError, VcotError
from services.admin import Swapped
from services.checkpoints import BASE_ALIAS, Checkpoint, Registry
from services.gateway.gate import Gate
from services.gateway.swap import RollbackError, SwapLimits, swap_weights, verify_canary
from services.gateway.upstream import Upstream
from services.vllm import Endpoint, Progress

_MAX_BACKOFF_S = 60.0


class Server(Protocol):
    """What is supervised; services.vllm.VllmServer, or another in tests."""

    @property
    def endpoint(self) -> Endpoint:
        """Where it answers."""

    async def start(self, progress: Progress) -> None:
        """Start, and wait until it answers. Raises ServerError."""

    async def wait(self) -> ServerError:
        """Wait until it died; how."""

    async def stop(self) -> None:
        """End it; repeating it changes nothing."""


class Engine:
    """Mutated by its own `run` and `swap` only, on one event loop."""

    def __init__(
        self,
        registry: Registry,
        launch: Callable[[Checkpoint], Server],
        progress: Progress,
        *,
        limits: SwapLimits | None = None,
        first_backoff_s: float = 1.0,
    ) -> None:
        self.registry = registry
        self.gate = Gate()
        self.warnings: list[str] = []
        """What an operator should know, though it stops nothing."""
        self.num_restarts = 0
        self._launch = launch
        self._progress = progress
        self._limits = limits or SwapLimits()
        self._first_backoff_s = first_backoff_s
        self._upstream: Upstream | None = None
        self._swapping = asyncio.Lock()
        self._is_broken = asyncio.Event()

    @property
    def upstream(self) -> Upstream:
        """The live server. Raises ServerError where there is none."""
        if self._upstream is None:
            raise ServerError(f"no checkpoint is live ({self.gate.admission.message}); try again later")
        return self._upstream

    async def run(self) -> None:
        """Serve until cancelled. Raises the error where the very first start fails; later ones are tried again."""
        failures, has_served = 0, False
        while True:
            try:
                await self._serve_once()
            except VcotError as error:
                was_live = self.gate.admission.phase == "dead"
                has_served = has_served or was_live
                if not has_served:
                    raise
                failures = 1 if was_live else failures + 1
                pause_s = min(_MAX_BACKOFF_S, self._first_backoff_s * 2 ** (failures - 1))
                if not was_live:
                    self.gate.move("dead", _first_line(error))
                self._progress(f"{_first_line(error).rstrip(':;')}; starting it again in {pause_s:.0f} s")
                await asyncio.sleep(pause_s)
                self.num_restarts += 1
                self.gate.move("loading", "starting again")

    async def _serve_once(self) -> None:
        """One life of a server; always ends with an error."""
        checkpoint = await asyncio.to_thread(self._wanted)
        server = self._launch(checkpoint)
        try:
            await server.start(self._say)
            async with Upstream(server.endpoint) as upstream:
                self._say("asking the canary")
                await self._verify_start(upstream, checkpoint)
                self._is_broken.clear()
                self._upstream = upstream
                self.gate.move("live", "", checkpoint)
                self._progress(f"{checkpoint.ref.name} is live")
                error = await self._until_down(server)
                self.gate.move("dead", _first_line(error))
                raise error
        finally:
            self._upstream = None
            await server.stop()

    async def _until_down(self, server: Server) -> ServerError:
        died, broken = asyncio.ensure_future(server.wait()), asyncio.ensure_future(self._is_broken.wait())
        try:
            await asyncio.wait({died, broken}, return_when=asyncio.FIRST_COMPLETED)
            return died.result() if died.done() else ServerError("what the server holds is unknown after a failed swap")
        finally:
            for task in (died, broken):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    def _wanted(self) -> Checkpoint:
        """The checkpoint that should be live; the base where that one is gone. Raises CheckpointError."""
        name = self.registry.live() or BASE_ALIAS
        try:
            return self.registry.verify(name)
        except CheckpointError as error:
            base = self.registry.resolve(BASE_ALIAS)
            if base.ref.name == name:
                raise
            self._warn(f"{base.ref.name} is served instead of {name}: {error}")
            return self.registry.verify(base.ref.name)

    async def _verify_start(self, upstream: Upstream, checkpoint: Checkpoint) -> None:
        if checkpoint.manifest.canary is None:
            self._warn(f"checkpoint {checkpoint.ref.name} has no canary, so that it is what answers was not verified")
        try:
            await verify_canary(upstream, checkpoint)
        except SwapError as error:
            raise ServerError(f"{error}; check serve.dtype against the checkpoint's own type") from None

    async def swap(self, alias: str, name: str) -> Swapped:
        """Make `name` live and let `alias` mean it. Raises CheckpointError, SwapError, ServerError."""
        async with self._swapping:
            target = await asyncio.to_thread(self.registry.verify, name)
            live = self.gate.admission.checkpoint
            if live is None:
                raise ServerError(f"no checkpoint is live ({self.gate.admission.message}); swap when one is")
            self.registry.check_alias(alias, target.ref.name)

            def commit() -> None:
                self.registry.set_live(alias, target.ref.name)

            if live.ref.digest == target.ref.digest and live.ref.name == target.ref.name:
                commit()
                return Swapped(live=target.ref, pause_s=0.0)
            try:
                pause_s = await swap_weights(self.gate, self.upstream, target, commit, self._limits)
            except RollbackError:
                self._is_broken.set()
                raise
            if target.manifest.canary is None:
                self._warn(f"checkpoint {target.ref.name} has no canary, so the swap to it was not verified")
            return Swapped(live=target.ref, pause_s=pause_s)

    def _say(self, message: str) -> None:
        self.gate.admission.message = message
        self._progress(message)

    def _warn(self, message: str) -> None:
        if message not in self.warnings:
            self.warnings.append(message)
            self._progress(f"warning: {message}")


def _first_line(error: Exception) -> str:
    """The sentence; what follows it is the log's end."""
    return str(error).splitlines()[0]
