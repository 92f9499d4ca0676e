"""What several responses to each question say: majority vote, pass@k, and how far responses and questions vary.

The vote of a question's responses is the answer that most of them give; one that cannot be read has no vote, and answers
with equally many votes share the question. pass@k is the chance that at least one of k responses is right, estimated without
bias from n >= k of them (Chen et al. 2021, "Evaluating large language models trained on code", section 2.1). Each is a share
for each question, and its interval is clustered by image as the accuracy's is.

Responses of several seeds are further responses to the same question. A failed request is no response; a question with fewer
than k responses is in no pass@k, and its `num_questions` says how many are.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from rich.console import RenderableType
from rich.text import Text

from vcot.eval.statistics import Variances, clustered_error, estimate_accuracy, split_variance
from vcot.eval.table import fill_by_checkpoint, format_estimate, list_settings, new_table, select_scores
from vcot.pipeline.records import CheckpointRef, Interval, PromptName, Record, Score

Groups = Mapping[str, Sequence[Score]]
"""A question's scores that are no errors, by task."""


class PassAt(Record):
    """The chance that at least one of k responses is right."""

    k: int
    share: Interval
    num_questions: int
    """Those with k responses or more."""


class Repeats(Record):
    """One checkpoint under one prompt and temperature, whose questions were answered several times."""

    checkpoint: CheckpointRef
    prompt: PromptName
    temperature: float
    num_responses: int
    """To a question, at most."""
    num_questions: int
    accuracy: Interval
    """Of a single response."""
    vote: Interval
    """Of the answer that most of a question's responses give."""
    pass_at: tuple[PassAt, ...]
    """k = 1, 2, 4 and so on, and all of them."""
    between: float
    """Variance of the questions' true shares."""
    within: float
    """Variance of responses to one question, on average."""
    correlation: float
    """Of two responses to one question."""
    error: float
    """The accuracy's standard error, clustered by image."""
    least_error: float
    """What would be left of it with endless responses to the same questions."""


def pass_at_k(num_right: int, num: int, k: int) -> float:
    """Without bias, the chance that one of `k` responses is right, where `num_right` of `num` were; 1 <= k <= num.

    1 - C(num - num_right, k) / C(num, k), as a product that stays in bounds. Raises ValueError for another k.
    """
    if not 1 <= k <= num:
        raise ValueError(f"pass@{k} of {num} responses: k is from 1 to their number")
    return 1.0 - math.prod(max(0, num - num_right - i) / (num - i) for i in range(k))


def vote_share(scores: Sequence[Score]) -> float:
    """What the answers with most votes earn on average: 0 or 1 but for a tie or points. No readable answer earns 0."""
    votes = Counter(score.answer for score in scores if score.answer is not None)
    most = max(votes.values(), default=0)
    right = {score.answer: score.earned for score in scores if score.answer is not None}
    winners = [right[answer] for answer, number in votes.items() if number == most]
    return sum(winners) / len(winners) if winners else 0.0


def build_repeats(scores: Sequence[Score], checkpoints: Sequence[CheckpointRef]) -> list[Repeats]:
    """A row per checkpoint, prompt and temperature that has questions with several responses."""
    rows = []
    for checkpoint in checkpoints:
        own = [score for score in scores if score.checkpoint == checkpoint.digest and score.error is None]
        for prompt, temperature in list_settings(own):
            chosen = select_scores(own, (prompt, temperature))
            variances = split_variance([s.earned for s in chosen], [s.task for s in chosen])
            if variances is not None:
                rows.append(_build_row(checkpoint, chosen, variances))
    return rows


def _build_row(checkpoint: CheckpointRef, scores: Sequence[Score], variances: Variances) -> Repeats:
    groups: dict[str, list[Score]] = {}
    for score in scores:
        groups.setdefault(score.task, []).append(score)
    earned, images = [score.earned for score in scores], [score.image or score.task for score in scores]
    error = clustered_error(earned, images) if len(set(images)) > 1 else 1.0
    sampling = variances.within / len(scores)
    return Repeats(
        checkpoint=checkpoint,
        prompt=scores[0].prompt,
        temperature=scores[0].temperature,
        num_responses=max(map(len, groups.values())),
        num_questions=len(groups),
        accuracy=estimate_accuracy(earned, images),
        vote=estimate_accuracy([vote_share(group) for group in groups.values()], _images(groups)),
        pass_at=tuple(_estimate_pass(groups, k) for k in _list_ks(max(map(len, groups.values())))),
        between=variances.between,
        within=variances.within,
        correlation=variances.correlation,
        error=error,
        least_error=math.sqrt(max(0.0, error**2 - sampling)),
    )


def _estimate_pass(groups: Groups, k: int) -> PassAt:
    asked = {task: group for task, group in groups.items() if len(group) >= k}
    shares = [pass_at_k(sum(s.value == "correct" for s in group), len(group), k) for group in asked.values()]
    num_behind = max(len(group) // k for group in asked.values())
    share = estimate_accuracy(shares, _images(asked), num_behind=num_behind)
    return PassAt(k=k, share=share, num_questions=len(asked))


def _images(groups: Groups) -> list[str]:
    return [group[0].image or task for task, group in groups.items()]


def _list_ks(num: int) -> list[int]:
    """1, 2, 4 ... below `num`, and `num`."""
    return [*(2**power for power in range(num.bit_length()) if 2**power < num), num]


def describe_repeats(rows: Sequence[Repeats]) -> list[str]:
    """What the rows show, in a plain sentence for each checkpoint."""
    names = dict.fromkeys(row.checkpoint.name for row in rows)
    return [_describe_repeats(name, [row for row in rows if row.checkpoint.name == name]) for name in names]


def _describe_repeats(name: str, rows: Sequence[Repeats]) -> str:
    row = max(rows, key=lambda row: row.error**2 - row.least_error**2)
    return (
        f"{name}: more responses to the same questions would bring the standard error of its accuracy from "
        f"{100 * row.error:.2f} points to {100 * row.least_error:.2f} at best ({row.prompt} at {row.temperature:g}, "
        "where they would help most); only more questions bring it lower."
    )


def render_repeats(rows: Sequence[Repeats]) -> list[RenderableType]:
    """The rows for a terminal, and what they say."""
    ks = sorted({each.k for row in rows for each in row.pass_at} - {1})
    shown = ks[-3:]
    table = new_table(
        "Several responses to a question, in %, ± half of the 95 % interval (clustered by image)",
        "one: of a single response. vote: of the commonest answer. alike: correlation of two responses to a question.",
        ("one", "vote", *(f"pass@{k}" for k in shown), "alike"),
    )

    def list_cells(row: Repeats) -> Iterable[str]:
        found = {each.k: format_estimate(each.share) for each in row.pass_at}
        passes = [found.get(k, "") for k in shown]
        figures = (format_estimate(row.accuracy), format_estimate(row.vote), *passes, f"{row.correlation:.2f}")
        return f"  {row.prompt} {row.temperature:g}", *figures

    fill_by_checkpoint(table, rows, list_cells)
    return [table, *(Text(f"\n{text}") for text in describe_repeats(rows))]
