"""What each command of the CLI does: opens the run, holds it for one writer, and walks through the steps."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rich.table import Table

from eval.prior import render_prior
from pipeline.errors import CheckpointError, InputError, OwedError
from pipeline.pairs import PAIR_POLICIES
from pipeline.recipe import load_recipe
from pipeline.report import Began, Completed, Found, Said, Warned, progress
from pipeline.run import RECIPE, Access, Run, open_run
from services.checkpoints.push import Parcel, Place, pack, push, render_parcel
from services.checkpoints.registry import Checkpoint, CheckpointInfo, Registry
from services.cli.stop import Terminated
from services.cli.terminal import Terminal
from services.engine.command import Address
from services.engine.vllm import become_server
from services.gateway import admin
from services.gateway.admin import fetch_state, register, retire, swap_to
from services.jobs import submitted, trainer
from services.planning.machine import check_machine
from services.run import results, serving
from services.run import sweep as search
from services.run.billing import count_owed, read_cost, test_judge
from services.run.probing import probe_priors
from services.run.reporting import RunEvaluation, evaluate_scores, render, write_run_report
from services.run.rounds import Round, list_rounds, make_judge
from services.run.steps import (
    Session,
    eval_stage,
    judge_stage,
    load_scores,
    pair_stage,
    parity_stage,
    sample_stage,
    swap_stage,
)
from services.run.trend import Choice, choose_round
from training.protocol.job import (
    ADAPTER,
    MERGE_REPORT,
    PREFLIGHT,
    MergeReport,
    Preflight,
    Retention,
    TrainJob,
    read_record,
)
from training.protocol.launch import check_installed

if TYPE_CHECKING:
    from services.cli.names import Target

Step = Callable[[Session], Awaitable[None]]


_BEGINS = ("run", "rounds", "sample", "prepare")
"""Commands (with demo, which is run) that begin a run where there is none. Any other wants one that is there, or the name of
a recipe: a run that was not found may be mistyped."""
_READS = (
    "report", "swap", "checkpoints list", "checkpoints show", "checkpoints retire",
    "replicas list", "replicas add", "replicas remove", "push pairs", "push checkpoint",
)  # fmt: skip
"""Commands that work beside one that writes to the run, and begin none: they read it, steer its gateway, or replace a page
or a registry in one step. Every other command is the run's only writer."""
_SERVERS = ("serve", "prepare")
"""Beside a writer, too: a server and the registry have locks of their own."""


def run_directory(directory: Path | None, recipe: str | None) -> Path:
    """The run that a command works on: the one named, or runs/RECIPE."""
    return directory or Path("runs") / Path(recipe or "nano").stem


@contextmanager
def open_target(command: str, target: Target, terminal: Terminal, overrides: Sequence[str] = ()) -> Iterator[Run]:
    """The run of a command, begun with nano where the command may begin one and no recipe is named; says what is unusual.

    `overrides` are what other flags are short for; what is set outright wins. Raises RecipeError and InputError.
    """
    where, recipe = run_directory(target.run, target.recipe), target.recipe
    access: Access = "read" if command in _READS else "shared" if command in _SERVERS else "alone"
    if not (where / RECIPE).is_file() and access != "read":
        recipe = recipe or ("nano" if command in _BEGINS else None)
        terminal.preface(f"a new run, {where}, with recipe {recipe}")
    with open_run(where, recipe, (*overrides, *target.set), save=target.save, access=access) as run:
        if run.changes:
            terminal.preface(f"{where}, by this command only with {', '.join(run.changes)} (--save keeps that)")
        yield run


def execute(command: str, target: Target, step: Step, overrides: Sequence[str] = ()) -> None:
    """Run one command on its run."""
    terminal = Terminal()
    with open_target(command, target, terminal, overrides) as run:
        try:
            asyncio.run(_with_session(run, terminal, step))
        except asyncio.CancelledError:  # by SIGTERM, which ends a command as Ctrl-C does
            raise Terminated from None


async def _with_session(run: Run, terminal: Terminal, step: Step) -> None:
    _cancel_at_sigterm()
    async with Session(run, terminal) as session:
        await step(session)


def _cancel_at_sigterm() -> None:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)


def as_source(source: str | None, path: Path | None) -> tuple[str, ...]:
    """`--source` and `--path` as overrides; a path is absolute, since the run may be used from elsewhere."""
    named = [f'tasks.source="{source}"'] if source else []
    named += [f'tasks.path="{path.expanduser().absolute()}"'] if path else []
    return tuple(named)


