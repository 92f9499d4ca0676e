"""Whether a request may go to the engine now: a pure state machine.

    loading ──> live ──> draining ──> swapping ──> live
       ^          │          │            │
       └── dead <─┴──────────┴────────────┘        (and loading ──> dead)

A request that was admitted belongs to the checkpoint that was live then, and a swap begins only when none is left, so
no answer mixes weights. No clock, no event loop: services/gateway/gate.py waits on behalf of requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from services.checkpoints import Checkpoint

Phase = Literal["loading", "live", "draining", "swapping", "dead"]
Verdict = Literal["admit", "wait", "refuse"]

_NEXT: dict[Phase, tuple[Phase, ...]] = {
    "loading": ("live", "dead"),
    "live": ("draining", "dead"),
    "draining": ("swapping", "live", "dead"),
    "swapping": ("live", "dead"),
    "dead": ("loading",),
}
_VERDICTS: dict[Phase, Verdict] = {
    "loading": "refuse",
    "live": "admit",
    "draining": "wait",
    "swapping": "wait",
    "dead": "refuse",
}


@dataclass
class Admission:
    """Mutated by one Gate only."""

    phase: Phase = "loading"
    checkpoint: Checkpoint | None = None
    """Whose weights the engine holds, as far as is verified; None while nothing is."""
    in_flight: int = 0
    message: str = "starting"
    """What is being waited for, or why nothing is served."""

    @property
    def verdict(self) -> Verdict:
        """What to do with a request that arrives now."""
        return _VERDICTS[self.phase]

    @property
    def is_drained(self) -> bool:
        """Whether a swap that waits for requests may begin."""
        return self.phase == "draining" and self.in_flight == 0

    def move(self, phase: Phase, message: str, checkpoint: Checkpoint | None = None) -> None:
        """Go on to `phase`; `live` needs the checkpoint that was verified. A step that is not drawn above is a bug."""
        if phase not in _NEXT[self.phase]:
            raise RuntimeError(f"the engine cannot go from {self.phase} to {phase}")
        if phase == "swapping" and self.in_flight:
            raise RuntimeError(f"a swap cannot begin with {self.in_flight} requests in flight")
        if phase == "live":
            self.checkpoint = checkpoint or self.checkpoint
            if self.checkpoint is None:
                raise RuntimeError("the engine cannot go live without a checkpoint")
        elif phase == "dead":
            self.checkpoint = None
        self.phase, self.message = phase, message

    def admit(self) -> Checkpoint:
        """Count a request in; the checkpoint that answers it."""
        if self.phase != "live" or self.checkpoint is None:
            raise RuntimeError(f"no request is admitted while {self.phase}")
        self.in_flight += 1
        return self.checkpoint

    def leave(self) -> None:
        """Count it out."""
        if self.in_flight < 1:
            raise RuntimeError("a request left that was not admitted")
        self.in_flight -= 1
