"""What verifying the engines of one kind has shown: how far their log-probs are off, and how they store tensors.

Model: computing in float32, two programs differ by a few millionths of a nat, and a policy may differ from its base, or from
itself with one tensor wrong, by little more; the tolerance that fits any model would pass both. So what an engine was off by
where it was verified sets what the next checkpoint may be off by. In 16 bits the rounding of each checkpoint is another one,
and nearly what is tolerated: nothing is gained there.

Limits: the first checkpoint is held to the tolerance of the type.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vcot.services.gateway.swap.fingerprint import Layout
from vcot.training.protocol.agreement import TOLERANCES
from vcot.training.protocol.train_sections import Dtype

_FACTOR = 4.0
"""The worst log-prob of a canary of nano was off by 1e-7 to 3.1e-6; one matrix rounded to bfloat16 moves it by 2.4e-5."""
_LEAST = 0.01
"""Of the type's tolerance."""


@dataclass
class Calibration:
    """Shared by replicas whose servers are of one kind; mutated by those that verify them."""

    dtype: Dtype
    """What the servers compute in."""
    layout: Layout = field(default_factory=Layout)
    _noise: float | None = None
    """What the first verified answer was off by. Later ones set nothing: a fault that passed would let another pass."""

    @property
    def tolerance(self) -> float:
        """How far a log-prob of the next canary may be off."""
        limit = TOLERANCES[self.dtype]
        if self._noise is None or self.dtype != "float32":
            return limit
        return min(limit, max(_LEAST * limit, _FACTOR * self._noise))

    def saw(self, difference: float) -> None:
        """A verified answer was off by so much."""
        self._noise = difference if self._noise is None else self._noise
