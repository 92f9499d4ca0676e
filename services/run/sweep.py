"""`vcot sweep`: the search for training settings on a part of the pairs, each of its trainings a job of the run.

Model: the trainings are owed until `sweep.json` in the report's folder (services/run/results.py) holds them; one worker
process does those that are owed, one after another. After each, the record, the table and the figure in that folder are
replaced, and the adapters of trainings that are neither of the chosen settings nor the run's own job are removed: a grid's
180 would fill a disk. Killed anywhere, the same command does the rest; the training it was in goes on from its last
checkpoint. The reference's log-probs are computed by the first training, for all.

Limits: trainings run one by one, on this machine's worker. Nothing is merged. The time is that of the training steps and
evaluations: loading the model and the reference's log-probs come on top.
"""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table

from vcot.pipeline.errors import StageError
from vcot.pipeline.files import replace_file, write_record
from vcot.pipeline.pairs import draw_pairs
from vcot.pipeline.publish import pairs_digest
from vcot.pipeline.records import StageCount
from vcot.pipeline.report import Began, Found, OnSteps, Said, Warned, progress
from vcot.services.jobs import trainer
from vcot.services.jobs.trainer import read_progress
from vcot.services.report.figures import draw_sweep, standalone
from vcot.services.run.results import find_sweep_folder
from vcot.services.run.rounds import Round
from vcot.services.run.session import Session
from vcot.services.run.steps import publish_splits
from vcot.training.protocol.job import ADAPTER, ENDED, TrainJob, read_record, read_status
from vcot.training.protocol.search import (
    Settings,
    Sweep,
    SweepPoint,
    Training,
    conclude,
    count_passes,
    describe_time,
    measure_rate,
    plan_search,
    read_settings,
    summarise,
)

RECORD = "sweep.json"
_MAX_ROWS = 25


