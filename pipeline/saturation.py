"""How many requests to keep in flight at a server of one's own: as many as make it answer more, and no more.

Model: with `limit` requests in flight and `t` seconds each, a server answers limit / t a second (Little's law), wherever in
it they wait: in the gateway's queue, in vLLM's, or in its batch. So the measured times say how much is answered, and a queue
shows as times that grow as fast as the limit. The limit is doubled at first, as long as that gives nearly twice the answers.
From then on it is tried GROWTH times higher, and kept where that gives at least GAIN times the answers; else it goes back.
From time to time a lower one is tried, and kept where it costs at most LOSS, and then a higher one again, since servers and
their other clients change. At 429 and 503 it shrinks at once.

Bounds: with a server that answers no more beyond a knee of K requests, at most 2.7 K + 2 (and twice the first limit) are in
flight while it is looked for. Requests should be alike; those of one stage are. A paid API is kept to its pace by
pipeline/pacing.py.

Pure: times are handed in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

GROWTH = 1.5
GAIN = 1.08
"""What a higher limit must give, and its square a doubled one."""
LOSS = 1.04
"""What a lower one may cost."""
_CLIMB = 2.0
"""How much higher each limit is at first."""
_NEARLY = 1.5
"""What it must give to be doubled again, and to need fewer requests to be measured."""
_SHRINK = 0.7
_MIN_MEASURED = 24
_MIN_CLIMBING = 8
_NUM_HELD = 16
"""Measurements between two trials, once a higher limit has been tried in vain: trials cost some 2 % of the answers."""


@dataclass
class Saturation:
    """How many may be in flight. Mutated by the stage that made it."""

    ceiling: int
    first: int = 8
    """The limit to begin with."""
    limit: int = field(init=False)
    _since: float = float("-inf")
    """When the limit was set: requests that began before say nothing of it."""
    _num_skipped: int = 0
    """Of those that began since, while the server came to its new pace."""
    _times: list[float] = field(default_factory=list)
    _trial: Literal["higher", "lower", None] = None
    _before: tuple[int, float] = (0, 0.0)
    """During a trial: the limit that is left, and how much it gave."""
    _num_held: int = _NUM_HELD
    """Measurements since the last trial in vain; the first trial does not wait."""
    _next: Literal["higher", "lower"] = "higher"
    _is_climbing: bool = True

    def __post_init__(self) -> None:
        self.limit = min(self.first, self.ceiling)

    def note(self, began: float, ended: float) -> None:
        """A request was answered."""
        if began < self._since:
            return
        if self._num_skipped < self.limit:
            self._num_skipped += 1
            return
        self._times.append(ended - began)
        if len(self._times) >= (
            max(_MIN_CLIMBING, self.limit // 2) if self._is_climbing else max(_MIN_MEASURED, self.limit)
        ):
            self._decide(self.limit * len(self._times) / max(sum(self._times), 1e-9), ended)

    def shrink(self, began: float, now: float) -> None:
        """The server had no room for a request that began then. Others of the same burst say nothing new."""
        if began >= self._since:
            self._trial, self._num_held, self._next, self._is_climbing = None, 0, "higher", False
            self._set(max(1, math.floor(self.limit * _SHRINK)), now)

    def _decide(self, rate: float, now: float) -> None:
        """`rate` answers a second were measured at the present limit."""
        trial, (limit, before) = self._trial, self._before
        self._trial, needed = None, GAIN**2 if self._is_climbing else GAIN
        self._is_climbing = self._is_climbing and (trial is None or rate >= _NEARLY * before)
        if trial is None:
            self._num_held += 1
            self._try(rate, now)
        elif trial == "higher" and rate >= needed * before:
            self._num_held = _NUM_HELD
            self._try(rate, now)
        elif trial == "lower" and rate * LOSS >= before:
            self._num_held = _NUM_HELD
            self._next = "lower"
            self._try(rate, now)
        else:
            self._num_held = 0
            self._next = "lower" if trial == "higher" else "higher"
            self._set(limit, now)

    def _try(self, rate: float, now: float) -> None:
        """Another limit, where it is time for one and there is room; else the same is measured again."""
        self._times.clear()
        if self._num_held < _NUM_HELD:
            return
        growth = _CLIMB if self._is_climbing else GROWTH
        grown, shrunk = min(self.ceiling, math.ceil(self.limit * growth)), max(1, math.floor(self.limit / GROWTH))
        other = grown if self._next == "higher" else shrunk
        if other == self.limit:
            self._num_held, self._next = 0, "lower" if self._next == "higher" else "higher"
            return
        self._trial, self._before = self._next, (self.limit, rate)
        self._set(other, now)

    def _set(self, limit: int, now: float) -> None:
        self.limit, self._since, self._num_skipped = limit, now, 0
        self._times.clear()
