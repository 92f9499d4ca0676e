"""Whether a request may go to a replica now: a pure state machine.

    loading ──> live ──> draining ──> swapping ──> live
       ^          │          │            │
       └── dead <─┴──────────┴────────────┘        (and loading ──> dead)

    swapping <──> resting                           asleep, with the weights that it had; may die of it
    loading, dead ──> resting ──> loading           stopped on purpose

A request that was admitted belongs to the weights that were live then, and they change only when no request is left, so
no answer mixes weights. Adapters come and go beside the checkpoint while it is live. No clock, no event loop:
services/gateway/fleet/gate.py waits.

An engine that goes live with its caches empty is not given all that waited at once: vLLM's API and its engine keep track of
images apart, and lose step when hundreds of new ones come together ("Multi-modal cache miss"). As in TCP's slow start
(RFC 5681), `_FIRST` requests go in, and two for each that leaves, until nobody needs to wait.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from vcot.services.checkpoints.registry import Checkpoint

Phase = Literal["loading", "live", "draining", "swapping", "resting", "dead"]

_NEXT: dict[Phase, tuple[Phase, ...]] = {
    "loading": ("live", "dead", "resting"),
    "live": ("draining", "dead"),
    "draining": ("swapping", "live", "dead"),
    "swapping": ("live", "dead", "resting"),
    "resting": ("swapping", "loading", "dead"),
    "dead": ("loading", "resting"),
}

_FIRST = 8
_MAX_RAMP = 256
"""At so many at once the ramp is over; `serve.max_in_flight` by default."""


@dataclass
class Admission:
    """Mutated by one Replica only."""

    phase: Phase = "loading"
    checkpoint: Checkpoint | None = None
    """Whose weights the engine holds, as far as is verified; None while nothing is."""
    adapters: dict[str, Checkpoint] = field(default_factory=dict)
    """Verified on top of them, by digest."""
    message: str = "starting"
    """What is being waited for, or why nothing is served."""
    in_flight: int = 0
    _ramp: int | None = None
    """How many may be in flight while the engine gets its caches back; None for any number."""
    _by_digest: Counter[str] = field(default_factory=Counter)

    def serves(self, digest: str) -> bool:
        """Whether a request for that checkpoint is answered here."""
        if self.phase != "live" or self.checkpoint is None:
            return False
        return digest == self.checkpoint.ref.digest or digest in self.adapters

    @property
    def is_ramping(self) -> bool:
        """Whether the number of requests is held down."""
        return self._ramp is not None

    @property
    def has_room(self) -> bool:
        """Whether one more may go in now."""
        return self._ramp is None or self.in_flight < self._ramp

    def end_ramp(self) -> None:
        """Let any number in."""
        self._ramp = None

    @property
    def served(self) -> list[Checkpoint]:
        """What may be asked for."""
        return [self.checkpoint, *self.adapters.values()] if self.phase == "live" and self.checkpoint else []

    @property
    def is_changing(self) -> bool:
        """Whether waiting may help."""
        return self.phase in ("draining", "swapping")

    @property
    def is_drained(self) -> bool:
        """Whether a swap that waits for requests may begin."""
        return self.phase == "draining" and self.in_flight == 0

    def asked_for(self, digest: str) -> int:
        """Requests in flight on that checkpoint."""
        return self._by_digest[digest]

    def move(
        self, phase: Phase, message: str, checkpoint: Checkpoint | None = None, adapters: Iterable[Checkpoint] = ()
    ) -> None:
        """Go on to `phase`. With `checkpoint`, that one and `adapters` were verified; `live` without one resumes.

        A step that is not drawn above is a bug.
        """
        if phase not in _NEXT[self.phase]:
            raise RuntimeError(f"the engine cannot go from {self.phase} to {phase}")
        if phase == "swapping" and self.in_flight:
            raise RuntimeError(f"a swap cannot begin with {self.in_flight} requests in flight")
        if phase == "dead":
            self.checkpoint, self.adapters = None, {}
        elif checkpoint is not None:
            self.checkpoint, self.adapters = checkpoint, {adapter.ref.digest: adapter for adapter in adapters}
        if phase == "live" and self.checkpoint is None:
            raise RuntimeError("the engine cannot go live without a checkpoint")
        if phase == "live" and self.phase != "draining":  # with empty caches
            self._ramp = _FIRST
        elif phase != "draining":
            self._ramp = None
        self.phase, self.message = phase, message

    def rename(self, checkpoint: Checkpoint) -> None:
        """If these weights are held, know them by this name and directory from now on."""
        if self.checkpoint is not None and self.checkpoint.ref.digest == checkpoint.ref.digest:
            self.checkpoint = checkpoint

    def admit(self, digest: str) -> None:
        """Count a request in."""
        if not self.serves(digest):
            raise RuntimeError(f"no request for {digest[:19]} is admitted while {self.phase}")
        self.in_flight += 1
        self._by_digest[digest] += 1

    def leave(self, digest: str) -> None:
        """Count it out."""
        if self._by_digest[digest] < 1:
            raise RuntimeError("a request left that was not admitted")
        self.in_flight -= 1
        self._by_digest[digest] -= 1
        if self._ramp is not None:
            self._ramp = self._ramp + 1 if self._ramp < _MAX_RAMP else None
