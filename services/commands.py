"""What each command of the CLI does: opens the run, holds it for one writer, and walks through the steps."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from rich.table import Table

from pipeline.errors import InputError
from pipeline.recipe import load_recipe
from pipeline.run import RECIPE, Run, exclusive, open_run
from services import serving, trainer
from services.admin import register, retire, swap_to
from services.checkpoints import Checkpoint
from services.reporting import Evaluation, evaluate_scores, write_run_report
from services.rounds import Round, list_rounds, make_judge
from services.stages import (
    Session,
    eval_stage,
    judge_stage,
    load_scores,
    pair_stage,
    sample_stage,
)
from services.terminal import Terminal
from services.trend import Choice, choose_round
from training.job import ADAPTER

Step = Callable[[Session], Awaitable[None]]


def run_directory(directory: Path | None, recipe: str | None) -> Path:
    """The run that a command works on: the one named, or runs/RECIPE."""
    return directory or Path("runs") / Path(recipe or "nano").stem


def open_target(directory: Path | None, recipe: str | None, overrides: Sequence[str]) -> AbstractContextManager[Run]:
    """Open the run, or begin it with the recipe (nano, if none is named)."""
    directory = run_directory(directory, recipe)
    begun = (directory / RECIPE).is_file()
    return open_run(directory, recipe if begun else recipe or "nano", overrides)


def execute(directory: Path | None, recipe: str | None, overrides: Sequence[str], step: Step) -> None:
    """Run one command on its run, alone."""
    with open_target(directory, recipe, overrides) as run, exclusive(run):
        try:
            asyncio.run(_with_session(run, step))
        except asyncio.CancelledError:  # by SIGTERM, which ends a command as Ctrl-C does
            raise KeyboardInterrupt from None


async def _with_session(run: Run, step: Step) -> None:
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    async with Session(run, Terminal()) as session:
        await step(session)


def with_source(overrides: Sequence[str], source: str | None, path: Path | None) -> tuple[str, ...]:
    """`--source` and `--path` as overrides; a path is kept absolute, since the run may be used from elsewhere."""
    named = [f'tasks.source="{source}"'] if source else []
    named += [f'tasks.path="{path.expanduser().absolute()}"'] if path else []
    return (*named, *overrides)


def serve(directory: Path | None, recipe: str | None, overrides: Sequence[str]) -> None:
    """Serve the run until a signal."""
    terminal = Terminal()
    with open_target(directory, recipe, overrides) as run:
        terminal.heading("serve", f"{run.recipe.model.source}, run {run.directory}")
        asyncio.run(serving.serve(run, terminal.say))


async def sample(session: Session) -> None:
    """`vcot sample`."""
    await sample_stage(list_rounds(session)[-1])


async def judge(session: Session) -> None:
    """`vcot judge`."""
    await judge_stage(list_rounds(session)[-1])


async def pair(session: Session) -> None:
    """`vcot pair`."""
    pair_stage(list_rounds(session)[-1])


async def train(session: Session) -> None:
    """`vcot train`."""
    current = list_rounds(session)[-1]
    pair_stage(current)
    await _train(current)


async def _train(current: Round, merge_into: Path | None = None) -> None:
    """Train the round's job; with `merge_into`, the same process merges, which spares a second start of torch."""
    session, directory = current.session, current.job_directory
    section = current.job.train
    session.terminal.heading(
        "train", f"{section.method}, LoRA r={section.lora_r} on {section.target_modules}, lr {section.learning_rate:g}"
    )
    with session.terminal.steps("steps") as on_steps:
        status = await trainer.train(current.job, directory, on_steps, merge_into)
    points = [point for point in trainer.read_progress(directory) if point.kind == "validation"]
    session.terminal.say(
        f"{status.num_steps} steps over {status.num_train} pairs, {status.num_adapted_modules} modules adapted; "
        f"validation loss {points[0].loss:.4f} -> {points[-1].loss:.4f}"
    )


async def merge(session: Session) -> None:
    """`vcot merge`."""
    current = list_rounds(session)[-1]
    pair_stage(current)
    await _merge(current)


async def _merge(current: Round) -> Checkpoint:
    """The merged checkpoint, registered."""
    session, job, directory = current.session, current.job, current.job_directory
    if not (directory / ADAPTER).is_dir():
        raise InputError(f"job {directory} has no adapter yet; run `vcot train` first")
    out = session.run.path("checkpoints", job.checkpoint_name)
    session.terminal.heading("merge", f"{job.checkpoint_name}, {job.merge.dtype}")
    if not out.is_dir():
        await trainer.merge(directory, out)
    checkpoint = session.registry.register(out)
    session.terminal.say(f"{checkpoint.ref.name} is {checkpoint.ref.digest[:19]}, in {out}")
    return checkpoint


async def swap(session: Session, alias: str, name: str) -> None:
    """`vcot swap`."""
    if not session.run.recipe.serve.url and not serving.is_served(session.run):
        raise InputError(f"no server runs for {session.run.directory}; start `vcot serve` first")
    gateway = await session.gateway()
    swapped = await swap_to(gateway.url, alias, name)
    session.terminal.say(f"{alias} is {swapped.live.name} ({swapped.live.digest[:19]}), pause {swapped.pause_s:.2f} s")


