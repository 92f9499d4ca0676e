"""Writes the report: one HTML file that needs no network and no script, with its figures and images inside.

Every text that a model, a data set or a recipe wrote is escaped, and signs in it are written out that would change the
direction of reading, or that a page cannot hold. The page itself forbids scripts and requests (a content security policy),
so that it can be opened wherever it is sent.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

from markupsafe import Markup

from vcot.eval.image_reliance import describe_reliance
from vcot.eval.margins import describe_margins
from vcot.eval.matrix import Matrix
from vcot.eval.matrix_table import describe_logs, describe_reasons
from vcot.eval.prior import describe_prior
from vcot.eval.published import describe_published
from vcot.eval.repeats import describe_repeats
from vcot.eval.report_card import list_figures
from vcot.eval.table import LEVEL, OVERALL, describe_differences, describe_family
from vcot.pipeline.contamination import Match
from vcot.pipeline.files import replace_file
from vcot.pipeline.images import media_type
from vcot.pipeline.judges.verifier import normalise_statement
from vcot.pipeline.prompts import split_thought
from vcot.pipeline.records import ImageRef, PromptName, Task
from vcot.services.recipes.recipe import render_recipe
from vcot.services.report import figures
from vcot.services.report.data import Example, Lookalikes, ReportData
from vcot.services.report.environment import make_environment

_SENTENCE_BREAK = re.compile(r"(?<=[.!?])\s+|\n+")


@dataclass(frozen=True)
class Figure:
    """An SVG element with the sentence that says what it shows."""

    svg: Markup
    caption: str


@dataclass(frozen=True)
class Sentence:
    """A sentence of a thought; `true` is None where the task's source knows no facts."""

    text: str
    true: bool | None


@dataclass(frozen=True)
class Chain:
    """A response, taken apart for the page."""

    kind: str
    score: float
    rationale: str
    thought: tuple[Sentence, ...]
    answer: str


def write_report(data: ReportData, out: Path) -> Path:
    """Write the page to `out`, in one step, and return `out`."""
    page = make_environment().get_template("page.html").render(list_fields(data))
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, page)
    return out


def list_fields(data: ReportData) -> dict[str, Any]:
    """What the page's template is filled with."""
    return {
        "data": data,
        "columns": (OVERALL, *data.benchmark.columns),
        "level": LEVEL,
        "sentences": describe_differences(data.differences),
        "family": describe_family(data.differences) if data.differences else "",
        "reliance_sentences": describe_reliance(data.reliance),
        "margins_sentences": describe_margins(data.margins),
        "repeats_sentences": describe_repeats(data.repeats),
        **_show_matrix(data.matrix),
        "hint_sentence": data.benchmark.note(data.recipe.eval),
        "published_sentence": describe_published(data.published),
        "prior_sentence": describe_prior(data.prior) if data.prior else "",
        "results_figures": _draw_results(data),
        "training_figures": _draw_training(data),
        "judge_figures": _draw_judgments(data),
        "card_figures": list_figures(data.report_card) if data.report_card else [],
        "lookalikes": [_show_lookalikes(pair) for pair in data.lookalikes],
        "examples": [_show_example(example, data.recipe.sample.prompt) for example in data.examples],
        "recipe": render_recipe(data.recipe),
        "version": version("vcot"),
    }


def _show_matrix(found: Matrix | None) -> dict[str, Any]:
    """The parser matrix with a row for each log, or difference of two, and a column for each rule."""
    if found is None:
        return {"matrix": None}
    return {
        "matrix": found,
        "rules": dict.fromkeys(row.rule for row in found.results),
        "logs": [(log, list(own)) for log, own in groupby(found.results, key=lambda row: row.log)],
        "log_differences": [
            (both, list(own)) for both, own in groupby(found.differences, key=lambda d: (d.log, d.base))
        ],
        "matrix_sentences": [*describe_logs(found), " ".join(f"{reason}." for reason in describe_reasons(found))],
    }


def _draw_results(data: ReportData) -> list[Figure]:
    drawn = []
    if any(OVERALL in row.accuracy for row in data.results):
        svg = figures.draw_accuracy(data.results, data.chance[OVERALL])
        drawn.append(
            _figure(svg, "Accuracy over all questions, with 95 % intervals. The dashed line is a uniform guess.")
        )
    if data.differences:
        svg = figures.draw_differences(data.differences)
        caption = "Paired differences with 95 % intervals. True effects within the band would mostly be missed."
        drawn.append(_figure(svg, caption))
    if data.reliance:
        caption = "Accuracy by the image that was shown, with 95 % intervals. What is lost is what the image was worth."
        drawn.append(_figure(figures.draw_reliance(data.reliance), caption))
    if data.margins:
        caption = "Margin of the right option over the best wrong one by what was shown, with 95 % intervals."
        drawn.append(_figure(figures.draw_margins(data.margins), caption))
    if data.trend:
        caption = "Accuracy on the validation split after each round, with 95 % intervals."
        drawn.append(_figure(figures.draw_trend(data.trend), caption))
    return drawn