def as_tracker(wandb: bool) -> tuple[str, ...]:
    """`--wandb` as an override."""
    return ('train.report_to=["wandb"]',) if wandb else ()


def prepare(target: Target) -> None:
    """`vcot prepare`: what servers of the run start from."""
    terminal = Terminal()
    with open_target("prepare", target, terminal) as run:
        terminal.heading("prepare", run.recipe.model.source)
        base = Registry(run.directory).base(run.recipe.model, terminal.say)
        terminal.say(f"{base.ref.name} is {base.ref.digest[:19]}, in {base.directory}")


def engine(directory: Path | None, host: str, port: int, number: int) -> NoReturn:
    """`vcot engine`: this process becomes vLLM, on the devices of the `number`-th server. The run is only read."""
    with open_run(run_directory(directory, None), access="read") as run:
        base = Registry(run.directory).find(run.recipe.model.name)
        if base is None:
            raise CheckpointError(f"run {run.directory} does not hold its model yet; run `vcot prepare` first")
        become_server(
            base,
            run.recipe.serve,
            Address(host, port),
            devices=run.recipe.serve.devices_of(number),
            max_lora_rank=serving.served_lora_rank(run.recipe),
        )


def work(runs: Path) -> None:
    """`vcot worker`: until a signal."""
    try:
        asyncio.run(_work(runs, Terminal()))
    except asyncio.CancelledError:
        raise Terminated from None


async def _work(runs: Path, terminal: Terminal) -> None:
    _cancel_at_sigterm()
    await submitted.work(runs, terminal.say)


def serve(target: Target) -> None:
    """Serve the run until a signal."""
    terminal = Terminal()
    with open_target("serve", target, terminal) as run:
        terminal.heading("serve", f"{run.recipe.model.source}, run {run.directory}")
        serving.serve(run, terminal.say)


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
    is_remote = session.run.recipe.train.worker == "remote"  # which merges, too
    async with _servers_at_rest(current, current.job if is_remote else None):
        await _train(current)


def _servers_at_rest(current: Round, merged: TrainJob | None) -> AbstractAsyncContextManager[None]:
    """Servers that are up give their GPU to the round's training, and to the merge of job `merged`, where one is owed."""
    directory = current.job_directory
    is_owed = not trainer.is_done(directory, merged.merged_path(directory) if merged else None)
    return current.session.at_rest() if is_owed else nullcontext()


async def _train(current: Round, merge_into: Path | None = None) -> None:
    """Train the round's job; with `merge_into`, the same process merges, which spares a second start of torch."""
    session, directory = current.session, current.job_directory
    section = current.job.train
    session.report(
        Began(
            "train",
            f"{section.method}, LoRA r={section.lora_r} on {section.target_modules}, lr {section.learning_rate:g}",
        )
    )
    with progress(session.report, "steps") as on_steps:
        if section.worker == "remote":
            status = await trainer.train_remotely(current.job, directory, on_steps)
        else:
            status = await trainer.train(current.job, directory, on_steps, merge_into)
    _say_preflight(session, read_record(directory / PREFLIGHT, Preflight))
    points = [point for point in trainer.read_progress(directory) if point.kind == "validation"]
    gap = points[-1].gap
    session.report(
        Said(
            f"{status.num_steps} steps over {status.num_train} pairs, {status.num_adapted_modules} modules adapted; "
            f"validation loss {points[0].loss:.4f} -> {points[-1].loss:.4f}"
            + (f", gap {gap:+.4f}" if gap is not None else "")
        )
    )


_MAX_ROW = 80


def _say_preflight(session: Session, preflight: Preflight) -> None:
    """What was found before the training: a row as the model reads it, rows that were left out, and the memory."""
    row = preflight.train.example
    shown = row if len(row) <= _MAX_ROW else f"{row[: _MAX_ROW // 2]}...{row[-_MAX_ROW // 2 :]}"
    session.report(Said(f"a row as the model reads it ({PREFLIGHT} has it whole): {shown!r}"))
    refused = (*preflight.train.refused, *preflight.validation.refused)
    if refused:
        session.report(
            Warned(f"{len(refused)} pairs cannot be trained whole; the first, {refused[0][0]}: {refused[0][1]}")
        )
    event = Warned if preflight.memory.total > preflight.available_gib else Said
    session.report(event(f"memory: {preflight.memory.summary}; {preflight.available_gib:.1f} GiB were free"))