async def evaluate(session: Session, names: Sequence[str]) -> None:
    """`vcot eval`."""
    split, choice = session.run.recipe.eval.split, None if names else await _choose(session, list_rounds(session))
    chosen = choice.checkpoints if choice else [session.registry.resolve(name) for name in names]
    await eval_stage(session, chosen, split)
    scores = load_scores(session, chosen, split)
    _show(session, evaluate_scores(session, scores, chosen, choice.trend if choice else ()))


async def _choose(session: Session, rounds: Sequence[Round]) -> Choice:
    """Of several rounds, the one whose policy does best on the validation split, which is asked of all."""
    if session.run.recipe.rounds.num > 1:
        await eval_stage(session, [session.base, *filter(None, (r.policy for r in rounds))], "validation")
    return choose_round(session, rounds)


def _show(session: Session, evaluation: Evaluation) -> None:
    for part in evaluation.renderables:
        session.terminal.show(part)


async def report(session: Session) -> None:
    """`vcot report`."""
    rounds = list_rounds(session)
    taught = [current for current in rounds if current.policy] or rounds[:1]
    _report(session, taught, choose_round(session, taught))


def _report(session: Session, rounds: Sequence[Round], choice: Choice) -> None:
    """The page, and the table in the terminal."""
    session.terminal.heading("report", session.run.recipe.name)
    scores = load_scores(session, choice.checkpoints, session.run.recipe.eval.split)
    evaluation = evaluate_scores(session, scores, choice.checkpoints, choice.trend)
    page = write_run_report(session, rounds, choice.round, evaluation)
    _show(session, evaluation)
    session.terminal.say(f"report: {page}")


async def run_all(session: Session) -> None:
    """`vcot run`: the whole loop, as many rounds of it as the recipe says."""
    async with make_judge(session):  # a key that is not set is said before hours of sampling
        pass
    rounds: list[Round] = []
    start = session.base
    for number in range(1, session.run.recipe.rounds.num + 1):
        rounds.append(Round(session, number, start))
        start = await _teach(rounds[-1])
    choice = await _choose(session, rounds)
    await eval_stage(session, choice.checkpoints, session.run.recipe.eval.split)
    _report(session, rounds, choice)
    session.terminal.summary()


async def _teach(current: Round) -> Checkpoint:
    """All of one round; returns its policy."""
    if current.session.run.recipe.rounds.num > 1:
        current.session.terminal.heading("round", f"{current.number} of {current.session.run.recipe.rounds.num}")
    await sample_stage(current)
    await judge_stage(current)
    pair_stage(current)
    await _train(current, current.session.run.path("checkpoints", current.job.checkpoint_name))
    return await _merge(current)


async def checkpoints(session: Session) -> None:
    """`vcot checkpoints list`."""
    table = Table("name", "kind", "digest", "directory")
    for checkpoint in session.registry.list():
        ref = checkpoint.ref
        table.add_row(ref.name, ref.kind, ref.digest[:19], str(checkpoint.directory))
    session.terminal.show(table)


async def show_checkpoint(session: Session, name: str) -> None:
    """`vcot checkpoints show`."""
    info = session.registry.describe(name)
    table = Table(show_header=False)
    table.add_row("name", info.checkpoint.name)
    table.add_row("kind", info.checkpoint.kind)
    table.add_row("digest", info.checkpoint.digest)
    table.add_row("directory", info.directory)
    table.add_row("training job", info.job or "none")
    table.add_row("aliases", ", ".join(info.aliases) or "none")
    table.add_row("live", "yes" if info.is_live else "no")
    table.add_row("canary", "yes" if info.has_canary else "no: a swap to it cannot be verified")
    session.terminal.show(table)


async def add_checkpoint(session: Session, directory: Path) -> None:
    """`vcot checkpoints add`."""
    url = session.run.recipe.serve.url
    ref = await register((await session.gateway()).url, directory) if url else session.registry.register(directory).ref
    session.terminal.say(f"{ref.name} is {ref.digest[:19]}, in {directory.absolute()}")


async def retire_checkpoint(session: Session, name: str) -> None:
    """`vcot checkpoints retire`."""
    url = session.run.recipe.serve.url
    ref = await retire((await session.gateway()).url, name) if url else session.registry.retire(name)
    session.terminal.say(f"{ref.name} ({ref.digest[:19]}) is retired; its files stay where they are")


def doctor(directory: Path | None, recipe: str | None, overrides: Sequence[str]) -> bool:
    """`vcot doctor`: looks at the run's recipe, or at the one named, and begins no run."""
    from services.doctor import examine  # it is this command's only

    directory = run_directory(directory, recipe)
    stored = directory / RECIPE
    resolved = load_recipe(str(stored) if recipe is None and stored.is_file() else recipe or "nano", overrides)
    return examine(resolved, directory, Terminal())


def build_nano(out: Path) -> None:
    """`vcot nano build`: the builder in this terminal, as a process of its own."""
    import subprocess  # this command's only
    import sys

    done = subprocess.run([sys.executable, "-m", "training.nano", "--out", str(out)], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
