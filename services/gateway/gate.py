"""Waiting on a replica's behalf: for its requests to end before a swap, and for any replica to become what is needed.

Model: one event loop; whoever waits is woken at every change of any replica and looks again. Requests in flight when an
engine dies leave by themselves, since their connections break.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from pipeline.errors import ServerError, SwapError
from services.checkpoints import Checkpoint
from services.gateway.admission import Admission, Phase


class Changes:
    """Wakes whoever waits for something to change; one for a fleet."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify(self) -> None:
        """Something changed."""
        self._event.set()
        self._event = asyncio.Event()

    async def wait_for(self, is_so: Callable[[], bool], max_wait_s: float | None) -> None:
        """Return when `is_so`, looking at every change, or when `max_wait_s` (if any) are over."""
        try:
            async with asyncio.timeout(max_wait_s):
                while not is_so():
                    await self._event.wait()
        except TimeoutError:
            return


class Gate:
    """One replica's admission, whose changes are told."""

    def __init__(self, changes: Changes) -> None:
        self.admission = Admission()
        self._changes = changes

    def admit(self, digest: str) -> None:
        """Count a request in; `leave` must follow."""
        self.admission.admit(digest)

    def leave(self, digest: str) -> None:
        """Count it out, and wake who waits for that."""
        self.admission.leave(digest)
        if self.admission.is_drained or not self.admission.asked_for(digest):
            self._changes.notify()

    async def drain(self, message: str, max_wait_s: float) -> None:
        """Admit no new request and wait until none is in flight, then begin to swap.

        Raises SwapError, live as before, where requests take longer; ServerError where nothing was live, or it died.
        """
        if not self._is_in("live"):
            raise self._nothing_live()
        self.move("draining", message)
        try:
            await self._changes.wait_for(lambda: not self._is_in("draining") or self.admission.is_drained, max_wait_s)
            if not self._is_in("draining"):
                raise self._nothing_live()
            if not self.admission.is_drained:
                raise SwapError(f"{self.admission.in_flight} requests were still in flight after {max_wait_s:.0f} s")
        except BaseException:
            if self._is_in("draining"):
                self.move("live", "")
            raise
        self.move("swapping", message)

    def move(
        self, phase: Phase, message: str, checkpoint: Checkpoint | None = None, adapters: Iterable[Checkpoint] = ()
    ) -> None:
        """Change the phase."""
        self.admission.move(phase, message, checkpoint, adapters)
        self._changes.notify()

    def put_adapter(self, adapter: Checkpoint) -> None:
        """Let requests for a verified adapter in."""
        self.admission.adapters[adapter.ref.digest] = adapter
        self._changes.notify()

    async def drop_adapter(self, adapter: Checkpoint, max_wait_s: float) -> bool:
        """Admit no new request for it; whether those in flight ended in time."""
        digest = adapter.ref.digest
        self.admission.adapters.pop(digest, None)
        self._changes.notify()
        await self._changes.wait_for(lambda: not self.admission.asked_for(digest), max_wait_s)
        return not self.admission.asked_for(digest)

    def _is_in(self, phase: Phase) -> bool:
        return self.admission.phase == phase

    def _nothing_live(self) -> ServerError:
        return ServerError(f"no checkpoint is live ({self.admission.phase}: {self.admission.message}); try again later")
