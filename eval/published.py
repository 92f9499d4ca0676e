"""The paper's Table 1 beside ours: the same weights and questions, another harness.

The paper gives accuracies and no uncertainty, and no answers question by question, so the difference is unpaired: the
variance of ours (clustered by image) and the binomial one of the paper's figure at its number of questions add up. Shown
only for the model and the benchmark that the figures are of.

Limits: a difference may come from prompt, parser, image size or sampling code as well as from chance; published figures of
these weights on these questions lie up to ten points apart.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Sequence
from importlib import resources

from rich.console import RenderableType
from rich.text import Text

from vcot.eval.eval_section import EvalSection
from vcot.eval.findings import EvalResult
from vcot.eval.statistics import compare_unpaired
from vcot.eval.table import OVERALL, fill_by_checkpoint, format_range, list_phrases, new_table
from vcot.pipeline.records import CheckpointRef, Interval, PromptName, Record, Split


class PublishedAccuracy(Record):
    """One figure of the paper's table, over all questions."""

    prompt: PromptName
    temperature: float
    accuracy: float


class Published(Record):
    """What was published of one model on one benchmark (`published.toml`)."""

    source: str
    model: str
    """As a recipe names it: an id on the hub."""
    benchmark: str
    """As a recipe names it."""
    split: Split
    num_questions: int
    rows: tuple[PublishedAccuracy, ...]


class PaperRow(Record):
    """One of our figures beside the paper's."""

    checkpoint: CheckpointRef
    prompt: PromptName
    temperature: float
    ours: Interval
    paper: float
    difference: Interval
    """`ours` - `paper`, unpaired, in [-1, 1]."""
    mde: float
    """The smallest true difference that both numbers of questions find with 80 % power at the 5 % level."""
    source: str
    """Where the paper's figure stands."""

    @property
    def is_clear(self) -> bool:
        """Whether chance alone does not explain the difference."""
        return not self.difference.low <= 0 <= self.difference.high


def load_published() -> Published:
    """The bundled figures."""
    text = resources.files(__package__).joinpath("published.toml").read_text("utf-8")
    return Published.model_validate(tomllib.loads(text))


def compare_published(
    results: Sequence[EvalResult], section: EvalSection, model: str, published: Published
) -> list[PaperRow]:
    """A row for each figure of the base model that the paper has, too; none for another model or benchmark, or where a judge
    scores the answers.
    """
    asked = (model, section.benchmark, section.split)
    if asked != (published.model, published.benchmark, published.split) or section.hint or section.judge:
        return []
    paper = {(row.prompt, row.temperature): row.accuracy for row in published.rows}
    rows = []
    for result in results:
        share, ours = paper.get((result.prompt, result.temperature)), result.accuracy.get(OVERALL)
        if result.checkpoint.kind != "base" or share is None or ours is None or ours.n < 2:
            continue
        difference, mde = compare_unpaired(ours, share, published.num_questions)
        rows.append(
            PaperRow(
                checkpoint=result.checkpoint,
                prompt=result.prompt,
                temperature=result.temperature,
                ours=ours,
                paper=share,
                difference=difference,
                mde=mde,
                source=published.source,
            )
        )
    return rows


def describe_published(rows: Sequence[PaperRow]) -> str:
    """Which figures differ by more than noise, and what differences could be told from it; nothing for no rows."""
    if not rows:
        return ""
    clear = [row for row in rows if row.is_clear]
    found = [f"{row.prompt} at {row.temperature:g} ({100 * row.difference.value:+.1f} points)" for row in clear]
    sentences = [f"{rows[0].checkpoint.name} differs from the paper with {list_phrases(found)}."] if found else []
    if rest := len(rows) - len(clear):
        figures = "figure" if rest == 1 else f"{rest} figures"
        sentences.append(f"The {'other ' if clear else ''}{figures} cannot be told from the paper's.")
    seen = format_range([row.mde for row in rows])
    sentences.append(
        f"With this many questions on both sides, true differences of {seen} points are told from noise four times in five. "
        "The weights are the same; prompt, parser and sampling may not be."
    )
    return " ".join(sentences)


def render_published(rows: Sequence[PaperRow]) -> list[RenderableType]:
    """The rows for a terminal, and what they say."""
    table = new_table(
        f"Beside {rows[0].source}, in %",
        "unpaired: the paper gives no answers. detectable: with 80 % power at 5 %.",
        ("ours", "paper", "difference", "95 % interval", "detectable"),
    )
    return [fill_by_checkpoint(table, rows, _list_cells), Text(f"\n{describe_published(rows)}")]


def _list_cells(row: PaperRow) -> Iterable[str]:
    interval = f"{100 * row.difference.low:+.1f} to {100 * row.difference.high:+.1f}"
    figures = (f"{100 * row.ours.value:.1f}", f"{100 * row.paper:.1f}", f"{100 * row.difference.value:+.1f}")
    return f"  {row.prompt} {row.temperature:g}", *figures, interval, f"{100 * row.mde:.1f}"
