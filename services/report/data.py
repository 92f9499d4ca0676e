"""What the page shows: filled by the command that knows the run, so that the page itself reads no run directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.recipe import Recipe
from pipeline.records import CheckpointRef, Difference, EvalResult, PreferencePair, StageCount, Task
from services.parity import ParityReport
from training.job import TrainProgress, TrainStatus


@dataclass(frozen=True)
class Example:
    """A task with its best and worst response, as the judge saw them."""

    task: Task
    image: bytes
    """The stored file's bytes, PNG or JPEG."""
    pair: PreferencePair
    chosen_rationale: str
    """The judge's reason for the score."""
    rejected_rationale: str


@dataclass(frozen=True)
class ReportData:
    """A whole run, as far as it has come; what is empty is said to be missing."""

    recipe: Recipe
    checkpoints: tuple[CheckpointRef, ...]
    """Those that were evaluated, the base first."""
    counts: tuple[StageCount, ...]
    judge: str
    """The judge and its version."""
    judge_scores: tuple[float, ...]
    """Of every judged response."""
    gaps: tuple[float, ...]
    """Best minus worst score, of every pair."""
    results: tuple[EvalResult, ...]
    differences: tuple[Difference, ...]
    chance: Mapping[str, float]
    """By column of Table 1."""
    training: TrainStatus | None = None
    parity: tuple[ParityReport, ...] = ()
    """Of the checkpoints that were compared as served."""
    progress: tuple[TrainProgress, ...] = ()
    examples: tuple[Example, ...] = field(default=())
