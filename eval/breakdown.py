"""An accuracy by a benchmark's finer labels: ScienceQA's grade, context and topic, as its authors' table has them.

A question may have several labels of one kind (a passage and an image), and counts under each, so that the rows of a kind
need not add up to all questions. Chance stands beside each row: labels differ in their number of options.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table
from rich.text import Text

from vcot.eval.statistics import chance_level, estimate_accuracy
from vcot.eval.table import format_estimate, list_settings, new_table, select_scores
from vcot.pipeline.records import CheckpointRef, Interval, PromptName, Record, Score


class PartRow(Record):
    """One checkpoint under one prompt and temperature, on the questions that have a label."""

    checkpoint: CheckpointRef
    prompt: PromptName
    temperature: float
    kind: str
    """What the label says: `grade`."""
    label: str
    """As `G1-6`."""
    accuracy: Interval
    chance: float
    num_questions: int


def build_breakdown(scores: Sequence[Score], checkpoints: Sequence[CheckpointRef]) -> list[PartRow]:
    """A row for each label, of each checkpoint, prompt and temperature; none where scores have no labels."""
    rows = []
    for checkpoint in checkpoints:
        own = [score for score in scores if score.checkpoint == checkpoint.digest and score.error is None]
        for setting in list_settings(own):
            group = select_scores(own, setting)
            rows += [_build_row(checkpoint, label, _having(group, label)) for label in _list_labels(group)]
    return rows


def _list_labels(scores: Iterable[Score]) -> list[tuple[str, str]]:
    """Kinds in the order in which they come, the labels of each sorted."""
    found = {label for score in scores for label in score.labels}
    kinds = list(dict.fromkeys(kind for score in scores for kind, _ in score.labels))
    return sorted(found, key=lambda label: (kinds.index(label[0]), label[1]))


def _having(scores: Iterable[Score], label: tuple[str, str]) -> list[Score]:
    return [score for score in scores if label in score.labels]


def _build_row(checkpoint: CheckpointRef, label: tuple[str, str], scores: Sequence[Score]) -> PartRow:
    kind, name = label
    options = {score.task: score.num_choices for score in scores}
    return PartRow(
        checkpoint=checkpoint,
        prompt=scores[0].prompt,
        temperature=scores[0].temperature,
        kind=kind,
        label=name,
        accuracy=estimate_accuracy([score.earned for score in scores], [score.image or score.task for score in scores]),
        chance=chance_level(list(options.values())),
        num_questions=len(options),
    )


def render_breakdown(rows: Sequence[PartRow]) -> Table:
    """A row for each label and checkpoint, a column for each prompt and temperature, for a terminal."""
    settings = list(dict.fromkeys((row.prompt, row.temperature) for row in rows))
    table = new_table(
        "Accuracy in % by label, ± half of the 95 % interval (clustered by image)",
        "A question counts under each label that it has.",
        (*(f"{prompt} {temperature:g}" for prompt, temperature in settings), "chance", "n"),
    )
    for checkpoint in dict.fromkeys(row.checkpoint for row in rows):
        table.add_row(Text(checkpoint.name, style="bold"))
        own = [row for row in rows if row.checkpoint == checkpoint]
        for kind, label in dict.fromkeys((row.kind, row.label) for row in own):
            parts = {(row.prompt, row.temperature): row for row in own if (row.kind, row.label) == (kind, label)}
            cells = [format_estimate(parts[setting].accuracy) if setting in parts else "" for setting in settings]
            one = next(iter(parts.values()))
            table.add_row(f"  {kind} {label}", *cells, f"{100 * one.chance:.1f}", str(one.num_questions))
    return table