async def sweep(session: Session) -> None:
    """`vcot sweep`."""
    current = list_rounds(session)[-1]
    pair_stage(current)
    await search.sweep(current)


async def merge(session: Session, *, adapter: bool) -> None:
    """`vcot merge`; with `adapter`, the adapter alone."""
    current = list_rounds(session)[-1]
    pair_stage(current)
    job = current.job
    if adapter:
        job = job.model_copy(update={"merge": job.merge.model_copy(update={"serve_as": "adapter"})})
    async with _servers_at_rest(current, job):
        made = await _merge(current, job)
    session.report(Said(f"`vcot parity {made.ref.name}` registers it, if it is served as it was trained"))


async def _merge(current: Round, job: TrainJob) -> Checkpoint:
    """The job's checkpoint, which is for `parity_stage` to register."""
    session, directory = current.session, current.job_directory
    if not (directory / ADAPTER).is_dir():
        raise InputError(f"job {directory} has no adapter yet; run `vcot train` first")
    out = session.run.path("checkpoints", job.checkpoint_name)
    session.report(Began("merge", f"{job.checkpoint_name}, {job.merge.serve_as}"))
    if not out.is_dir() and job.train.worker == "remote":
        with progress(session.report, "steps") as on_steps:
            await trainer.train_remotely(job, directory, on_steps)
    elif not out.is_dir():
        await trainer.merge(job, directory, out)
    report = read_record(out / MERGE_REPORT, MergeReport)
    for dtype, lost in report.dropped:
        session.report(Warned(f"{_describe_loss(dtype, lost)}: merged again in {report.dtype}"))
    if report.unquantized is not None:
        session.report(Said(_describe_loss("the base itself, after training on 4 bits", report.unquantized)))
    session.report(Said(_describe_loss(report.held, report.retention)))
    if not report.is_served_exactly:
        session.report(
            Warned("vLLM drops what this adapter changes outside the language model; serve the merged checkpoint")
        )
    made = session.registry.find_made(job.checkpoint_name)
    assert made is not None
    session.report(Said(f"{made.ref.name} is {made.ref.digest[:19]}, in {out}"))
    return made


def _describe_loss(dtype: str, kept: Retention) -> str:
    return (
        f"{kept.kept:.1%} of the reward margin is left in {dtype} ({kept.before:.4f} -> {kept.after:.4f} nats, "
        f"error {kept.error:.1%})"
    )


async def parity(session: Session, names: Sequence[str]) -> None:
    """`vcot parity`."""
    taught = [current.policy for current in list_rounds(session)]
    chosen = _find_all(session, names) or [policy for policy in taught if policy]
    table = Table("checkpoint", "pair of models", "largest log-prob difference", "allowed")
    for report in await parity_stage(session, chosen):
        for models, difference in report.max_abs_logp.items():
            table.add_row(report.checkpoint.name, models, f"{difference:.1e}", f"{report.tolerance:g} ({report.dtype})")
        table.add_row(report.checkpoint.name, "vLLM checkpoint, vLLM base", f"{report.differs_from_base:.1e}", "more")
    session.report(Found(table))


def _find_all(session: Session, names: Sequence[str]) -> list[Checkpoint]:
    """The checkpoints of those names or aliases, also what is made and not registered yet. Raises CheckpointError."""
    if not session.run.is_read:
        _ = session.base  # which is known by its name from the first command on
    return [session.registry.find_made(name) or session.registry.resolve(name) for name in names]


async def swap(session: Session, alias: str, name: str) -> None:
    """`vcot swap`."""
    swapped = await swap_to(await _running_gateway(session), alias, name)
    ref = swapped.live
    session.report(Said(f"{alias} is {ref.name} ({ref.digest[:19]}), by {swapped.way}, pause {swapped.pause_s:.2f} s"))


async def _running_gateway(session: Session) -> str:
    """The URL of a gateway that runs already. Raises InputError where none does."""
    if not session.run.recipe.serve.url and not serving.is_served(session.run):
        raise InputError(f"no server runs for {session.run.directory}; start `vcot serve` first")
    return (await session.gateway()).url


async def replicas(session: Session) -> None:
    """`vcot replicas list`."""
    state = await fetch_state(await _running_gateway(session))
    table = Table("name", "phase", "serves", "in flight", "breaker", "restarts", "")
    for one in state.replicas:
        serves = ", ".join(ref.name for ref in one.serves)
        counts = str(one.in_flight), one.breaker, str(one.num_restarts)
        table.add_row(one.name, one.phase, serves, *counts, one.message)
    session.report(Found(table))