@dataclass
class _Search:
    """One sweep. `points` grows as jobs end; mutated by `collect` and `advance` only."""

    session: Session
    own: TrainJob
    """The run's own job: its adapter is never removed."""
    jobs: Mapping[str, tuple[TrainJob, Training]]
    """By key, in the plan's order."""
    num_train: int
    num_validation: int
    points: dict[str, list[SweepPoint]] = field(default_factory=dict)
    """What was read off each training that has ended, by its job's key."""
    tells_time: bool = True
    """Whether the time in all is still to be said."""

    def __post_init__(self) -> None:
        known = load_sweep(self.session)
        for point in known.points if known else ():
            if point.job in self.jobs and not point.fault:
                self.points.setdefault(point.job, []).append(point)

    @property
    def owed(self) -> dict[Path, TrainJob]:
        """The jobs without an outcome, by directory."""
        jobs = (job for key, (job, _) in self.jobs.items() if key not in self.points)
        return {self.session.job_directory(job): job for job in jobs}

    @property
    def record(self) -> Sweep:
        """What is known by now."""
        section = self.session.run.recipe.sweep
        return conclude(
            Sweep(
                mode=section.mode,
                num_trainings=len(self.jobs),
                num_train=self.num_train,
                num_validation=self.num_validation,
                tolerance=section.tolerance,
                centre=read_settings(self.own.train),
                points=tuple(point for key in self.jobs for point in self.points.get(key, ())),
            )
        )

    def collect(self, states: Sequence[str] = ENDED) -> None:
        """Take in the jobs that have ended since; replace the record and its table and figure where there are any."""
        ended = [(job, read_status(d)) for d, job in self.owed.items() if read_status(d).state in states]
        for job, status in ended:
            progress = read_progress(self.session.job_directory(job))
            fault = status.message if status.state == "failed" else ""
            self.points[job.key] = summarise(job.key, self.jobs[job.key][1], progress, fault)
        if ended:
            self.publish()

    def publish(self) -> None:
        """The record, for machines and for people; and room on the disk."""
        record, folder = self.record, find_sweep_folder(self.session.run)
        folder.mkdir(parents=True, exist_ok=True)
        write_record(folder / RECORD, record)
        replace_file(folder / "sweep.csv", _render_csv(record))
        if record.chosen is not None:
            replace_file(folder / "sweep.svg", standalone(draw_sweep(record)))
        kept = {self.own.key}
        kept |= {p.job for p in record.choices.values() if p.settings == record.chosen and p.varies != "epochs"}
        for key in self.points.keys() - kept:
            shutil.rmtree(self.session.job_directory(self.jobs[key][0]) / ADAPTER, ignore_errors=True)

    def advance(self, on_steps: OnSteps) -> None:
        """Take in what has ended, and say how far the search is, in passes of a pair through the model."""
        self.collect()
        if self.tells_time and (rate := self.rate) is not None:
            self.session.report(Said(self.describe_work(rate)))
            self.tells_time = False
        total = self.count_passes(self.jobs)
        done = self.count_passes(self.points)
        directory, job = next(iter(self.owed.items()), (None, None))
        if directory is None or job is None:
            on_steps(total, total, "")
            return
        progress, training = read_progress(directory), self.jobs[job.key][1]
        if progress:
            done += min(self.count_passes([job.key]), int(progress[-1].epoch * self.num_train))
        what = f"loss {progress[-1].loss:.4f}" if progress else read_status(directory).message or "starting"
        on_steps(done, total, f"training {len(self.points) + 1} of {len(self.jobs)} ({training.label}), {what}")

    def count_passes(self, keys: Iterable[str]) -> int:
        """Passes of a pair over the trainings of these jobs."""
        return count_passes((self.jobs[key][1] for key in keys), self.num_train)

    @property
    def rate(self) -> float | None:
        """Seconds per pass, as measured in the first training that says: one of the search, or the run's own."""
        for job in (*(job for job, _ in self.jobs.values()), self.own):
            directory = self.session.job_directory(job)
            if (rate := measure_rate(read_progress(directory), read_status(directory).num_train)) is not None:
                return rate
        return None

    def describe_work(self, rate: float | None) -> str:
        """How much is left to do, and how long that takes at so many seconds per pass."""
        left = self.count_passes(self.jobs.keys() - self.points.keys())
        work = f"{left} passes of a pair through the model are left"
        if rate is None:
            return f"{work}; how long they take is said as soon as the first training has shown it"
        return f"{work}: about {describe_time(left * rate)}, at {rate:.2g} s a pass as measured in this run"


async def sweep(current: Round) -> Sweep:
    """Do what is owed of the recipe's search on the round's pairs; the outcome.

    Raises StageError where nothing could be trained.
    """
    session, recipe = current.session, current.session.run.recipe
    search = _plan(current)
    search.collect(["done"])  # by an earlier command; what failed in one is tried again
    how = "one setting at a time" if recipe.sweep.mode == "one_at_a_time" else "a grid"
    session.report(
        Began(
            "sweep",
            f"{how}: {len(search.jobs)} trainings on {search.num_train} + {search.num_validation} pairs, "
            f"{len(search.points)} of them done",
        )
    )
    if owed := search.owed:
        rate = search.rate
        search.tells_time = rate is None
        session.report(Said(search.describe_work(rate)))
        async with session.at_rest():
            with progress(session.report, "pairs") as on_steps:
                log = session.run.path("training", "sweep.log")
                await trainer.train_all(owed, log, lambda: search.advance(on_steps))
    search.publish()
    record = search.record
    faults = {point.job: point.fault for point in record.points if point.fault}
    session.account(
        StageCount(
            stage="sweep",
            requested=len(search.jobs),
            ok=len(owed) - len(faults),
            cached=len(search.jobs) - len(owed),
            refused=len(faults),
            reasons={"training_failed": len(faults)} if faults else {},
        )
    )
    if record.chosen is None:
        raise StageError(f"no training of the sweep came to its end; the first: {next(iter(faults.values()))}")
    _show_choice(session, record, record.chosen)
    return record


