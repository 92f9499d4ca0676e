"""The pair policies that are built in: which of a task's judged responses make pairs, and in one word why there are none.

Each is a function as vcot.PairPolicy says, and pure. Where scores are alike the first response by index is taken,
so that the same records always give the same pairs. A judge's score decides what is better in all of them: where it
contradicts a policy, there is no pair. docs/pairs.md has the sources and the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from vcot.pipeline.pairs import TIE, Judged, Picked, going_by_gains
from vcot.pipeline.parsers import parse_choice
from vcot.pipeline.records import Response, Task
from vcot.pipeline.sections import PairsSection

Pair = tuple[Judged, Judged]


def pick_best_worst(
    task: Task, may_be_chosen: Sequence[Judged], judged: Sequence[Judged], section: PairsSection
) -> Picked:
    """The paper's: the best, and the worst that says something else."""
    best = min(may_be_chosen, key=lambda one: -one.score)
    others = [one for one in judged if one.words != best.words]
    worst = min(others, key=lambda one: one.score, default=best)
    return [(best, worst)] if worst.score < best.score else TIE


def pick_by_margin(
    task: Task, may_be_chosen: Sequence[Judged], judged: Sequence[Judged], section: PairsSection
) -> Picked:
    """All pairs whose scores lie more than `pairs.margin` apart, the widest gap first."""
    ranked = _rank(may_be_chosen, judged)
    return [pair for pair in ranked if _gap(pair) > section.margin] or ("below_margin" if ranked else TIE)


def pick_right_wrong(
    task: Task, may_be_chosen: Sequence[Judged], judged: Sequence[Judged], section: PairsSection
) -> Picked:
    """All right x wrong by the gold answer (Zhang et al. 2024; Wang et al. 2024), the widest gap of scores first.

    A response without a readable final answer is neither.
    """
    if task.answer is None:
        return "no_gold"
    right = [one for one in may_be_chosen if is_response_right(task, one.response) is True]
    wrong = [one for one in judged if is_response_right(task, one.response) is False]
    if not right or not wrong:
        return "none_wrong" if right else "none_right"
    return _rank(right, wrong) or "right_not_above_wrong"


def pick_gold_aware(
    task: Task, may_be_chosen: Sequence[Judged], judged: Sequence[Judged], section: PairsSection
) -> Picked:
    """The best of the right responses against the worst of the wrong ones, however many pairs a task may give."""
    picked = pick_right_wrong(task, may_be_chosen, judged, section)
    return picked if isinstance(picked, str) else picked[:1]


def pick_length_matched(
    task: Task, may_be_chosen: Sequence[Judged], judged: Sequence[Judged], section: PairsSection
) -> Picked:
    """The best, and of what scores lower the one whose number of words is nearest, within `pairs.max_length_ratio`."""
    best = min(may_be_chosen, key=lambda one: -one.score)
    lower = _rank([best], judged)
    alike = [pair for pair in lower if _length_ratio(pair) <= section.max_length_ratio]
    if not alike:
        return "no_length_match" if lower else TIE
    return [min(alike, key=_length_ratio)]


def pick_length_penalised(
    task: Task, may_be_chosen: Sequence[Judged], judged: Sequence[Judged], section: PairsSection
) -> Picked:
    """Best and worst by z(score) - rho z(length), over the responses to the task (Wu et al. 2024, length control).

    Where the judge's own scores put the two the other way round, length alone would decide: there is no pair.
    """
    lengths = _standardise([one.num_words for one in judged])
    scores = _standardise([one.score for one in judged])
    penalised = {one.response.key: z - section.rho * lz for one, z, lz in zip(judged, scores, lengths, strict=True)}
    best = min(may_be_chosen, key=lambda one: -penalised[one.response.key])
    others = [one for one in judged if one.words != best.words]
    worst = min(others, key=lambda one: penalised[one.response.key], default=best)
    if penalised[worst.response.key] >= penalised[best.response.key]:
        return TIE
    return [(best, worst)] if worst.score < best.score else "length_decides"


def pick_by_rating(
    task: Task, may_be_chosen: Sequence[Judged], judged: Sequence[Judged], section: PairsSection
) -> Picked:
    """All pairs whose 95 % intervals do not overlap, the widest gap of ratings first; for judges that give intervals."""
    if any(one.low is None or one.high is None for one in judged):
        return "no_interval"
    ranked = _rank(may_be_chosen, judged)
    apart = [pair for pair in ranked if (pair[0].low or 0.0) > (pair[1].high or 0.0)]
    return apart or ("intervals_overlap" if ranked else TIE)


@going_by_gains
def pick_image_driven(
    task: Task, may_be_chosen: Sequence[Judged], judged: Sequence[Judged], section: PairsSection
) -> Picked:
    """Pairs whose chosen response depends on the image: it adds more than `pairs.image_margin` to its log-probability.

    With a gold option the chosen response is a right one. The widest gap of scores comes first.
    """
    ranked = rank_image_driven(task, may_be_chosen, judged)
    if isinstance(ranked, str):
        return ranked
    gains = [(pair, pair[0].gain.value) for pair in ranked if pair[0].gain is not None]
    known = [(pair, value) for pair, value in gains if value is not None]
    driven = [pair for pair, value in known if value > section.image_margin]
    return driven or ("below_image_margin" if known else "no_gain")


def rank_image_driven(task: Task, may_be_chosen: Sequence[Judged], judged: Sequence[Judged]) -> list[Pair] | str:
    """The pairs that are `image_driven` if the image adds enough, the widest gap first; or in one word why none can be."""
    if not task.images:
        return "no_image"
    if task.answer is not None:
        may_be_chosen = [one for one in may_be_chosen if is_response_right(task, one.response) is True]
        if not may_be_chosen:
            return "none_right"
    return _rank(may_be_chosen, judged) or TIE


def is_response_right(task: Task, response: Response) -> bool | None:
    """Whether its final answer is the gold option; None where that is not known, or none can be read in it."""
    if task.answer is None or response.finish_reason == "length":
        return None
    letter = parse_choice(response.answer or "", task.choices)
    return None if letter is None else task.is_right(letter)


def _rank(better: Sequence[Judged], worse: Sequence[Judged]) -> list[Pair]:
    """What scores higher with what scores lower and says something else, the widest gap first; of twins one only."""
    pairs = [(chosen, rejected) for chosen in better for rejected in worse if rejected.score < chosen.score]
    found: dict[tuple[str, str], Pair] = {}
    for chosen, rejected in sorted(pairs, key=lambda pair: -_gap(pair)):
        if chosen.words != rejected.words:
            found.setdefault((chosen.words, rejected.words), (chosen, rejected))
    return list(found.values())


def _gap(pair: Pair) -> float:
    return pair[0].score - pair[1].score


def _length_ratio(pair: Pair) -> float:
    """The longer over the shorter, in words; infinite where one says nothing."""
    shorter, longer = sorted(one.num_words for one in pair)
    return longer / shorter if shorter else math.inf


def _standardise(values: Sequence[float]) -> list[float]:
    """z-scores: how many standard deviations each lies above the mean; 0 where all are the same."""
    mean = math.fsum(values) / len(values)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
    return [(value - mean) / deviation if deviation else 0.0 for value in values]
