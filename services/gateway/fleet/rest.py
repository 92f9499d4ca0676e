"""A fleet at rest while something else, as the trainer, needs its GPUs; it comes back verified.

    admit no new request, drain those in flight -> sleep, or stop -> (the lease is renewed) -> wake, or start
    -> reset the prefix, multimodal and encoder caches -> ask the canary -> admit

A request that comes meanwhile is told so (503 `resting`). The rest ends when its owner says so, with the next swap or trial,
and when the lease is over. What does not wake as it slept is started anew, and what dies asleep stays down until then.

Limits: nothing is recorded: a gateway that is started anew wakes its servers, until the owner's next renewal puts them to
rest again.
"""

from __future__ import annotations

import asyncio
import time

from vcot.pipeline.errors import ServerError, VcotError
from vcot.services.gateway.admin import RestWay, Wanted
from vcot.services.gateway.fleet.group import Fleet
from vcot.services.gateway.fleet.lease import Lease, choose_rest


async def rest(fleet: Fleet, wanted: Wanted, lease_s: float) -> dict[str, RestWay]:
    """Have the servers rest for `lease_s`, or so much longer where they do already; how each rests.

    Raises SwapError and ServerError, with all of them serving as before.
    """
    if fleet.lease is None:
        async with fleet.steered():
            if fleet.lease is None:
                await _lie_down(fleet, wanted)
    if fleet.lease is not None:
        fleet.lease.renew(time.monotonic(), lease_s)
    return {replica.name: replica.resting or "keep" for replica in fleet.replicas}


async def _lie_down(fleet: Fleet, wanted: Wanted) -> None:
    ways = {
        replica: choose_rest(
            wanted, replica.name, is_ours=replica.url is None, can_sleep=fleet.can_sleep or replica.url is not None
        )
        for replica in fleet.replicas
    }
    goers = [replica.rest(way, fleet.limits.drain_s) for replica, way in ways.items() if way != "keep"]
    if not goers:
        return
    fleet.lease = Lease(ends=0.0)
    try:
        for fault in await asyncio.gather(*goers, return_exceptions=True):
            if isinstance(fault, BaseException):
                raise fault
    except BaseException:
        await end_rest(fleet)
        raise


async def wake(fleet: Fleet) -> None:
    """End the rest. Raises ServerError where no server comes back."""
    async with fleet.steered():
        await end_rest(fleet)


async def end_rest(fleet: Fleet) -> None:
    """The same for whoever steers the fleet already."""
    if fleet.lease is None:
        return
    fleet.lease = None
    rested = [replica for replica in fleet.replicas if replica.resting]
    await asyncio.gather(*(replica.wake() for replica in rested))
    if rested and not any(replica.gate.admission.phase == "live" for replica in fleet.replicas):
        raise ServerError(f"no server came back from its rest: {rested[0].failure}")


async def end_forgotten_rests(fleet: Fleet, poll_s: float = 1.0) -> None:
    """Wake what nobody asks to rest any more, since its owner was killed; until cancelled."""
    while True:
        await asyncio.sleep(poll_s)
        if fleet.lease is None or not fleet.lease.is_over(time.monotonic()):
            continue
        async with fleet.steered():
            if fleet.lease is None or not fleet.lease.is_over(time.monotonic()):
                continue
            fleet.warn("the servers were woken, since whoever had them rest asks for it no more")
            try:
                await end_rest(fleet)
            except VcotError as error:
                fleet.warn(str(error))