async def add_replica(session: Session, upstream: str | None) -> None:
    """`vcot replicas add`."""
    state = await admin.add_replica(await _running_gateway(session), upstream)
    session.report(Said(f"replica {state.name} is {state.phase}; it takes requests once it is verified"))


async def remove_replica(session: Session, name: str) -> None:
    """`vcot replicas remove`."""
    await admin.remove_replica(await _running_gateway(session), name)
    session.report(Said(f"replica {name} is drained and gone"))


async def evaluate(session: Session, names: Sequence[str]) -> None:
    """`vcot eval`."""
    split, choice = session.run.recipe.eval.split, None if names else await _choose(session, list_rounds(session))
    chosen = choice.checkpoints if choice else _find_all(session, names)
    await eval_stage(session, chosen, split)
    scores = load_scores(session, chosen, split)
    trend, named = (choice.trend, ()) if choice else ((), chosen)
    _show(session, evaluate_scores(session, scores, chosen, trend, named))
    folder, settings = results.find_folder(session.run, named), results.describe_settings(session.run)
    session.report(Said(f"{folder / results.RESULTS}; settings: {settings}"))


async def probe(session: Session, names: Sequence[str]) -> None:
    """`vcot probe`."""
    named = _find_all(session, names)
    chosen = named or (await _choose(session, list_rounds(session))).checkpoints
    for part in render_prior(await probe_priors(session, chosen, named)):
        session.report(Found(part))


async def _choose(session: Session, rounds: Sequence[Round]) -> Choice:
    """Of several rounds, the one whose policy does best on the validation split, which is asked of all."""
    if session.run.recipe.rounds.num > 1:
        await eval_stage(session, [session.base, *filter(None, (r.policy for r in rounds))], "validation")
    return choose_round(session, rounds)


def _show(session: Session, evaluation: RunEvaluation) -> None:
    for part in render(evaluation, session.benchmark):
        session.report(Found(part))


async def report(session: Session) -> None:
    """`vcot report`."""
    rounds = list_rounds(session)
    taught = [current for current in rounds if current.policy] or rounds[:1]
    _report(session, taught, choose_round(session, taught))


def _report(session: Session, rounds: Sequence[Round], choice: Choice) -> None:
    """The page, and the table in the terminal."""
    session.report(Began("report", session.run.recipe.name))
    _ = choice.round.pairs  # what is owed is said before anything is written
    scores = load_scores(session, choice.checkpoints, session.run.recipe.eval.split)
    evaluation = evaluate_scores(session, scores, choice.checkpoints, choice.trend)
    page = write_run_report(session, rounds, choice.round, evaluation)
    _show(session, evaluation)
    session.report(Said(f"report: {page}; settings: {results.describe_settings(session.run)}"))


async def run_all(session: Session) -> None:
    """`vcot run`: the whole loop, as many rounds of it as the recipe says."""
    if session.run.recipe.train.worker == "local":
        check_installed(session.run.recipe.train)
    if warning := check_machine(session.run.recipe, is_served=serving.is_served(session.run)):
        session.report(Warned(warning))
    _ = session.benchmark  # what cannot be asked, or paired, and below
    PAIR_POLICIES.resolve(session.run.recipe.pairs.policy)
    async with make_judge(session) as judge:  # what is not set, or answers nobody, is said before hours of sampling
        if judge.is_model and (num_owed := count_owed(session)):
            await test_judge(session, judge, num_owed)
    rounds: list[Round] = []
    start = session.base
    for number in range(1, session.run.recipe.rounds.num + 1):
        rounds.append(Round(session, number, start))
        start = await _teach(rounds[-1])
    choice = await _choose(session, rounds)
    await eval_stage(session, choice.checkpoints, session.run.recipe.eval.split)
    await swap_stage(session, choice.checkpoints[-1])
    _report(session, rounds, choice)
    if (cost := read_cost(session, make_judge(session))) is not None:
        session.report(Said(f"judging took {cost.summary}"))
    session.report(Completed())


async def _teach(current: Round) -> Checkpoint:
    """All of one round; returns its policy."""
    if current.session.run.recipe.rounds.num > 1:
        current.session.report(Began("round", f"{current.number} of {current.session.run.recipe.rounds.num}"))
    await sample_stage(current)
    await judge_stage(current)
    pair_stage(current)
    async with _servers_at_rest(current, current.job):
        await _train(current, current.session.run.path("checkpoints", current.job.checkpoint_name))
        return await _merge(current, current.job)


