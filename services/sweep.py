"""`vcot sweep`: the grid of training settings on a part of the pairs, each point a training job of the run.

Model: the points are owed until `report/sweep.json` holds them; one worker process does those that are owed, one after
another. After each, the record, the table and the figure in the report's folder are replaced, and the adapters of points
that are neither the choice so far nor the run's own job are removed: 180 of them would fill a disk. Killed anywhere, the
same command does the rest; the point it was in goes on from its last checkpoint. The reference's log-probs are computed by
the first point, for all.

Limits: points run one by one, on this machine's worker. Nothing is merged.
"""

from __future__ import annotations

import csv
import io
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table

from pipeline.errors import StageError
from pipeline.pairs import draw_pairs
from pipeline.publish import pairs_digest
from pipeline.records import StageCount
from services import trainer
from services.report.figures import draw_sweep, standalone
from services.rounds import Round
from services.stages import Session, publish_splits
from services.trainer import OnSteps, read_progress
from training.job import ADAPTER, ENDED, TrainJob, read_record, read_status, write_record
from training.sweep import Settings, Sweep, SweepPoint, apply_settings, choose, plan_points, summarise

RECORD = "sweep.json"
_MAX_ROWS = 25


@dataclass
class _Search:
    """One sweep. `points` grows as jobs end; mutated by `collect` only."""

    session: Session
    own: TrainJob
    """The run's own job: its adapter is never removed."""
    jobs: Mapping[str, tuple[TrainJob, Settings]]
    """By key, in the grid's order."""
    num_train: int
    num_validation: int
    points: dict[str, SweepPoint] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (known := load_sweep(self.session)) is not None:
            self.points = {point.job: point for point in known.points if point.job in self.jobs and not point.fault}

    @property
    def owed(self) -> dict[Path, TrainJob]:
        """The jobs without an outcome, by directory."""
        jobs = (job for key, (job, _) in self.jobs.items() if key not in self.points)
        return {self.session.job_directory(job): job for job in jobs}

    @property
    def record(self) -> Sweep:
        """What is known by now."""
        points = tuple(self.points[key] for key in self.jobs if key in self.points)
        tolerance = self.session.run.recipe.sweep.tolerance
        return Sweep(
            num_points=len(self.jobs),
            num_train=self.num_train,
            num_validation=self.num_validation,
            tolerance=tolerance,
            points=points,
            chosen=choose(points, tolerance),
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
        record, folder = self.record, self.session.run.path("report", RECORD).parent
        write_record(folder / RECORD, record)
        _replace(folder / "sweep.csv", _render_csv(record))
        if record.chosen is not None:
            _replace(folder / "sweep.svg", standalone(draw_sweep(record)))
        kept = {self.own.key, record.chosen.job if record.chosen else ""}
        for key in self.points.keys() - kept:
            shutil.rmtree(self.session.job_directory(self.jobs[key][0]) / ADAPTER, ignore_errors=True)

    def advance(self, on_steps: OnSteps) -> None:
        """Take in what has ended, and say how far the search is, in passes of a pair through the model."""
        self.collect()
        total = sum(self._passes(settings) for _, settings in self.jobs.values())
        done = sum(self._passes(point.settings) for point in self.points.values())
        directory, job = next(iter(self.owed.items()), (None, None))
        if directory is None or job is None:
            on_steps(total, total, "")
            return
        progress, settings = read_progress(directory), self.jobs[job.key][1]
        if progress:
            done += min(self._passes(settings), int(progress[-1].epoch * self.num_train))
        what = f"loss {progress[-1].loss:.4f}" if progress else read_status(directory).message or "starting"
        on_steps(done, total, f"point {len(self.points) + 1} of {len(self.jobs)} ({settings.label}), {what}")

    def _passes(self, settings: Settings) -> int:
        return round(settings.epochs * self.num_train)


async def sweep(current: Round) -> Sweep:
    """Do what is owed of the recipe's grid on the round's pairs; the outcome.

    Raises StageError where no point could be trained.
    """
    session, recipe = current.session, current.session.run.recipe
    search = _plan(current)
    search.collect(["done"])  # by an earlier command; what failed in one is tried again
    session.terminal.heading(
        "sweep",
        f"{len(search.jobs)} points on {search.num_train} + {search.num_validation} pairs, "
        f"{len(search.points)} of them done",
    )
    if owed := search.owed:
        async with session.at_rest():
            with session.terminal.steps("pairs") as on_steps:
                await trainer.train_all(
                    owed, session.run.path("training", "sweep.log"), lambda: search.advance(on_steps)
                )
    search.publish()
    record = search.record
    faults = [point.fault for point in record.points if point.fault]
    session.account(
        StageCount(
            stage="sweep",
            requested=len(search.jobs),
            ok=len(owed) - len(faults),
            cached=len(search.jobs) - len(owed),
            refused=len(faults),
        )
    )
    if record.chosen is None:
        raise StageError(f"no point of the sweep could be trained; the first: {faults[0]}")
    session.terminal.show(render_sweep(record))
    session.terminal.say(
        f"chosen: the gap closest to zero within {100 * recipe.sweep.tolerance:g} % of the lowest validation loss; "
        f"figure and table: {session.run.path('report', 'sweep.svg')}, sweep.csv"
    )
    session.terminal.show(record.chosen.settings.flags)
    return record


def _plan(current: Round) -> _Search:
    """The jobs of the grid, on pairs drawn from each of the round's splits: what it holds out stays held out."""
    run, own, grid = current.session.run, current.job, current.session.run.recipe.sweep
    splits = current.pairs.train, current.pairs.validation
    share = len(current.pairs.validation) / len(current.pairs.pair_set.pairs)
    num_validation = max(1, round(grid.num_pairs * share))
    sizes = (max(1, grid.num_pairs - num_validation), num_validation)
    train, validation = (draw_pairs(split, size, grid.seed) for split, size in zip(splits, sizes, strict=True))
    digest = pairs_digest(train, validation)
    directory = run.path("pairs", digest[:12])
    publish_splits(current, train, validation, directory)
    on_pairs = own.model_copy(update={"pairs_path": str(directory), "pairs_digest": digest})
    points = (
        (on_pairs.model_copy(update={"train": apply_settings(own.train, settings)}), settings)
        for settings in plan_points(grid)
    )
    return _Search(current.session, own, {job.key: (job, s) for job, s in points}, len(train), len(validation))


def load_sweep(session: Session) -> Sweep | None:
    """What an earlier search found, as far as it came."""
    path = session.run.path("report", RECORD)
    return read_record(path, Sweep) if path.is_file() else None


def render_sweep(record: Sweep) -> Table:
    """The points, the lowest validation loss first, the chosen one marked."""
    columns = ("epochs", "lr", "dropout", "alpha", "val. loss", "gap", "ranked right", "s", "")
    table = Table(title=f"Sweep: {len(record.points)} of {record.num_points} points", title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    rows = list(_rows(record))
    for row in rows[:_MAX_ROWS]:
        table.add_row(*row)
    if len(rows) > _MAX_ROWS:
        table.caption = f"and {len(rows) - _MAX_ROWS} more in sweep.csv"
    return table


def _rows(record: Sweep) -> Iterator[tuple[str, ...]]:
    for point in sorted(record.points, key=lambda point: (point.loss is None, point.loss or 0.0)):
        settings = [f"{value:g}" for _, value in point.settings]
        if point.loss is None:
            yield (*settings, "failed", "", "", "", point.fault[:60])
            continue
        right = "" if point.reward_accuracy is None else f"{100 * point.reward_accuracy:.1f} %"
        gap = "" if point.gap is None else f"{point.gap:+.4f}"
        mark = "chosen" if record.chosen is not None and point.job == record.chosen.job else ""
        yield (*settings, f"{point.loss:.4f}", gap, right, f"{point.seconds:.0f}", mark)


def _render_csv(record: Sweep) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    measures = ("loss", "gap", "reward_accuracy", "reward_margin", "seconds", "fault", "job")
    writer.writerow((*Settings.model_fields, *measures, "chosen"))
    for point in record.points:
        chosen = record.chosen is not None and point.job == record.chosen.job
        writer.writerow([*(v for _, v in point.settings), *(getattr(point, name) for name in measures), int(chosen)])
    return out.getvalue()


def _replace(path: Path, text: str) -> None:
    """Write a file in one step."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, "utf-8")
    partial.replace(path)
