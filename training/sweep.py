"""The search for training settings: its points, what each found, and which one is chosen. Pure, and free of torch.

The grid is the product of the recipe's values. A point is chosen by its validation loss and by the gap between that and its
training loss (the paper, Training): of all points whose loss is within `tolerance` of the lowest, the one whose gap is
closest to zero.

Limits: the training loss is measured with dropout and the validation loss without, so the gap of a large dropout is too
small, or negative. A choice on the validation split of a subsample says nothing yet about the benchmark.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from pipeline.errors import StageError
from pipeline.recipe import SweepSection, TrainSection
from pipeline.records import Record
from training.job import TrainProgress


class Settings(Record):
    """What the points of a sweep differ in; the names are those of the recipe's `train` section."""

    epochs: float
    learning_rate: float
    lora_dropout: float
    lora_alpha: int

    @property
    def flags(self) -> str:
        """Ready to be given to a command."""
        return "--set " + " ".join(f"train.{name}={value:g}" for name, value in self)

    @property
    def label(self) -> str:
        """For a line of progress."""
        return ", ".join(f"{name.removeprefix('lora_')} {value:g}" for name, value in self)


class SweepPoint(Record):
    """What one point's training ended with; without a loss where it failed."""

    job: str
    """The key of its training job."""
    settings: Settings
    loss: float | None = None
    """On the validation pairs, after the last step."""
    gap: float | None = None
    """`loss` minus the mean training loss since the evaluation before."""
    reward_accuracy: float | None = None
    reward_margin: float | None = None
    seconds: float = 0.0
    fault: str = ""
    """Why there is no loss."""


class Sweep(Record):
    """All points that are done, in the grid's order, and the choice among them."""

    num_points: int
    """Of the whole grid."""
    num_train: int
    num_validation: int
    tolerance: float
    points: tuple[SweepPoint, ...]
    chosen: SweepPoint | None = None


def plan_points(grid: SweepSection) -> list[Settings]:
    """The grid, the short trainings first."""
    values = itertools.product(sorted(grid.epochs), grid.learning_rate, grid.lora_dropout, grid.lora_alpha)
    names = tuple(Settings.model_fields)
    return [Settings.model_validate(dict(zip(names, point, strict=True))) for point in values]


def apply_settings(train: TrainSection, settings: Settings) -> TrainSection:
    """The recipe's section at a point of the grid."""
    return TrainSection.model_validate({**train.model_dump(), **settings.model_dump()})


def summarise(job: str, settings: Settings, progress: Sequence[TrainProgress], fault: str = "") -> SweepPoint:
    """A point from its curves. Raises StageError where a training that did not fail has no validation loss."""
    if fault:
        return SweepPoint(job=job, settings=settings, fault=fault)
    last = next((point for point in reversed(progress) if point.kind == "validation"), None)
    if last is None:
        raise StageError("a sweep chooses by validation loss, and there is no validation pair; add pairs")
    return SweepPoint(
        job=job,
        settings=settings,
        loss=last.loss,
        gap=last.gap,
        reward_accuracy=last.reward_accuracy,
        reward_margin=last.reward_margin,
        seconds=last.elapsed_s,
    )


def choose(points: Iterable[SweepPoint], tolerance: float) -> SweepPoint | None:
    """The point with the gap closest to zero among those whose loss is within `tolerance` (a share) of the lowest."""
    done = [(point.loss, abs(point.gap or 0.0), point) for point in points if point.loss is not None]
    lowest = min((loss for loss, _, _ in done), default=0.0)
    close = [entry for entry in done if entry[0] <= lowest + tolerance * abs(lowest)]
    return min(close, key=lambda entry: (entry[1], entry[0]))[2] if close else None