async def checkpoints(session: Session) -> None:
    """`vcot checkpoints list`."""
    table = Table("name", "kind", "digest", "aliases", "directory")
    for info in await _registered(session):
        ref = info.checkpoint
        digest = ref.digest[:19] if Terminal().out.is_terminal else ref.digest
        table.add_row(ref.name, ref.kind, digest, ", ".join(info.aliases), info.directory)
    session.report(Found(table))


async def _registered(session: Session) -> Sequence[CheckpointInfo]:
    """What the recipe's gateway has registered, where it names one; else what the run has."""
    if session.run.recipe.serve.url:
        return await admin.list_checkpoints((await session.gateway()).url)
    return [session.registry.describe(checkpoint.ref.name) for checkpoint in session.registry.list()]


async def show_checkpoint(session: Session, name: str) -> None:
    """`vcot checkpoints show`."""
    if session.run.recipe.serve.url:
        info = await admin.show_checkpoint((await session.gateway()).url, name)
    else:
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
    session.report(Found(table))


async def add_checkpoint(session: Session, directory: Path) -> None:
    """`vcot checkpoints add`."""
    checkpoint = session.registry.inspect(directory)
    await parity_stage(session, [checkpoint])
    if session.run.recipe.serve.url:
        await register((await session.gateway()).url, directory)
    else:
        session.registry.register(directory)
    session.report(Said(f"{checkpoint.ref.name} is {checkpoint.ref.digest[:19]}, in {checkpoint.directory}"))


async def retire_checkpoint(session: Session, name: str) -> None:
    """`vcot checkpoints retire`."""
    url = session.run.recipe.serve.url
    ref = await retire((await session.gateway()).url, name) if url else session.registry.retire(name)
    session.report(Said(f"{ref.name} ({ref.digest[:19]}) is retired; its files stay where they are"))


async def push_pairs(session: Session, place: Place, *, dry_run: bool) -> None:
    """`vcot push pairs`."""
    folder = list_rounds(session)[-1].pairs.directory
    if not folder.is_dir():
        raise OwedError(f"run {session.run.directory} has no pairs yet; run `vcot pair` first")
    _push(session, pack(folder, "dataset", f"Preference pairs of {session.run.recipe.name}"), place, dry_run)


async def push_checkpoint(session: Session, place: Place, name: str | None, *, dry_run: bool) -> None:
    """`vcot push checkpoint`."""
    taught = [policy.ref.name for current in list_rounds(session) if (policy := current.policy) is not None]
    if name is None and not taught:
        raise InputError(f"run {session.run.directory} has no policy yet; run `vcot run` first, or name a checkpoint")
    checkpoint = session.registry.resolve(name or taught[-1])
    if checkpoint.ref.kind == "base":
        raise InputError(
            f"{checkpoint.ref.name} is the untaught model, which is published already; name a trained checkpoint"
        )
    _push(
        session, pack(checkpoint.directory, "model", f"{checkpoint.ref.name} ({checkpoint.ref.digest})"), place, dry_run
    )


def _push(session: Session, parcel: Parcel, place: Place, dry_run: bool) -> None:
    session.report(Began("push", f"{parcel.folder} as {parcel.kind} to {place}"))
    session.report(Found(render_parcel(parcel)))
    if dry_run:
        session.report(Said("nothing was sent; without --dry-run it is"))
        return
    session.report(Said(f"sent: {push(parcel, place)}"))


def doctor(target: Target) -> bool:
    """`vcot doctor`: looks at the run's recipe, or at the one named, and begins no run."""
    from services.planning.doctor import examine  # it is this command's only

    if target.save:
        raise InputError("vcot doctor changes no run; give --save to a command that works on one, as `vcot run`")
    directory, recipe = run_directory(target.run, target.recipe), target.recipe
    stored = directory / RECIPE
    resolved = load_recipe(str(stored) if recipe is None and stored.is_file() else recipe or "nano", target.set)
    return examine(resolved, directory, Terminal())


def build_nano(out: Path, architecture: str) -> None:
    """`vcot nano build`: the builder in this terminal, as a process of its own."""
    import subprocess  # this command's only
    import sys

    command = [sys.executable, "-P", "-m", "training.nano", "--out", str(out), "--architecture", architecture]
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
