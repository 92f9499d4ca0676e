"""The trend over iterated rounds: what each was made of, and how its policy does on the validation split.

The validation split chooses the round whose policy the benchmark then sees; the benchmark itself chooses nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from vcot.eval.findings import EvalResult
from vcot.eval.image_reliance import build_reliance
from vcot.eval.table import OVERALL, build_results, format_estimate, new_table
from vcot.pipeline.records import Score
from vcot.services.checkpoints.registry import Checkpoint
from vcot.services.jobs.trainer import read_progress
from vcot.services.report.data import Lesson, TrendRow
from vcot.services.run.rounds import Round
from vcot.services.run.session import Session
from vcot.services.run.steps import load_scores


@dataclass(frozen=True)
class ChosenRound:
    """The round that a run's benchmark is about."""

    round: Round
    trend: tuple[TrendRow, ...]
    """What it was chosen by; empty for a run of one round."""

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """The base, and the round's policy where there is one."""
        return [self.round.session.base, *filter(None, [self.round.policy])]


def choose_round(session: Session, rounds: Sequence[Round]) -> ChosenRound:
    """The round whose policy answers most questions of the validation split right; the earlier of equals.

    Raises InputError where a policy of several has not been asked them.
    """
    trained = [(current, policy) for current in rounds if (policy := current.policy) is not None]
    if session.run.recipe.rounds.num == 1 or not trained:
        return ChosenRound(rounds[0], ())
    rows = [_row(session, current, policy) for current, policy in trained]
    best = max(range(len(rows)), key=lambda index: rows[index].accuracy)
    rows[best] = rows[best].model_copy(update={"is_chosen": True})
    return ChosenRound(trained[best][0], (_row(session, None, session.base), *rows))


def _row(session: Session, current: Round | None, checkpoint: Checkpoint) -> TrendRow:
    section = session.run.recipe.eval
    scores = load_scores(session, [checkpoint], "validation")
    return TrendRow(
        number=current.number if current else 0,
        checkpoint=checkpoint.ref,
        lesson=_describe(current) if current else None,
        accuracy=_mean_correct(scores["true"]),
        results=tuple(
            build_results(
                scores["true"],
                [checkpoint.ref],
                session.benchmark.columns,
                seed=section.seed,
                num_samples=section.num_samples * section.num_seeds,
            )
        ),
        reliance=tuple(build_reliance(scores, [checkpoint.ref])),
    )


def _mean_correct(scores: Sequence[Score]) -> float:
    good = [score.earned for score in scores if score.error is None]
    return sum(good) / len(good) if good else 0.0


def _describe(current: Round) -> Lesson:
    pairs, num_responses, usages = current.pairs, 0, []
    for group in current.groups:
        num_responses += len(group.good)
        usages += [response.usage.completion_tokens for response in group.good if response.usage]
    margins = [point.reward_margin for point in read_progress(current.job_directory) if point.kind == "validation"]
    return Lesson(
        reference=current.reference.ref.name,
        num_tasks=len(current.tasks),
        num_pairs=len(pairs.pair_set.pairs),
        ties=pairs.pair_set.num_ties / len(current.tasks),
        mean_score=sum(pairs.scores) / len(pairs.scores),
        mean_tokens=sum(usages) / num_responses if usages else None,
        reward_margin=margins[-1] if margins else None,
    )


def render_trend(rows: Sequence[TrendRow]) -> Table:
    """The rows for a terminal."""
    settings = [(row.prompt, row.temperature) for row in rows[0].results]
    table = new_table(
        "Rounds: accuracy in % on the validation split, ± half of the 95 % interval",
        "score, tokens: of the responses a round was made from. ties: tasks without a pair. margin: on validation pairs.",
        (*(f"{prompt} {temperature:g}" for prompt, temperature in settings), "score", "tokens", "ties", "margin"),
    )
    for row in rows:
        cells = [_accuracy(result) for result in row.results]
        table.add_row(Text(_name(row), style="bold" if row.is_chosen else ""), *cells, *_lesson_cells(row.lesson))
    return table


def _name(row: TrendRow) -> str:
    name = f"round {row.number}" if row.number else row.checkpoint.name
    return f"{name}, chosen" if row.is_chosen else name


def _accuracy(result: EvalResult) -> str:
    interval = result.accuracy.get(OVERALL)
    return format_estimate(interval) if interval else ""


def _lesson_cells(lesson: Lesson | None) -> tuple[str, str, str, str]:
    if lesson is None:
        return "", "", "", ""
    tokens = "" if lesson.mean_tokens is None else f"{lesson.mean_tokens:.1f}"
    margin = "" if lesson.reward_margin is None else f"{lesson.reward_margin:.2f}"
    return f"{lesson.mean_score:.2f}", tokens, f"{100 * lesson.ties:.0f} %", margin
