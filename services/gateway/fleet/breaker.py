"""A circuit breaker (Nygard, Release It!, 2007): stop asking what keeps failing, and try again with one request at a time.

    closed ── max_failures in a row ──> open ── cooldown over ──> half-open ── success ──> closed
                                          ^                          │
                                          └── failure, cooldown x 2 ─┘

Pure but for the clock, which is handed in. It counts faults of a server, not answers that refuse a request.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

BreakerState = Literal["closed", "half-open", "open"]


@dataclass
class Breaker:
    """Mutated by one Replica only."""

    max_failures: int = 5
    first_cooldown_s: float = 1.0
    max_cooldown_s: float = 60.0
    clock: Callable[[], float] = time.monotonic
    _failures: int = 0
    _cooldown_s: float = 0.0
    _open_until: float | None = None
    """When the cooldown is over; None while closed."""
    _is_on_trial: bool = False

    @property
    def state(self) -> BreakerState:
        """What it would do with a request now."""
        if self._open_until is None:
            return "closed"
        return "half-open" if self.clock() >= self._open_until else "open"

    @property
    def allows(self) -> bool:
        """Whether a request may go through; half-open, one at a time."""
        return self._open_until is None or (not self._is_on_trial and self.clock() >= self._open_until)

    def begin(self) -> None:
        """A request goes through."""
        self._is_on_trial = self._open_until is not None

    def succeed(self) -> None:
        """It was answered."""
        self._failures, self._cooldown_s, self._open_until, self._is_on_trial = 0, 0.0, None, False

    def fail(self) -> None:
        """The server failed it."""
        self._failures += 1
        if self._is_on_trial or (self._open_until is None and self._failures >= self.max_failures):
            self._cooldown_s = min(self.max_cooldown_s, 2 * self._cooldown_s or self.first_cooldown_s)
            self._open_until = self.clock() + self._cooldown_s
        self._is_on_trial = False

    def abandon(self) -> None:
        """It ended without telling anything of the server: its client hung up, say."""
        self._is_on_trial = False
