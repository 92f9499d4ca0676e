"""What the page shows: filled by the command that knows the run, so that the page itself reads no run directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vcot.eval.benchmark import Benchmark
from vcot.eval.breakdown import PartRow
from vcot.eval.findings import Difference, EvalResult
from vcot.eval.image_reliance import Reliance
from vcot.eval.margins import Margin
from vcot.eval.matrix import Matrix
from vcot.eval.prior import PriorReport
from vcot.eval.published import PaperRow
from vcot.eval.repeats import Repeats
from vcot.eval.report_card import ReportCard
from vcot.pipeline.contamination import Contamination, Match
from vcot.pipeline.judges.cost import Cost
from vcot.pipeline.pairs import PreferencePair
from vcot.pipeline.records import CheckpointRef, Record, StageCount, Task
from vcot.services.recipes.recipe import Recipe
from vcot.services.run.parity import ParityReport
from vcot.training.protocol.job import TrainProgress, TrainStatus
from vcot.training.protocol.search import Sweep


@dataclass(frozen=True)
class Example:
    """A task with its best and worst response, as the judge saw them."""

    task: Task
    images: Sequence[bytes]
    """The stored files' bytes, PNG or JPEG."""
    pair: PreferencePair
    chosen_rationale: str
    """The judge's reason for the score."""
    rejected_rationale: str


@dataclass(frozen=True)
class Lookalikes:
    """Two pictures that are alike, of training and of the evaluation."""

    match: Match
    trained: bytes
    """The stored file's bytes, as of `asked`."""
    asked: bytes


class Lesson(Record):
    """What a round was made of."""

    reference: str
    """Name of the checkpoint that training pulled towards."""
    num_tasks: int
    num_pairs: int
    ties: float
    """Share of the tasks that gave no pair because best and worst scored alike."""
    mean_score: float
    """The judge's, over all responses of the policy that the round started from."""
    mean_tokens: float | None
    """Length of those responses; None where the server did not say."""
    reward_margin: float | None
    """On the validation pairs at the end of training; None where there were none."""


class TrendRow(Record):
    """The base (number 0), or a round and its policy, on the validation split."""

    number: int
    checkpoint: CheckpointRef
    lesson: Lesson | None
    accuracy: float
    """Over all prompts and temperatures; what a round is chosen by."""
    results: tuple[EvalResult, ...]
    reliance: tuple[Reliance, ...]
    is_chosen: bool = False


@dataclass(frozen=True)
class ReportData:
    """A whole run, as far as it has come; what is empty is said to be missing."""

    recipe: Recipe
    benchmark: Benchmark
    settings: str
    """One sentence: those of the run's recipe, or where they differ."""
    checkpoints: tuple[CheckpointRef, ...]
    """Those that were evaluated, the base first."""
    counts: tuple[StageCount, ...]
    judge: str
    """The judge and its version."""
    judge_scores: tuple[float, ...]
    """Of every judged response."""
    gaps: tuple[float, ...]
    """Chosen minus rejected score, of every pair."""
    num_left_out: int
    """Pairs beyond the recipe's `pairs.num`."""
    results: tuple[EvalResult, ...]
    differences: tuple[Difference, ...]
    chance: Mapping[str, float]
    """By column of Table 1."""
    published: tuple[PaperRow, ...] = ()
    """The base model beside the paper's figures, where they are of the same model and benchmark."""
    reliance: tuple[Reliance, ...] = ()
    """Where other images than the questions' own were shown, too."""
    margins: tuple[Margin, ...] = ()
    """Where the server was asked how likely each option is."""
    breakdown: tuple[PartRow, ...] = ()
    """By the benchmark's finer labels, where it has some."""
    repeats: tuple[Repeats, ...] = ()
    """Where questions were answered several times."""
    matrix: Matrix | None = None
    """The same answers under other harnesses' rules."""
    prior: PriorReport | None = None
    """Where the drawings of unusual things were asked about."""
    trend: tuple[TrendRow, ...] = ()
    """Of several rounds."""
    training: TrainStatus | None = None
    parity: tuple[ParityReport, ...] = ()
    """Of the checkpoints that were compared as served."""
    judge_cost: Cost | None = None
    """What the judgments took; None for a program."""
    report_card: ReportCard | None = None
    """The judge's, where it was audited."""
    contamination: Contamination | None = None
    """Of the training questions with the evaluation's; None where it was not looked for."""
    lookalikes: tuple[Lookalikes, ...] = ()
    progress: tuple[TrainProgress, ...] = ()
    sweep: Sweep | None = None
    examples: tuple[Example, ...] = field(default=())
