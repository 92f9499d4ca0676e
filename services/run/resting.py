"""Servers at rest while a command needs their GPUs for training; the command's side of services/gateway/fleet/rest.py.

Model: the lease is renewed while the block runs. Whatever ends the command ends the renewals, and a lease later the servers
come back by themselves, if the next command did not have them wake before.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from pipeline.errors import VcotError
from pipeline.recipe import ServeSection
from pipeline.report import Report, Said, aside
from services.gateway import admin
from services.gateway.admin import Wanted

_LEASE_S = 60.0
_RENEWALS = 4
"""In the time of a lease, so that one that is lost does no harm."""


def wanted_rest(serve: ServeSection) -> Wanted | None:
    """What is asked of the gateway; None for nothing. One elsewhere rests only where the recipe says so."""
    if serve.while_training == "keep" or (serve.while_training == "auto" and serve.url is not None):
        return None
    return serve.while_training


@contextlib.asynccontextmanager
async def resting(url: str, way: Wanted, report: Report) -> AsyncIterator[None]:
    """Have the servers behind the gateway at `url` rest during the block, and serve again after it, verified.

    Where the block fails they come back when the lease is over. Raises SwapError, ServerError.
    """
    rested = await admin.rest(url, way, _LEASE_S)
    if not rested.is_any:
        yield
        return
    ways = ", ".join(f"{name} ({how})" for name, how in rested.ways.items() if how != "keep")
    report(Said(f"at rest while this trains: {ways}"))
    over = asyncio.Event()
    renewing = asyncio.create_task(_renew(url, way, over))
    try:
        yield
    finally:
        over.set()
        await renewing
    with aside(report, "serve", "back from the rest, by way of the canary"):
        await admin.wake(url)


async def _renew(url: str, way: Wanted, over: asyncio.Event) -> None:
    while not over.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(over.wait(), _LEASE_S / _RENEWALS)
            return
        with contextlib.suppress(VcotError):  # it is down, or busy; the next time, or at the end
            await admin.rest(url, way, _LEASE_S)
