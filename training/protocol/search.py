"""The search for training settings: its trainings, what each found, and which settings are chosen. Pure, free of torch.

One setting at a time (the paper, Training): the recipe's own settings are the centre. Learning rate, dropout and alpha each
take the values of their list while all else stays; epochs are read off one training of the most epochs, at the end of each.
The choice is made for each setting apart, and the choices are combined. The grid trains the product of all lists instead.

Chosen is, of all candidates whose validation loss is within `tolerance` of the lowest, the one whose gap to the training
loss is closest to zero.

Limits: the training loss is measured with dropout and the validation loss without, so the gap of a large dropout is too
small, or negative. One setting at a time sees no interaction, and nobody has trained the combination. A choice on the
validation split of a subsample says nothing yet about the benchmark.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from vcot.pipeline.errors import StageError
from vcot.pipeline.records import Record
from vcot.training.protocol.job import TrainProgress
from vcot.training.protocol.train_sections import SearchMode, SweepSection, TrainSection

Varied = Literal["epochs", "learning_rate", "lora_dropout", "lora_alpha"]
VARIED: tuple[Varied, ...] = get_args(Varied)


class Settings(Record):
    """What the trainings of a search differ in; the names are those of the recipe's `train` section."""

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


@dataclass(frozen=True)
class Training:
    """One training of a search, and the settings that it stands for."""

    train: TrainSection
    reads: tuple[Settings, ...]
    """One for each evaluation that is read; they differ in `epochs`."""
    varies: Varied | None = None
    """What differs from the centre; None for the centre itself, and in a grid."""

    @property
    def label(self) -> str:
        """For a line of progress."""
        return self.reads[-1].label


class SweepPoint(Record):
    """What was measured for one candidate; without a loss where its training failed."""

    job: str
    """The key of its training job."""
    settings: Settings
    varies: Varied | None = None
    """What differs from the centre; None for the centre itself, and in a grid."""
    loss: float | None = None
    """On the validation pairs, after the last step of `settings.epochs`."""
    gap: float | None = None
    """`loss` minus the mean training loss since the evaluation before."""
    reward_accuracy: float | None = None
    reward_margin: float | None = None
    seconds: float = 0.0
    """From the training's first step until then."""
    fault: str = ""
    """Why there is no loss."""


class Sweep(Record):
    """What a search has found so far, in the order of its plan, and the choice."""

    mode: SearchMode
    num_trainings: int
    """Of the whole search."""
    num_train: int
    num_validation: int
    tolerance: float
    centre: Settings
    points: tuple[SweepPoint, ...]
    chosen: Settings | None = None
    """None as long as nothing was trained."""

    @property
    def num_ended(self) -> int:
        """Trainings that are done or failed."""
        return len({point.job for point in self.points})

    @property
    def groups(self) -> dict[str, list[SweepPoint]]:
        """The candidates that are compared with each other: those of each setting, or the whole grid."""
        if self.mode == "grid":
            return {"grid": list(self.points)}
        groups: dict[str, list[SweepPoint]] = {
            name: [p for p in self.points if p.varies in (name, None)] for name in VARIED
        }
        # The epochs' own training has another schedule, so only its evaluations can be compared with each other.
        return {**groups, "epochs": [p for p in self.points if p.varies == "epochs"]}

    @property
    def choices(self) -> dict[str, SweepPoint]:
        """The best candidate of each group that has any with a loss."""
        found = {name: choose(group, self.tolerance) for name, group in self.groups.items()}
        return {name: point for name, point in found.items() if point is not None}


def plan_search(section: SweepSection, centre: TrainSection) -> list[Training]:
    """The trainings of a search around the recipe's own settings, in the order in which they are done."""
    return _plan_grid(section, centre) if section.mode == "grid" else _plan_each(section, centre)


def _plan_grid(section: SweepSection, centre: TrainSection) -> list[Training]:
    """The product of the lists, the short trainings first."""
    values = itertools.product(sorted(section.epochs), section.learning_rate, section.lora_dropout, section.lora_alpha)
    points = (Settings.model_validate(dict(zip(VARIED, point, strict=True))) for point in values)
    return [Training(apply_settings(centre, settings), (settings,)) for settings in points]


