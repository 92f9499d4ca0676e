"""Asking a checkpoint that is not live: the gateway has it on trial meanwhile, and no alias moves."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TypeVar

from vcot.pipeline.bearer import read_key
from vcot.pipeline.client import ChatClient
from vcot.pipeline.errors import CheckpointError, OnTrialError, RequestError, StageError, VcotError
from vcot.pipeline.report import Report, Said, Warned
from vcot.services.checkpoints.registry import Checkpoint, Registry
from vcot.services.gateway.admin import end_trial, fetch_state, try_out
from vcot.services.recipes.recipe import Recipe
from vcot.services.run.gateways import Gateway

T = TypeVar("T")
_MAX_TRIALS = 5
"""How often a checkpoint is put on trial again, where others end that."""
API_KEY_ENV = "VCOT_API_KEY"
"""Holds one of the keys that the gateway knows as VCOT_API_KEYS, where it has any."""


@dataclass(frozen=True)
class Trials:
    """One command's measurements over one gateway."""

    gateway: Gateway
    registry: Registry
    recipe: Recipe
    report: Report
    poll_s: float = 2.0
    """How often it is asked whether another command's trial is over."""
    owner: str = field(default_factory=lambda: secrets.token_hex(8))
    """What this command is to the gateway."""

    async def list_served(self) -> set[str]:
        """The digests of what answers now. Raises ServerError where nothing does."""
        state = await fetch_state(await self.gateway.open())
        return {ref.digest for replica in state.replicas for ref in replica.serves}

    async def measure(self, checkpoint: Checkpoint, ask: Callable[[ChatClient], Awaitable[T]]) -> T:
        """What `ask` finds with a client for which `checkpoint`, registered or not, is served under its name and digest.

        The gateway serves what was live afterwards. Where another command measures another checkpoint there, this waits for
        it. A trial that others end, as by a swap, is begun again; `ask` is then called again, so it must do what is left.
        Raises RequestError or AccountError where that goes on.
        """
        url = await self.gateway.open()
        for num_left in reversed(range(_MAX_TRIALS)):
            try:
                async with self._on_trial(url, checkpoint):
                    return await self._with_client(url, ask)
            except (RequestError, StageError) as error:
                fault = error if isinstance(error, RequestError) else error.__cause__
                if not num_left or not isinstance(fault, RequestError) or fault.reason not in ("checkpoint", "model"):
                    raise
                self.report(Warned(f"{checkpoint.ref.name} is not served any more ({fault}); it is put on trial again"))
        raise AssertionError("the last turn returns or raises")

    @asynccontextmanager
    async def _on_trial(self, url: str, checkpoint: Checkpoint) -> AsyncIterator[None]:
        ref, is_left = checkpoint.ref, True
        is_known = ref.kind == "base" or self.registry.find(ref.name) is not None
        if is_known:
            await self.gateway.introduce(checkpoint)
        try:
            await self._begin(url, checkpoint, is_known=is_known)
            yield
        except asyncio.CancelledError:
            is_left = not self.gateway.ends_with_us
            raise
        finally:
            # Also where this was stopped while the gateway was at it: what it then has on trial would keep others waiting.
            with suppress(VcotError):  # a gateway that is gone has no trial; one that hangs ends it by itself
                if is_left:
                    await end_trial(url, self.owner)

    async def _begin(self, url: str, checkpoint: Checkpoint, *, is_known: bool) -> None:
        """Have it on trial, after the trials of others. Raises CheckpointError where its name means other weights there."""
        ref, is_told = checkpoint.ref, False
        while True:
            try:
                tried = await try_out(url, ref.name if is_known else checkpoint.directory, self.owner)
                break
            except OnTrialError as error:
                if not is_told:
                    self.report(Said(f"at {url} {error}; {ref.name} has to wait for its end"))
                    is_told = True
                await asyncio.sleep(self.poll_s)
        if tried.live.digest != ref.digest:
            raise CheckpointError(
                f"{ref.name} is {tried.live.digest[:19]} at {url}, and {ref.digest[:19]} in {checkpoint.directory}; use a "
                "gateway of the same model (serve.url)"
            )
        if tried.way != "none":
            self.report(Said(f"{ref.name} is on trial at {url} ({tried.way}) after a pause of {tried.pause_s:.2f} s"))

    async def _with_client(self, url: str, ask: Callable[[ChatClient], Awaitable[T]]) -> T:
        concurrency = max(self.recipe.sample.max_concurrency, self.recipe.eval.max_concurrency)
        async with ChatClient(f"{url}/v1", read_gateway_key(), max_connections=concurrency, is_own=True) as client:
            return await ask(client)


def read_gateway_key() -> str:
    """The key for the gateway, where the environment holds one. Raises MachineError for one that cannot be sent."""
    return read_key(API_KEY_ENV) or "none"
