"""What the commands do that steer a gateway which runs already."""

from __future__ import annotations

from rich.table import Table

from vcot.pipeline.errors import InputError
from vcot.pipeline.report import Found, Said
from vcot.services.gateway import admin
from vcot.services.gateway.admin import fetch_state, swap_to
from vcot.services.run.announcement import is_served
from vcot.services.run.session import Session


async def swap(session: Session, alias: str, name: str) -> None:
    """`vcot swap`."""
    swapped = await swap_to(await _running_gateway(session), alias, name)
    ref = swapped.live
    session.report(Said(f"{alias} is {ref.name} ({ref.digest[:19]}), by {swapped.way}, pause {swapped.pause_s:.2f} s"))


async def _running_gateway(session: Session) -> str:
    """The URL of a gateway that runs already. Raises InputError where none does."""
    if session.gateway.find() is None and not is_served(session.run):  # which may be on its way
        raise InputError(f"no server runs for {session.run.directory}; start `vcot serve` first")
    return await session.gateway.open()


async def replicas(session: Session) -> None:
    """`vcot replicas list`."""
    state = await fetch_state(await _running_gateway(session))
    table = Table("name", "phase", "serves", "in flight", "breaker", "restarts", "")
    for one in state.replicas:
        serves = ", ".join(ref.name for ref in one.serves)
        counts = str(one.in_flight), one.breaker, str(one.num_restarts)
        table.add_row(one.name, one.phase, serves, *counts, one.message)
    session.report(Found(table, state.replicas))


async def add_replica(session: Session, upstream: str | None) -> None:
    """`vcot replicas add`."""
    state = await admin.add_replica(await _running_gateway(session), upstream)
    session.report(Said(f"replica {state.name} is {state.phase}; it takes requests once it is verified"))


async def remove_replica(session: Session, name: str) -> None:
    """`vcot replicas remove`."""
    await admin.remove_replica(await _running_gateway(session), name)
    session.report(Said(f"replica {name} is drained and gone"))
