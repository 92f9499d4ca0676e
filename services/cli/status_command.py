"""`vcot status`: what there is of a run, as a table or as JSON, whatever state the run is in."""

from __future__ import annotations

import asyncio
import time

from rich.console import RenderableType
from rich.table import Column, Table

from vcot.pipeline.errors import InputError
from vcot.pipeline.judges.cost import describe_tokens
from vcot.pipeline.report import ignore, tell
from vcot.services.cli.target import Target, run_directory
from vcot.services.cli.terminal import Terminal
from vcot.services.run.directory import RECIPE, open_run
from vcot.services.run.live import Live, find_holder, read_live, say_span
from vcot.services.run.session import Session
from vcot.services.run.stages import RunStatus
from vcot.services.run.status import look_at_run


def show(target: Target, *, as_json: bool) -> None:
    """Print it. Whatever cannot be read is told in it, so that the rest is seen."""
    status = look(target)
    tell(Terminal(as_json=as_json, quiet=target.quiet), render_status(status), status)


def look(target: Target) -> RunStatus:
    """What there is of the run that the flags name; what cannot be read is among its problems."""
    where = run_directory(target.run, target.recipe)
    if not (where / RECIPE).is_file():
        return RunStatus(run=str(where), state="not begun")
    problems: list[str] = []
    live, holder = None, find_holder(where)
    try:
        live = read_live(where)
    except InputError as error:
        problems.append(str(error))
    try:
        with open_run(where, target.recipe, target.set, save=target.save, access="read") as run:

            async def look_inside() -> RunStatus:
                async with Session(run, ignore) as session:
                    return await look_at_run(session, live, holder, time.time())

            status = asyncio.run(look_inside())
    except InputError as error:
        age_s = time.time() - live.updated_at if live else None
        status = RunStatus(
            run=str(where), state="damaged", holder=holder, live=live, live_age_s=age_s, problems=(str(error),)
        )
    return status.model_copy(update={"problems": (*problems, *status.problems)})


def render_status(status: RunStatus) -> list[RenderableType]:
    """The table and sentences for a terminal."""
    recipe = f" (recipe {status.recipe})" if status.recipe else ""
    parts: list[RenderableType] = [f"{status.run}{recipe}: {status.state}"]
    if status.state == "not begun":
        return [*parts, "no run is there; `vcot run` begins one"]
    if status.live:
        parts += _describe_live(status.live, status)
    if status.stages:
        parts.append(tabulate(status))
    if status.sampled and status.sampled.num_tokens:
        parts.append(f"all responses: {describe_tokens(status.sampled.num_tokens)}")
    if status.scored and status.scored.num_tokens:
        parts.append(f"image gains and options: {describe_tokens(status.scored.num_tokens)}")
    if status.judged:
        parts.append(f"judging: {status.judged.summary}")
    return [*parts, *(f"cannot be read: {problem}" for problem in status.problems)]


def _describe_live(live: Live, status: RunStatus) -> list[str]:
    age = say_span(max(0.0, status.live_age_s or 0.0))
    if live.end is not None:
        return [f"last command: vcot {live.command}, ended {age} ago: {live.end}"]
    if not status.holder and status.holder is not None:
        return [f"last command: vcot {live.command}, killed; its last word is {age} old, and the same command goes on"]
    lines = [f"at work: vcot {live.command} (process {live.pid}), as of {age} ago"]
    if live.stage:
        lines.append(f"  {live.stage}: {live.waiting or live.what}")
    if live.unit:
        total = f"/{live.total:,}" if live.total else ""
        rate = f", {live.per_s:,.1f} a second" if live.per_s else ""
        left = f", about {say_span(live.left_s)} left" if live.left_s is not None else ""
        lines.append(f"  {live.done:,}{total} {live.unit}{rate}{left}{f'; {live.note}' if live.note else ''}")
    return lines + [
        f"  {count.stage}: {count.requested} requested = {count.ok} ok + {count.cached} cached + {count.failed} failed"
        f" + {count.refused} refused"
        for count in live.accounts
    ]


def tabulate(status: RunStatus) -> Table:
    """Each stage's account."""
    table = Table("stage", *(_right(name) for name in ("requested", "ok", "failed", "refused", "owed")), "")
    for one in status.stages:
        numbers = (one.requested, one.ok, one.failed, one.refused, one.owed)
        ordered = sorted(one.reasons.items(), key=lambda item: (-item[1], item[0]))
        reasons = ", ".join(f"{number} {reason.replace('_', ' ')}" for reason, number in ordered)
        shown = [f"{number:,}" for number in numbers] if one.requested else [""] * len(numbers)
        table.add_row(one.stage, *shown, "; ".join(filter(None, (reasons, one.note))))
    return table


def _right(name: str) -> Column:
    return Column(name, justify="right")