def _show_choice(session: Session, record: Sweep, chosen: Settings) -> None:
    """The table, how the choice was made, and the chosen settings as flags."""
    session.report(Found(render_sweep(record), record))
    each = ", for each setting apart" if record.mode == "one_at_a_time" else ""
    session.report(
        Said(
            f"chosen{each}: the gap closest to zero within {100 * record.tolerance:g} % of the lowest validation loss; "
            f"figure and table: {find_sweep_folder(session.run) / 'sweep.svg'}, sweep.csv"
        )
    )
    for name in record.groups.keys() - record.choices.keys():
        if record.groups[name]:
            session.report(Warned(f"no training for {name} came to its end; the recipe's own value stays"))
    if all(point.settings != chosen or point.varies == "epochs" for point in record.points):
        session.report(Said("the chosen settings together were not trained in the search"))
    session.report(Found(chosen.flags))


def _plan(current: Round) -> _Search:
    """The jobs of the search, on pairs drawn from each of the round's splits: what it holds out stays held out."""
    run, own, section = current.session.run, current.job, current.session.run.recipe.sweep
    splits = current.pairs.train, current.pairs.validation
    share = len(current.pairs.validation) / len(current.pairs.pair_set.pairs)
    num_validation = max(1, round(section.num_pairs * share))
    sizes = (max(1, section.num_pairs - num_validation), num_validation)
    train, validation = (draw_pairs(split, size, section.seed) for split, size in zip(splits, sizes, strict=True))
    digest = pairs_digest(current.pairs.read(train), current.pairs.read(validation))
    directory = run.path("pairs", digest[:12])
    publish_splits(current, train, validation, digest, directory)
    on_pairs = own.model_copy(update={"pairs_path": str(directory), "pairs_digest": digest})
    planned = ((on_pairs.model_copy(update={"train": t.train}), t) for t in plan_search(section, own.train))
    return _Search(current.session, own, {job.key: (job, t) for job, t in planned}, len(train), len(validation))


def load_sweep(session: Session) -> Sweep | None:
    """What an earlier search found, as far as it came."""
    path = find_sweep_folder(session.run) / RECORD
    return read_record(path, Sweep) if path.is_file() else None


def render_sweep(record: Sweep) -> Table:
    """The candidates by group, the chosen ones marked; a setting with a single candidate was not searched."""
    columns = ("epochs", "lr", "dropout", "alpha", "val. loss", "gap", "ranked right", "s", "")
    title = f"Sweep: {record.num_ended} of {record.num_trainings} trainings"
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    groups = {name: points for name, points in record.groups.items() if len(points) > 1}
    for name, points in groups.items():
        for point in _sorted(points, name)[:_MAX_ROWS]:
            table.add_row(*_cells(point, chosen=record.choices.get(name) == point))
        table.add_section()
    hidden = sum(max(0, len(points) - _MAX_ROWS) for points in groups.values())
    if hidden:
        table.caption = f"and {hidden} more in sweep.csv"
    return table


def _sorted(points: Sequence[SweepPoint], name: str) -> list[SweepPoint]:
    """A setting's candidates by its value; a grid's by their loss."""
    if name == "grid":
        return sorted(points, key=lambda point: (point.loss is None, point.loss or 0.0))
    return sorted(points, key=lambda point: float(getattr(point.settings, name)))


def _cells(point: SweepPoint, *, chosen: bool) -> tuple[str, ...]:
    settings = [f"{value:g}" for _, value in point.settings]
    if point.loss is None:
        return (*settings, "failed", "", "", "", point.fault[:60])
    right = "" if point.reward_accuracy is None else f"{100 * point.reward_accuracy:.1f} %"
    gap = "" if point.gap is None else f"{point.gap:+.4f}"
    return (*settings, f"{point.loss:.4f}", gap, right, f"{point.seconds:.0f}", "chosen" if chosen else "")


def _render_csv(record: Sweep) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    measures = ("loss", "gap", "reward_accuracy", "reward_margin", "seconds", "fault", "job")
    writer.writerow(("varies", *Settings.model_fields, *measures, "chosen"))
    chosen = list(record.choices.values())
    for point in record.points:
        values = [v for _, v in point.settings]
        found = (getattr(point, name) for name in measures)
        writer.writerow([point.varies or "", *values, *found, int(point in chosen)])
    return out.getvalue()
