"""Waiting on a replica's behalf: for its requests to end before a swap, and for any replica to become what is needed.

Model: one event loop; whoever waits is woken at every change of any replica and looks again; requests wait in a line
(line.py), so that one looks at a time. A drain lets those in first whom the ramp still holds back: a request that waited for
one swap is not met by the next. Requests in flight when an engine dies leave by themselves, since their connections break.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

from vcot.pipeline.errors import ServerError, SwapError
from vcot.services.checkpoints.registry import Checkpoint
from vcot.services.gateway.fleet.admission import Admission, Phase
from vcot.services.gateway.fleet.line import Line

T = TypeVar("T")
MAX_RAMP_S = 5.0
"""Long answers tell late that an engine has got its caches back; it is not held back for longer."""


class Changes:
    """Wakes whoever waits for something to change; one for a fleet."""

    def __init__(self) -> None:
        self.line = Line(self._wake)
        """Of the requests that wait; that one leaves it is a change, too, but not for the others."""
        self._event = asyncio.Event()

    def notify(self) -> None:
        """Something changed."""
        self._wake()
        self.line.look()

    def _wake(self) -> None:
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

    def __init__(self, changes: Changes, max_ramp_s: float = MAX_RAMP_S) -> None:
        self.admission = Admission()
        self._changes = changes
        self._max_ramp_s = max_ramp_s
        self._ramp_end: asyncio.TimerHandle | None = None

    def admit(self, digest: str) -> None:
        """Count a request in; `leave` must follow."""
        self.admission.admit(digest)

    def leave(self, digest: str) -> None:
        """Count it out, and wake who waits for that."""
        is_ramping = self.admission.is_ramping
        self.admission.leave(digest)
        if is_ramping:
            self._changes.line.look()
        if self.admission.is_drained or not self.admission.asked_for(digest):
            self._changes.notify()

    async def drain(self, message: str, max_wait_s: float) -> float:
        """Admit no new request and wait until none is in flight, then begin to swap; since when none was, monotonic.

        Raises SwapError, live as before, where requests take longer; ServerError where nothing was live, or it died.
        """
        if self.admission.is_ramping:
            line = self._changes.line
            came_before = line.waiting
            await self._changes.wait_for(lambda: came_before.isdisjoint(line.waiting), self._max_ramp_s + 1.0)
        if not self._is_in("live"):
            raise self._nothing_live()
        began = time.monotonic()
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
        return began

    def move(
        self, phase: Phase, message: str, checkpoint: Checkpoint | None = None, adapters: Iterable[Checkpoint] = ()
    ) -> None:
        """Change the phase."""
        self.admission.move(phase, message, checkpoint, adapters)
        if self._ramp_end is not None:
            self._ramp_end.cancel()
            self._ramp_end = None
        if self.admission.is_ramping:
            self._ramp_end = asyncio.get_running_loop().call_later(self._max_ramp_s, self._end_ramp)
        self._changes.notify()

    def _end_ramp(self) -> None:
        self.admission.end_ramp()
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


async def first_of(*ends: Awaitable[T]) -> T:
    """What the one that ends first gives; the others are cancelled."""
    tasks = [asyncio.ensure_future(end) for end in ends]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return next(task.result() for task in tasks if task.done())
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
