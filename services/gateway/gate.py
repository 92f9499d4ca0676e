"""The gate that requests go through: it waits on their behalf while a swap is on.

Model: one event loop, one Admission; whoever waits is woken at every change and looks again. Requests in flight when the
engine dies leave by themselves, since their connections break.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from pipeline.errors import ServerError, SwapError
from services.checkpoints import Checkpoint
from services.gateway.admission import Admission, Phase


class Gate:
    """Admits requests, and holds them back during a swap."""

    def __init__(self) -> None:
        self.admission = Admission()
        self._changed = asyncio.Event()

    @asynccontextmanager
    async def admitted(self, max_wait_s: float) -> AsyncIterator[Checkpoint]:
        """Wait for a live engine, at most `max_wait_s`; the checkpoint stays live until the block ends.

        Raises ServerError where nothing is served, or the wait was too long.
        """
        await self.wait_for(lambda: self.admission.verdict != "wait", max_wait_s)
        if self.admission.verdict != "admit":
            raise self._nothing_live()
        checkpoint = self.admission.admit()
        try:
            yield checkpoint
        finally:
            self.admission.leave()
            if self.admission.is_drained:
                self._wake()

    async def drain(self, message: str, max_wait_s: float) -> None:
        """Admit no new request and wait until none is in flight, then begin to swap.

        Raises SwapError, live as before, where requests take longer; ServerError where nothing was live, or it died.
        """
        if not self._is_in("live"):
            raise self._nothing_live()
        self.move("draining", message)
        try:
            await self.wait_for(lambda: not self._is_in("draining") or self.admission.is_drained, max_wait_s)
            if not self._is_in("draining"):
                raise self._nothing_live()
            if not self.admission.is_drained:
                raise SwapError(f"{self.admission.in_flight} requests were still in flight after {max_wait_s:.0f} s")
        except BaseException:
            if self._is_in("draining"):
                self.move("live", "")
            raise
        self.move("swapping", message)

    def move(self, phase: Phase, message: str, checkpoint: Checkpoint | None = None) -> None:
        """Change the phase and wake whoever waits."""
        self.admission.move(phase, message, checkpoint)
        self._wake()

    async def wait_for(self, is_so: Callable[[], bool], max_wait_s: float) -> None:
        """Return when `is_so`, looking at every change, or when `max_wait_s` are over."""
        try:
            async with asyncio.timeout(max_wait_s):
                while not is_so():
                    await self._changed.wait()
        except TimeoutError:
            return

    def _is_in(self, phase: Phase) -> bool:
        return self.admission.phase == phase

    def _nothing_live(self) -> ServerError:
        return ServerError(f"no checkpoint is live ({self.admission.phase}: {self.admission.message}); try again later")

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
