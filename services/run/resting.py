"""Servers at rest while a command needs their GPUs for training; the command's side of services/gateway/fleet/rest.py.

Model: the lease is renewed while the block runs. Whatever ends the command ends the renewals, and a lease later the servers
come back by themselves, if the next command did not have them wake before.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from vcot.pipeline.errors import VcotError
from vcot.pipeline.report import Report, Said, aside
from vcot.services.gateway import admin
from vcot.services.gateway.admin import Wanted
from vcot.services.run.gateways import Gateway

_RENEWALS = 4
"""In the time of a lease, so that one that is lost does no harm."""


@contextlib.asynccontextmanager
async def at_rest(gateway: Gateway, report: Report) -> AsyncIterator[None]:
    """Have the servers that are up rest during the block as the recipe says; none is started for that."""
    way, url = gateway.wanted_rest, gateway.find()
    if way is None or url is None:
        yield
        return
    async with resting(url, way, report):
        yield


@contextlib.asynccontextmanager
async def resting(url: str, way: Wanted, report: Report, *, lease_s: float = 60.0) -> AsyncIterator[None]:
    """Have the servers behind the gateway at `url` rest during the block, and serve again after it, verified.

    Where the block fails they come back when the lease is over. Raises SwapError, ServerError.
    """
    rested = await admin.rest(url, way, lease_s)
    if not rested.is_any:
        yield
        return
    ways = ", ".join(f"{name} ({how})" for name, how in rested.ways.items() if how != "keep")
    report(Said(f"at rest while this trains: {ways}"))
    over = asyncio.Event()
    renewing = asyncio.create_task(_renew(url, way, lease_s, over))
    try:
        yield
    finally:
        over.set()
        await renewing
    with aside(report, "serve", "back from the rest, by way of the canary"):
        await admin.wake(url)


async def _renew(url: str, way: Wanted, lease_s: float, over: asyncio.Event) -> None:
    while not over.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(over.wait(), lease_s / _RENEWALS)
            return
        with contextlib.suppress(VcotError):  # it is down, or busy; the next time, or at the end
            await admin.rest(url, way, lease_s)
