"""Whether a model says what it sees or what it expects (the paper, Figure 4), from scores on drawings of unusual things.

Each question is asked about two drawings. On the contradicting one the expected option (`Score.prior`) is wrong: an answer
is as seen, the prior's, another wrong one, or unreadable, and each is counted apart. On the usual one it is right, which
shows how often the model recognises the drawing at all: a prior's answer means little from a model that fails there, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import RenderableType
from rich.text import Text

from vcot.eval.findings import Difference
from vcot.eval.statistics import chance_level, estimate_accuracy
from vcot.eval.table import (
    LEVEL,
    build_differences,
    fill_by_checkpoint,
    format_estimate,
    format_p,
    list_settings,
    new_table,
    select_scores,
)
from vcot.pipeline.records import CheckpointRef, Interval, PromptName, Record, Score


class PriorRow(Record):
    """One checkpoint under one prompt and temperature."""

    checkpoint: CheckpointRef
    prompt: PromptName
    temperature: float
    usual: Interval
    """Share of right answers about the usual drawings."""
    seen: Interval
    """Share of right answers about the contradicting drawings."""
    prior: Interval
    """Share of answers about the contradicting drawings that assert the usual state."""
    other: float
    """Share that is wrong in another way."""
    no_answer: float
    """Share that could not be read."""
    num_failed: int
    """Requests without an answer, in no share."""


class PriorReport(Record):
    """What asking about the unusual things found; `prior.json` in the run's report folder."""

    rows: tuple[PriorRow, ...]
    differences: tuple[Difference, ...]
    """Of the share that follows the prior: each later checkpoint minus the first, paired by drawing."""
    chance: float
    """How often a uniform guess follows the prior."""
    num_drawings: int
    """Contradicting ones; there are as many usual ones."""


def build_prior(scores: Sequence[Score], checkpoints: Sequence[CheckpointRef]) -> PriorReport:
    """The report on scores of questions with a prior, for each checkpoint, prompt and temperature in that order."""
    contradicted = [score for score in scores if score.prior != score.target]
    follows = [
        score.model_copy(update={"value": "correct" if score.answer == score.prior else "incorrect"})
        for score in contradicted
        if score.error is None
    ]
    rows = [
        row
        for checkpoint in checkpoints
        for setting in list_settings(scores)
        if (row := _build_row(_select(scores, checkpoint, setting), checkpoint)) is not None
    ]
    questions = {score.task: score.num_choices for score in contradicted}
    return PriorReport(
        rows=tuple(rows),
        differences=tuple(build_differences(follows, checkpoints[0], checkpoints[1:])),
        chance=chance_level(list(questions.values())),
        num_drawings=len(questions),
    )


def _select(scores: Sequence[Score], checkpoint: CheckpointRef, setting: tuple[PromptName, float]) -> list[Score]:
    return [score for score in select_scores(scores, setting) if score.checkpoint == checkpoint.digest]


def _build_row(scores: Sequence[Score], checkpoint: CheckpointRef) -> PriorRow | None:
    """The row of one setting; None where one of the two kinds of drawings has no answer."""
    answered = [score for score in scores if score.error is None]
    usual = [score for score in answered if score.prior == score.target]
    odd = [score for score in answered if score.prior != score.target]
    if not usual or not odd:
        return None
    follows = [score.answer == score.prior for score in odd]
    seen = [score.value == "correct" for score in odd]
    unread = sum(score.value == "no_answer" for score in odd)
    return PriorRow(
        checkpoint=checkpoint,
        prompt=odd[0].prompt,
        temperature=odd[0].temperature,
        usual=estimate_accuracy([score.value == "correct" for score in usual], [_drawing(score) for score in usual]),
        seen=estimate_accuracy(seen, [_drawing(score) for score in odd]),
        prior=estimate_accuracy(follows, [_drawing(score) for score in odd]),
        other=(len(odd) - sum(seen) - sum(follows) - unread) / len(odd),
        no_answer=unread / len(odd),
        num_failed=len(scores) - len(answered),
    )


def _drawing(score: Score) -> str:
    return score.image or score.task


def describe_prior(report: PriorReport) -> str:
    """What the report shows, in plain sentences."""
    clear = [d for d in report.differences if d.p_holm < LEVEL]
    said = [
        f"{d.policy.name} asserts the usual state {'less' if d.accuracy.value < 0 else 'more'} often than {d.base.name} "
        f"with "
        f"{d.prompt} at {d.temperature:g} ({100 * d.accuracy.value:+.1f} points, {format_p(d.p_holm)})."
        for d in clear
    ]
    if report.differences and not clear:
        said.append("Between the checkpoints nothing can be told from noise.")
    guess = (
        f"A uniform guess would assert the usual state in {100 * report.chance:.0f} % of the contradicting drawings."
    )
    return " ".join([*said, guess])


def render_prior(report: PriorReport) -> list[RenderableType]:
    """The rows for a terminal, and what they say."""
    table = new_table(
        f"Seen or expected: {report.num_drawings} drawings that contradict the usual state, in %",
        "usual: right about the usual drawings. ±: half of the 95 % interval. other, unread: wrong, unreadable.",
        ("usual", "as seen", "the prior", "other", "unread", "failed"),
    )
    return [fill_by_checkpoint(table, report.rows, _list_cells), Text(f"\n{describe_prior(report)}")]


def _list_cells(row: PriorRow) -> Iterable[str]:
    shares = [format_estimate(interval, 4) for interval in (row.usual, row.seen, row.prior)]
    rest = [f"{100 * row.other:.1f}", f"{100 * row.no_answer:.1f}", str(row.num_failed)]
    return f"  {row.prompt} {row.temperature:g}", *shares, *rest
