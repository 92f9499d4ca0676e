"""The steps of a run that the trainer worker does: train and merge. What either finds done it does not do again."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from pathlib import Path

from vcot.pipeline.errors import InputError
from vcot.pipeline.report import Began, Report, Said, Warned, progress
from vcot.services.checkpoints.registry import Checkpoint
from vcot.services.jobs import trainer
from vcot.services.run.rounds import Round
from vcot.training.protocol.job import (
    ADAPTER,
    MERGE_REPORT,
    PREFLIGHT,
    MergeReport,
    Preflight,
    Retention,
    TrainJob,
    TrainProgress,
    TrainStatus,
    read_record,
)

_MAX_ROW = 80
"""Characters of a training row that are shown."""


def servers_at_rest(current: Round, merged: TrainJob | None) -> AbstractAsyncContextManager[None]:
    """Servers that are up give their GPU to the round's training, and to the merge of job `merged`, where one is owed."""
    directory = current.job_directory
    is_owed = not trainer.is_done(directory, merged.merged_path(directory) if merged else None)
    return current.session.at_rest() if is_owed else nullcontext()


async def train_stage(current: Round, merge_into: Path | None = None) -> None:
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
    session.report(Said(describe_training(status, trainer.read_progress(directory))))


def describe_training(status: TrainStatus, progress: Sequence[TrainProgress]) -> str:
    """What was trained, and how the validation loss went, where the preflight left a validation pair to measure it on."""
    done = f"{status.num_steps} steps over {status.num_train} pairs, {status.num_adapted_modules} modules adapted"
    points = [point for point in progress if point.kind == "validation"]
    if not points:
        return f"{done}; no validation pair could be used, so there is no validation loss"
    gap = points[-1].gap
    went = f"validation loss {points[0].loss:.4f} -> {points[-1].loss:.4f}"
    return f"{done}; {went}" + (f", gap {gap:+.4f}" if gap is not None else "")


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


async def merge_stage(current: Round, job: TrainJob) -> Checkpoint:
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
