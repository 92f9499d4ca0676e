"""How a command comes to its run: which one, begun or not, held alone or beside others."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from vcot.pipeline.errors import InputError
from vcot.pipeline.report import Report
from vcot.services.cli.log_lines import showing_logs
from vcot.services.cli.stop import Terminated, cancel_at_sigterm
from vcot.services.cli.target import HERE, Asking, Target, run_directory
from vcot.services.cli.terminal import Terminal
from vcot.services.run.crew import RayCrew
from vcot.services.run.directory import RECIPE, Access, Run, open_run
from vcot.services.run.live import recording
from vcot.services.run.rounds import Round, list_rounds
from vcot.services.run.session import Session
from vcot.services.run.unmerged import merge_left

Step = Callable[[Session], Awaitable[None]]

_BEGINS = ("run", "rounds", "sample", "prepare")
"""Commands (with demo, which is run) that begin a run where there is none. Any other wants one that is there, or the name of
a recipe: a run that was not found may be mistyped."""
READS = (
    "report", "status", "pair --preview", "eval --plan", "swap", "checkpoints list", "checkpoints show",
    "checkpoints retire", "replicas list", "replicas add", "replicas remove", "push pairs", "push checkpoint", "export",
)  # fmt: skip
"""Commands that work beside one that writes to the run, and begin none: they read it, steer its gateway, or replace a page
or a registry in one step. Every other command is the run's only writer."""
_SERVERS = ("serve", "prepare")
"""Beside a writer, too: a server and the registry have locks of their own."""


@contextmanager
def open_target(command: str, target: Target, terminal: Terminal, overrides: Sequence[str] = ()) -> Iterator[Run]:
    """The run of a command, begun with nano where the command may begin one and no recipe is named; says what is unusual.

    `overrides` are what other flags are short for; what is set outright wins. Raises RecipeError and InputError.
    """
    where, recipe = run_directory(target.run, target.recipe), target.recipe
    access = _access(command)
    if not (where / RECIPE).is_file() and access != "read":
        recipe = recipe or ("nano" if command in _BEGINS else None)
        terminal.preface(f"a new run, {where}, with recipe {recipe}")
    with open_run(where, recipe, (*overrides, *target.set), save=target.save, access=access) as run:
        if run.changes:
            terminal.preface(f"{where}, by this command only with {', '.join(run.changes)} (--save keeps that)")
        yield run


def on_last_round(step: Callable[[Round], Awaitable[None]]) -> Step:
    """A step of the round that a run has come to."""

    async def do(session: Session) -> None:
        await step(list_rounds(session)[-1])

    return do


def execute(
    command: str,
    target: Target,
    step: Step,
    overrides: Sequence[str] = (),
    *,
    as_json: bool = False,
    asking: Asking = HERE,
) -> None:
    """Run one command on its run; with `as_json`, its result is for programs."""
    terminal = Terminal(as_json=as_json, quiet=target.quiet)
    with (
        open_target(command, target, terminal, overrides) as run,
        showing_logs_of(run, target, terminal),
        _listening(command, run, terminal) as report,
    ):
        try:
            asyncio.run(_with_session(_open_session(run, report, asking), step))
        except asyncio.CancelledError:  # by SIGTERM, which ends a command as Ctrl-C does
            raise Terminated from None


def showing_logs_of(run: Run, target: Target, terminal: Terminal) -> AbstractContextManager[None]:
    """With `--verbose`, what is added to the run's logs meanwhile. Raises InputError beside `--quiet`."""
    if target.verbose and target.quiet:
        raise InputError("--quiet and --verbose ask for opposite things; give one of them")
    return showing_logs(run.directory, terminal.show_log) if target.verbose else nullcontext()


def _listening(command: str, run: Run, terminal: Terminal) -> AbstractContextManager[Report]:
    """The terminal; of the run's only writer, others may see how far it is."""
    return nullcontext(terminal) if _access(command) != "alone" else recording(run.directory, command, terminal)


def _access(command: str) -> Access:
    return "read" if command in READS else "shared" if command in _SERVERS else "alone"


def _open_session(run: Run, report: Report, asking: Asking) -> Session:
    """Raises InputError for storage that nobody is to use."""
    if asking.engine == "here":
        if asking.shards is not None:
            raise InputError(f"--shards {asking.shards} is for --engine ray; leave it out, or add that")
        return Session(run, report)
    crew = RayCrew(run.recipe.serve, run.path("logs", "ray.log"))
    return Session(run, report, crew=crew, shards=asking.shards)


async def _with_session(session: Session, step: Step) -> None:
    cancel_at_sigterm()
    async with session:
        if not session.run.is_read:
            await merge_left(session.run, session.report)
        await step(session)
