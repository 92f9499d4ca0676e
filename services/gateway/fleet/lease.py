"""Who rests how, and for how long. Pure.

A server rests while something else needs its GPU: it sleeps (vLLM's sleep mode, level 1: the weights go to the machine's
memory, keys and values are dropped), or is stopped. Whoever asked for it says so again before the lease is over; killed, it
does not, and the servers come back.
"""

from __future__ import annotations

from dataclasses import dataclass

from vcot.pipeline.errors import SwapError
from vcot.services.gateway.admin import RestWay, Wanted


@dataclass
class Lease:
    """Until when servers rest; monotonic seconds. Mutated by services/gateway/fleet/rest.py only."""

    ends: float

    def renew(self, now: float, lease_s: float) -> None:
        """Rest on; never for less than before."""
        self.ends = max(self.ends, now + lease_s)

    def is_over(self, now: float) -> bool:
        """Whether nobody asked for more."""
        return now >= self.ends


def choose_rest(wanted: Wanted, name: str, *, is_ours: bool, can_sleep: bool) -> RestWay:
    """How replica `name` rests; one that someone else started can only sleep. Raises SwapError where it cannot as wanted."""
    if wanted == "stop" and is_ours:
        return "stop"
    if can_sleep:
        return "sleep"
    if wanted == "auto":
        return "keep"
    raise SwapError(
        f"{name} cannot sleep: it runs on a CPU, or was started with serve.while_training = stop or keep; "
        "set that to stop or keep here, too"
    )
