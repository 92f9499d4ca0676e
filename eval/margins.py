"""Log-probability margins: by how much the right option is likelier than the best wrong one, under each image.

The margin of a question is log p(right option) - log p(likeliest wrong option), in nats, as the server tells it
(pipeline/option_scores.py). It moves where an accuracy does not: a model may look at its image and still pick what it
picked. Above 0 the right option is the likeliest. Means are clustered by image, as all figures are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from rich.console import RenderableType
from rich.text import Text

from vcot.eval.statistics import adjust_holm, estimate_accuracy, estimate_mean
from vcot.eval.table import LEVEL, fill_by_checkpoint, format_p_cell, list_phrases, new_table
from vcot.pipeline.odds import OptionScores
from vcot.pipeline.records import CheckpointRef, Interval, Record, ShownImage, Task

Margins = Mapping[ShownImage, Sequence[OptionScores]]
"""By the image that was shown; errors included."""


class Margin(Record):
    """The margins of one checkpoint, asked about one kind of image."""

    checkpoint: CheckpointRef
    shown: ShownImage
    margin: Interval
    """The mean, in nats; not bounded."""
    right: Interval
    """Share of the questions whose right option is the likeliest."""
    lost: Interval | None = None
    """The paired difference: the mean margin with the true image minus this one, in nats; None of the true image."""
    p_value: float | None = None
    """Two-sided, that nothing is lost."""
    p_holm: float | None = None
    """`p_value` after Holm's correction for all the rows that are reported together."""
    num_questions: int
    num_failed: int = 0
    """Questions of which the server told nothing; they are in no figure."""


def build_margins(found: Margins, tasks: Sequence[Task], checkpoints: Sequence[CheckpointRef]) -> list[Margin]:
    """A row per checkpoint and kind of image; none where nothing was told."""
    asked = {task.id: task for task in tasks}
    rows = [
        row
        for checkpoint in checkpoints
        for shown in found
        if (row := _build_row(found, asked, checkpoint, shown)) is not None
    ]
    compared = [row.p_value for row in rows if row.p_value is not None]
    adjusted = iter(adjust_holm(compared))
    return [row if row.p_value is None else row.model_copy(update={"p_holm": next(adjusted)}) for row in rows]


def _build_row(
    found: Margins, asked: Mapping[str, Task], checkpoint: CheckpointRef, shown: ShownImage
) -> Margin | None:
    margins, num_failed = _read_margins(found[shown], asked, checkpoint)
    if not margins:
        return None
    images = [asked[task].picture or task for task in margins]
    mean, _ = estimate_mean(list(margins.values()), images)
    row = Margin(
        checkpoint=checkpoint,
        shown=shown,
        margin=mean,
        right=estimate_accuracy([margin > 0 for margin in margins.values()], images),
        num_questions=len(margins),
        num_failed=num_failed,
    )
    true, _ = _read_margins(found["true"], asked, checkpoint)
    both = [task for task in margins if task in true]
    if shown == "true" or not both:
        return row
    lost = [true[task] - margins[task] for task in both]
    interval, p_value = estimate_mean(lost, [asked[task].picture or task for task in both])
    return row.model_copy(update={"lost": interval, "p_value": p_value})


def _read_margins(
    scores: Sequence[OptionScores], asked: Mapping[str, Task], checkpoint: CheckpointRef
) -> tuple[dict[str, float], int]:
    """The margin of each question that the server told of, and how many there are of the others."""
    own = [each for each in scores if each.checkpoint == checkpoint.digest]
    told = [each for each in own if each.error is None]
    return {each.task: each.margin(asked[each.task].right_options) for each in told}, len(own) - len(told)


def describe_margins(rows: Sequence[Margin]) -> list[str]:
    """What the rows show, in plain sentences, some for each checkpoint."""
    return [
        " ".join(_describe_checkpoint(name, [row for row in rows if row.checkpoint.name == name]))
        for name in dict.fromkeys(row.checkpoint.name for row in rows)
    ]


def _describe_checkpoint(name: str, rows: Sequence[Margin]) -> Iterator[str]:
    for row in rows:
        if row.shown == "true":
            low, high = sorted((row.margin.low, row.margin.high))
            is_clear = low > 0 or high < 0
            way = "likelier" if row.margin.value > 0 else "less likely"
            told = f"{abs(row.margin.value):.2f} nats {way} than the best wrong one (a factor of {_factor(row)})"
            unclear = "" if is_clear else ", which could be noise"
            yield f"With its own image {name} finds the right option {told}{unclear}."
    compared = [row for row in rows if row.p_holm is not None and row.lost is not None]
    clear = [row for row in compared if (row.p_holm or 0) < LEVEL]
    parts = [f"{row.lost.value:+.2f} nats with {row.shown}" for row in clear if row.lost is not None]
    if parts:
        yield f"The margin lost without it is {list_phrases(parts)}."
    elif compared:
        yield "No other image changes the margin by what could be told from noise."


def _factor(row: Margin) -> str:
    return f"{math.exp(min(abs(row.margin.value), 99)):.3g}"


def render_margins(rows: Sequence[Margin]) -> list[RenderableType]:
    """The rows for a terminal, and what they say."""
    table = new_table(
        "Margins: log p(right option) - log p(best wrong option), in nats",
        "right: % of the questions whose right option is the likeliest. lost: the true image's margin minus this one's. "
        f"p is corrected (Holm) for all {sum(row.lost is not None for row in rows)} comparisons together.",
        ("margin", "95 % interval", "right", "lost", "95 % interval", "p", "questions"),
    )
    fill_by_checkpoint(table, rows, _list_cells)
    return [table, *(Text(f"\n{text}") for text in describe_margins(rows))]


def _list_cells(row: Margin) -> Iterator[str]:
    yield f" {row.shown}"
    yield f"{row.margin.value:+.2f}"
    yield f"{row.margin.low:+.2f} to {row.margin.high:+.2f}"
    yield f"{100 * row.right.value:.1f}"
    if row.lost is None or row.p_holm is None:
        yield from ("", "", "")
    else:
        yield f"{row.lost.value:+.2f}"
        yield f"{row.lost.low:+.2f} to {row.lost.high:+.2f}"
        yield format_p_cell(row.p_holm)
    yield f"{row.num_questions}" + (f", {row.num_failed} failed" if row.num_failed else "")
