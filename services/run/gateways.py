"""The gateway that a run's checkpoints are served by: its own, or one that serves already, elsewhere (serve.url).

Model: a step asks `Gateway` and does not know which one it has. The run's own is started when it is first needed, and knows
the run's registry. One elsewhere is never started, rested or steered unasked, and has a registry of its own, which is told
what is to be measured there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from vcot.pipeline.errors import ServerError
from vcot.pipeline.records import CheckpointRef
from vcot.pipeline.report import Report, Said, Warned, aside, waiting
from vcot.pipeline.sections import POLICY_ALIAS
from vcot.services.checkpoints.registry import Checkpoint, CheckpointInfo, Registry
from vcot.services.gateway import admin
from vcot.services.gateway.admin import Wanted
from vcot.services.run.announcement import find_gateway, is_served
from vcot.services.run.directory import Run
from vcot.services.run.serving import GatewayHandle, running_gateway


class Gateway(Protocol):
    """One gateway, before or after it is opened."""

    async def open(self) -> str:
        """Its URL, once it answers. Raises ServerError and what kept it from serving."""

    async def close(self) -> None:
        """Stop what was started here."""

    def find(self) -> str | None:
        """Its URL where it can be had without starting it."""

    @property
    def ends_with_us(self) -> bool:
        """Whether it was started here, and stops with this command."""

    @property
    def wanted_rest(self) -> Wanted | None:
        """What its servers do while this machine trains; None for going on."""

    async def list(self) -> Sequence[CheckpointInfo]:
        """What is registered there."""

    async def show(self, name: str) -> CheckpointInfo:
        """One of them. Raises CheckpointError."""

    async def register(self, directory: Path) -> None:
        """Have it know the checkpoint in `directory`. Raises CheckpointError."""

    async def retire(self, name: str) -> CheckpointRef:
        """Have it forget a checkpoint, whose files stay. Raises CheckpointError."""

    async def introduce(self, checkpoint: Checkpoint) -> None:
        """See that a checkpoint that the run has registered is known by its name there, too."""

    async def read_aliases(self) -> Mapping[str, str] | None:
        """What its aliases mean; None, which is told, where they are not this run's to move."""


@dataclass
class OwnGateway:
    """The run's own, on this machine."""

    run: Run
    registry: Registry
    report: Report
    _handle: GatewayHandle | None = None
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def open(self) -> str:
        """Uses the one that serves the run, or starts one."""
        if self._handle is None:
            is_up = is_served(self.run)
            what = f"{self.run.recipe.model.source} by vLLM, behind the gateway"
            with (
                nullcontext() if is_up else aside(self.report, "serve", what),
                waiting(self.report, "waiting for the server" if is_up else "starting the server") as progress,
            ):
                self._handle = await self._stack.enter_async_context(running_gateway(self.run, progress))
        return self._handle.url

    async def close(self) -> None:
        await self._stack.aclose()

    def find(self) -> str | None:
        return self._handle.url if self._handle else find_gateway(self.run)

    @property
    def ends_with_us(self) -> bool:
        return self._handle is not None and self._handle.started_here

    @property
    def wanted_rest(self) -> Wanted | None:
        way = self.run.recipe.serve.while_training
        return None if way == "keep" else way

    async def list(self) -> Sequence[CheckpointInfo]:
        return [self.registry.describe(checkpoint.ref.name) for checkpoint in self.registry.list()]

    async def show(self, name: str) -> CheckpointInfo:
        return self.registry.describe(name)

    async def register(self, directory: Path) -> None:
        self.registry.register(directory)

    async def retire(self, name: str) -> CheckpointRef:
        return self.registry.retire(name)

    async def introduce(self, checkpoint: Checkpoint) -> None:
        """It reads the run's registry."""

    async def read_aliases(self) -> Mapping[str, str] | None:
        return self.registry.aliases()


@dataclass(frozen=True)
class GatewayElsewhere:
    """One that serves already, perhaps another run, at `serve.url`."""

    url: str
    run: Run
    registry: Registry
    report: Report

    async def open(self) -> str:
        return self.url

    async def close(self) -> None:
        pass

    def find(self) -> str | None:
        return self.url

    @property
    def ends_with_us(self) -> bool:
        return False

    @property
    def wanted_rest(self) -> Wanted | None:
        """Only what the recipe says outright: it may have GPUs of its own."""
        way = self.run.recipe.serve.while_training
        return way if way in ("sleep", "stop") else None

    async def list(self) -> Sequence[CheckpointInfo]:
        return await admin.list_checkpoints(self.url)

    async def show(self, name: str) -> CheckpointInfo:
        return await admin.show_checkpoint(self.url, name)

    async def register(self, directory: Path) -> None:
        await admin.register(self.url, directory)

    async def retire(self, name: str) -> CheckpointRef:
        """There, and in the run's registry, if that has it."""
        ref = await admin.retire(self.url, name)
        if self.registry.find(name) is not None:
            self.registry.retire(name)
        return ref

    async def introduce(self, checkpoint: Checkpoint) -> None:
        if checkpoint.ref.kind != "base":
            await admin.register(self.url, checkpoint.directory)

    async def read_aliases(self) -> Mapping[str, str] | None:
        try:
            state = await admin.fetch_state(self.url)
        except ServerError as error:
            self.report(Warned(f"{POLICY_ALIAS} is left as it was, since {error}; `vcot swap` moves it by hand"))
            return None
        if Path(state.run).resolve() != self.run.directory.resolve():
            self.report(
                Said(f"the gateway at {self.url} serves {state.run}: left as it was; `vcot swap` moves it by hand")
            )
            return None
        return state.aliases


def make_gateway(run: Run, registry: Registry, report: Report) -> Gateway:
    """The one that the recipe means; nothing is opened."""
    if url := run.recipe.serve.url:
        return GatewayElsewhere(url.rstrip("/").removesuffix("/v1"), run, registry, report)
    return OwnGateway(run, registry, report)
