"""What the commands do that walk through a run's steps."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from pathlib import Path

from rich.table import Table

from eval.prior import render_prior
from pipeline.errors import InputError
from pipeline.pairs import PAIR_POLICIES
from pipeline.report import Began, Completed, Found, Report, Said, Warned, progress
from services.checkpoints.registry import Checkpoint
from services.jobs import trainer
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
    _check_trainer(session)
    current = list_rounds(session)[-1]
    pair_stage(current)
    is_remote = session.run.recipe.train.worker == "remote"  # which merges, too
    async with _servers_at_rest(current, current.job if is_remote else None):
        await _train(current)


def _check_trainer(session: Session) -> None:
    """See that what a training on this machine takes is installed, before anything that lasts. Raises as that does."""
    if session.run.recipe.train.worker == "local":
        check_installed(session.run.recipe.train)


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
    tell_preflight(session.report, read_record(directory / PREFLIGHT, Preflight))
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


def tell_preflight(report: Report, preflight: Preflight) -> None:
    """What was found before the training: a row as the model reads it, rows that were left out, and the memory."""
    row = preflight.train.example
    shown = row if len(row) <= _MAX_ROW else f"{row[: _MAX_ROW // 2]}...{row[-_MAX_ROW // 2 :]}"
    report(Said(f"a row as the model reads it ({PREFLIGHT} has it whole): {shown!r}"))
    refused = (*preflight.train.refused, *preflight.validation.refused)
    if refused:
        report(Warned(f"{len(refused)} pairs cannot be trained whole; the first, {refused[0][0]}: {refused[0][1]}"))
    event = Warned if preflight.memory.total > preflight.available_gib else Said
    report(event(f"memory: {preflight.memory.summary}; {preflight.available_gib:.1f} GiB were free"))


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
    _check_trainer(session)
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
