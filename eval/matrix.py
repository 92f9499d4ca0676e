"""The parser matrix: the accuracy of the same outputs under several rules, what each could not read, and how logs differ.

Beside every accuracy stand the share without an answer and the accuracy among the responses that were read: a gain in
format moves the first, a gain in reasoning the second. Intervals and tests are those of vcot's own evaluations
(eval/statistics.py): clustered by image, paired by question.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vcot.eval.benchmark import Benchmark
from vcot.eval.logged.readings import Readings
from vcot.eval.rules import RULES
from vcot.eval.statistics import adjust_holm, compare_paired, estimate_accuracy
from vcot.eval.table import OVERALL
from vcot.pipeline.records import Interval, Record, StageCount, Task

Shares = NDArray[np.float64]


class RuleResult(Record):
    """One log under one rule."""

    log: str
    rule: str
    accuracy: dict[str, Interval]
    """By `Avg` and the benchmark's columns; one without responses is absent. What was not read is not correct, or where the
    rule's original guesses, worth 1 / number of options."""
    of_read: float | None
    """The accuracy among the responses that were read; None where none was."""
    no_answer: float
    """The share of responses in which the rule read none."""
    reasons: dict[str, int]
    """Why, and how often."""
    guesses: bool
    num_questions: int
    num_scored: int


class LogDifference(Record):
    """Two logs under one rule, on the questions that both answered: `log` minus `base`."""

    log: str
    base: str
    rule: str
    accuracy: Interval
    """The paired difference, in [-1, 1]."""
    no_answer: float
    """That of the shares without an answer, on the same questions."""
    p_value: float
    p_holm: float
    """After Holm's correction for all differences that are shown together."""
    mde: float
    """The smallest true difference that would be found with 80 % power at the 5 % level."""
    num_questions: int


class LogAccount(Record):
    """What became of a log's rows, and which questions have none."""

    log: str
    count: StageCount
    examples: dict[str, tuple[str, ...]]
    """By reason, some of the rows that are not scored."""
    num_asked: int
    """Questions of the benchmark."""
    num_missing: int
    missing: tuple[str, ...] = ()
    """Some of those without a response."""


class Matrix(Record):
    """What `vcot score` found."""

    benchmark: str
    split: str
    chance: dict[str, float]
    """The accuracy of a uniform guess, by column, on all questions."""
    accounts: tuple[LogAccount, ...]
    results: tuple[RuleResult, ...]
    differences: tuple[LogDifference, ...]
    notes: tuple[str, ...] = ()
    """Sentences on how the answers were scored."""


@dataclass(frozen=True)
class Gold:
    """What a benchmark's questions say, as arrays."""

    columns: Sequence[str]
    """Of its table, after the average."""
    column_of: NDArray[np.str_]
    """By question; empty for none beside the average."""
    clusters: NDArray[np.intp]
    """By question: questions about one image are of one cluster."""
    right: Shares
    """By question and option: 1 where it is right."""
    chance: Shares
    """By question: how often a uniform guess is right."""


@dataclass(frozen=True)
class Read:
    """One log under one rule, as arrays by response, in the order of the log."""

    tasks: NDArray[np.int32]
    """Numbers of questions."""
    marks: Shares
    """What each response is worth."""
    is_read: NDArray[np.bool_]


def build_gold(tasks: Sequence[Task], benchmark: Benchmark) -> Gold:
    """The arrays of a benchmark's questions, each with a gold answer; one without options cannot be guessed."""
    clusters: dict[str, int] = {}
    right = np.zeros((len(tasks), 26))
    for number, task in enumerate(tasks):
        right[number, : len(task.choices)] = task.right_options
    images = [task.picture or task.id for task in tasks]
    return Gold(
        columns=benchmark.columns,
        column_of=np.array([benchmark.column_of(task) or "" for task in tasks]),
        clusters=np.array([clusters.setdefault(image, len(clusters)) for image in images], dtype=np.intp),
        right=right,
        chance=np.array([1 / len(task.choices) if task.choices else 0.0 for task in tasks]),
    )


def mark(readings: Readings, rule: str, gold: Gold) -> Read:
    """What the responses of a log are worth under a rule."""
    tasks = np.concatenate(readings.tasks)
    if readings.points:
        points = np.concatenate(readings.points)
        return Read(tasks, np.nan_to_num(points, nan=0.0), ~np.isnan(points))
    picks = np.concatenate(readings.picks[rule])
    is_read = picks >= 0
    unread = gold.chance[tasks] if RULES.resolve(rule).guesses else 0.0
    return Read(tasks, np.where(is_read, gold.right[tasks, picks], unread), is_read)


def build_result(log: str, rule: str, read: Read, reasons: Mapping[str, int], gold: Gold) -> RuleResult:
    """The figures of a log, which holds a response at least."""
    columns = gold.column_of[read.tasks]
    clusters = gold.clusters[read.tasks]
    parts = {OVERALL: np.ones(len(columns), dtype=bool)} | {column: columns == column for column in gold.columns}
    return RuleResult(
        log=log,
        rule=rule,
        accuracy={
            column: estimate_accuracy(read.marks[part], clusters[part].tolist())
            for column, part in parts.items()
            if part.any()
        },
        of_read=float(read.marks[read.is_read].mean()) if read.is_read.any() else None,
        no_answer=1 - float(read.is_read.mean()),
        reasons=dict(Counter(reasons).most_common()),
        guesses=RULES.resolve(rule).guesses,
        num_questions=len(np.unique(read.tasks)),
        num_scored=len(read.tasks),
    )


def build_chance(gold: Gold) -> dict[str, float]:
    """The accuracy of a uniform guess, by column."""
    parts = {column: gold.chance[gold.column_of == column] for column in gold.columns}
    return {column: float(part.mean()) for column, part in ({OVERALL: gold.chance} | parts).items() if part.size}


@dataclass(frozen=True)
class Pair:
    """Two logs under one rule."""

    log: str
    base: str
    rule: str
    read: Read
    base_read: Read


def build_differences(pairs: Sequence[Pair], gold: Gold) -> list[LogDifference]:
    """Each pair's, on the questions that both answered; without a common one it has none."""
    found = [(pair, common) for pair in pairs if (common := _find_common(pair)).size]
    results = [
        compare_paired(
            _average(pair.base_read, pair.base_read.marks)[common],
            _average(pair.read, pair.read.marks)[common],
            gold.clusters[common].tolist(),
        )
        for pair, common in found
    ]
    adjusted = adjust_holm([result.p_value for result in results])
    return [
        LogDifference(
            log=pair.log,
            base=pair.base,
            rule=pair.rule,
            accuracy=result.interval,
            no_answer=_unread(pair.read, common) - _unread(pair.base_read, common),
            p_value=result.p_value,
            p_holm=p_holm,
            mde=result.mde,
            num_questions=len(common),
        )
        for (pair, common), result, p_holm in zip(found, results, adjusted, strict=True)
    ]


def _find_common(pair: Pair) -> NDArray[np.int32]:
    return np.intersect1d(pair.read.tasks, pair.base_read.tasks)


def _average(read: Read, values: Shares) -> Shares:
    """The mean of the responses' values by question, up to the last that has one; 0 for a question without a response."""
    sums, numbers = np.bincount(read.tasks, weights=values), np.bincount(read.tasks)
    return np.asarray(sums / np.maximum(1, numbers), dtype=np.float64)


def _unread(read: Read, questions: NDArray[np.int32]) -> float:
    return float(_average(read, np.where(read.is_read, 0.0, 1.0))[questions].mean())
