"""Whether a server that is up still works: asked every few seconds, and judged by what it says. Pure but for `watch`.

A server is down when nothing listens where it was; when it does not answer /health a few times in a row; when its process is
another than the one that was verified, whose weights are anyone's guess; when it says that it holds other weights than it
was told, or belongs to another gateway (claim.py); and when it hangs: requests are in flight, it answers /health, and its
token counters stand still.

Limits: a server that generates for some requests while others of its own are stuck passes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from vcot.pipeline.errors import ServerError
from vcot.services.gateway.fleet.upstream import Pulse, Upstream
from vcot.services.gateway.swap.claim import DisownedError

HEALTH_INTERVAL_S = 5.0
_MAX_SILENT = 3


@dataclass
class Health:
    """What was seen of one life of a server. Mutated by its `watch` only."""

    hang_timeout_s: float
    _silent: int = 0
    _last: Pulse | None = None
    _moved_at: float = 0.0

    def fault(self, now: float, in_flight: int, pulse: Pulse | None) -> str | None:
        """What is wrong, if anything is, now that it answered with `pulse` (None: not in time)."""
        if pulse is None:
            self._silent += 1
            return f"did not answer /health {_MAX_SILENT} times in a row" if self._silent >= _MAX_SILENT else None
        last, self._last, self._silent = self._last, pulse, 0
        if last is not None and pulse.started != last.started:
            return "was started anew by someone else"
        if last is None or not in_flight or pulse.num_tokens is None or pulse.num_tokens != last.num_tokens:
            self._moved_at = now
        if now - self._moved_at >= self.hang_timeout_s:
            return f"made no token in {now - self._moved_at:.0f} s with {in_flight} requests in flight"
        return None


async def watch(
    upstream: Upstream, in_flight: Callable[[], int], health: Health, interval_s: float = HEALTH_INTERVAL_S
) -> ServerError:
    """Ask until something is wrong; what."""
    while True:
        try:
            pulse = await upstream.pulse()
        except ServerError as error:
            return error
        if fault := health.fault(time.monotonic(), in_flight(), pulse):
            return ServerError(f"vLLM {fault}")
        try:
            await upstream.claim.renew()
        except DisownedError as error:
            return error
        except ServerError:
            pass  # not in time, as while it loads: the claim lapses by itself
        await asyncio.sleep(interval_s)