def _draw_training(data: ReportData) -> list[Figure]:
    if not data.progress:
        return _draw_sweep(data)
    drawn = [_figure(figures.draw_loss(data.progress), _describe_loss(data))]
    if any(point.gap is not None for point in data.progress):
        caption = "How far the validation loss stands above the mean training loss since the evaluation before."
        drawn.append(_figure(figures.draw_gap(data.progress), caption))
    if any(point.reward_accuracy is not None for point in data.progress):
        caption = "Pairs whose chosen response has the higher implicit reward; the dashed line is a coin toss."
        drawn.append(_figure(figures.draw_rewards(data.progress), caption))
    return drawn + _draw_sweep(data)


def _draw_sweep(data: ReportData) -> list[Figure]:
    if data.sweep is None or data.sweep.chosen is None:
        return []
    each = " for each setting apart" if data.sweep.mode == "one_at_a_time" else ""
    caption = (
        f"The search: {data.sweep.num_ended} trainings of {data.sweep.num_trainings} on {data.sweep.num_train} pairs. "
        f"Chosen{each}, with the gap closest to zero of those near the lowest loss: {data.sweep.chosen.label}."
    )
    return [_figure(figures.draw_sweep(data.sweep), caption)]


def _describe_loss(data: ReportData) -> str:
    """The first and the last validation loss, and its gap to the training loss."""
    validation = [point for point in data.progress if point.kind == "validation"]
    if not validation:
        return "Loss over the training steps."
    said = f"Validation loss went from {validation[0].loss:.3f} to {validation[-1].loss:.3f}"
    gap = validation[-1].gap
    return said + ("." if gap is None else f"; its gap to the training loss at the end is {gap:+.3f}.")


def _draw_judgments(data: ReportData) -> list[Figure]:
    drawn = []
    if data.judge_scores:
        mean = sum(data.judge_scores) / len(data.judge_scores)
        svg = figures.draw_histogram(data.judge_scores, "score of a response", "scores")
        drawn.append(
            _figure(svg, f"Scores of {len(data.judge_scores)} responses by {data.judge}, {mean:.2f} on average.")
        )
    if data.gaps:
        mean = sum(data.gaps) / len(data.gaps)
        svg = figures.draw_histogram(data.gaps, "chosen minus rejected score of a pair", "gaps")
        drawn.append(_figure(svg, f"How far apart the two responses of a pair are: {mean:.2f} on average."))
    return drawn


def _figure(svg: str, caption: str) -> Figure:
    # Drawn by us; matplotlib escapes the labels in it.
    return Figure(Markup(svg), caption)  # noqa: S704


def _show_example(example: Example, prompt: PromptName) -> tuple[Example, list[str], tuple[Chain, Chain]]:
    urls = [_image_url(ref, data) for ref, data in zip(example.pair.images, example.images, strict=True)]
    return example, urls, _chains(example, prompt)


def _show_lookalikes(pair: Lookalikes) -> tuple[Match, str, str]:
    return (
        pair.match,
        _image_url(pair.match.trained_image, pair.trained),
        _image_url(pair.match.asked_image, pair.asked),
    )


def _image_url(ref: ImageRef | None, data: bytes) -> str:
    assert ref is not None
    return f"data:{media_type(ref)};base64,{base64.b64encode(data).decode()}"


def _chains(example: Example, prompt: PromptName) -> tuple[Chain, Chain]:
    pair = example.pair
    return (
        _chain("chosen", example.task, prompt, pair.chosen, pair.chosen_score, example.chosen_rationale),
        _chain("rejected", example.task, prompt, pair.rejected, pair.rejected_score, example.rejected_rationale),
    )


def _chain(kind: str, task: Task, prompt: PromptName, text: str, score: float, rationale: str) -> Chain:
    """A response as sentences, each checked against the task's facts where it has any."""
    thought, answer = split_thought(prompt, text)
    facts = {normalise_statement(fact) for fact in task.facts}
    sentences: Sequence[str] = [text] if thought is None else _SENTENCE_BREAK.split(thought)
    checked = tuple(
        Sentence(sentence, normalise_statement(sentence) in facts if facts and thought is not None else None)
        for sentence in sentences
        if sentence.strip()
    )
    return Chain(kind, score, rationale, checked, answer or "")