def _plan_each(section: SweepSection, recipe: TrainSection) -> list[Training]:
    """The centre, the curve of the epochs, and each other value of each setting."""
    centre = read_settings(recipe)
    trainings = [Training(recipe, (centre,))]
    epochs = sorted(set(section.epochs))
    if epochs != [centre.epochs]:
        reads = tuple(centre.model_copy(update={"epochs": num}) for num in epochs)
        trainings.append(Training(_epoch_curve(recipe, int(epochs[-1])), reads, "epochs"))
    for name in VARIED[1:]:
        values = [value for value in dict.fromkeys(getattr(section, name)) if value != getattr(centre, name)]
        settings = [centre.model_copy(update={name: value}) for value in values]
        trainings += [Training(apply_settings(recipe, each), (each,), name) for each in settings]
    return trainings


def _epoch_curve(recipe: TrainSection, epochs: int) -> TrainSection:
    """One training of so many epochs that is evaluated at the end of each.

    A training of its own falls linearly from its peak to zero, half the peak on average. So does the curve's constant half
    of it: at the end of each epoch, whichever it is, the learning rates that were spent add up to what a training of that
    many epochs spends. Under one linear decay over all epochs, the first of five would have spent 1.8 times as much.
    """
    rate = recipe.learning_rate / 2 if recipe.schedule == "linear" else recipe.learning_rate
    return _change(recipe, epochs=epochs, num_evaluations=epochs, learning_rate=rate, schedule="constant")


def read_settings(train: TrainSection) -> Settings:
    """The settings of a recipe's section."""
    return Settings.model_validate({name: getattr(train, name) for name in VARIED})


def apply_settings(train: TrainSection, settings: Settings) -> TrainSection:
    """The recipe's section with other settings."""
    return _change(train, **settings.model_dump())


def _change(train: TrainSection, **fields: Any) -> TrainSection:
    return TrainSection.model_validate({**train.model_dump(), **fields})


def summarise(job: str, training: Training, progress: Sequence[TrainProgress], fault: str = "") -> list[SweepPoint]:
    """A point for each read of a training, from its curves.

    Raises StageError where a training that did not fail has no validation loss.
    """
    if fault:
        return [SweepPoint(job=job, settings=read, varies=training.varies, fault=fault) for read in training.reads]
    evaluations = [point for point in progress if point.kind == "validation" and point.step]
    if not evaluations:
        raise StageError("a sweep chooses by validation loss, and there is no validation pair; add pairs")
    return [_measure(job, training.varies, read, evaluations) for read in training.reads]


def _measure(job: str, varies: Varied | None, read: Settings, evaluations: Sequence[TrainProgress]) -> SweepPoint:
    found = min(reversed(evaluations), key=lambda point: abs(point.epoch - read.epochs))
    return SweepPoint(
        job=job,
        settings=read,
        varies=varies,
        loss=found.loss,
        gap=found.gap,
        reward_accuracy=found.reward_accuracy,
        reward_margin=found.reward_margin,
        seconds=found.elapsed_s,
    )


def choose(points: Iterable[SweepPoint], tolerance: float) -> SweepPoint | None:
    """The point with the gap closest to zero among those whose loss is within `tolerance` (a share) of the lowest."""
    done = [(point.loss, abs(point.gap or 0.0), point) for point in points if point.loss is not None]
    lowest = min((loss for loss, _, _ in done), default=0.0)
    close = [entry for entry in done if entry[0] <= lowest + tolerance * abs(lowest)]
    return min(close, key=lambda entry: (entry[1], entry[0]))[2] if close else None


def conclude(sweep: Sweep) -> Sweep:
    """The search with its choice: each setting's best, the centre's own where nothing was trained for a setting."""
    choices = sweep.choices
    if not choices:
        return sweep
    if sweep.mode == "grid":
        return sweep.model_copy(update={"chosen": choices["grid"].settings})
    best: Mapping[str, Any] = {name: getattr(point.settings, name) for name, point in choices.items()}
    return sweep.model_copy(update={"chosen": sweep.centre.model_copy(update=best)})


def count_passes(trainings: Iterable[Training], num_train: int) -> int:
    """How often a pair passes the model, forward and backward, over these trainings."""
    return sum(round(training.train.epochs * num_train) for training in trainings)


def measure_rate(progress: Sequence[TrainProgress], num_train: int) -> float | None:
    """Seconds per pass of a pair, evaluations included; None before a twentieth of an epoch is done."""
    if not progress or not num_train or progress[-1].epoch < 0.05:
        return None
    return progress[-1].elapsed_s / (progress[-1].epoch * num_train)


def describe_time(seconds: float) -> str:
    """`40 s`, `25 min` or `3.2 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
