"""Judgments -> preference pairs, and the split of the pairs. Pure."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.errors import DataError
from pipeline.open_lists import PAIR_POLICY_NAMES
from pipeline.plugins import Plugins
from pipeline.prompts import render_prompt
from pipeline.records import Judgment, PreferencePair, Response, StageCount, Task
from pipeline.stage import Tally

_TIE, _CUT, _LEFT_OUT = "tie", "all_cut_off", "beyond_pairs_num"


@dataclass(frozen=True)
class PairSet:
    """The pairs of a run, and the account of the tasks that gave none."""

    pairs: tuple[PreferencePair, ...]
    count: StageCount
    """Of tasks: refused are ties and pairs that were left out, failed are those with fewer than two judged responses."""

    @property
    def num_left_out(self) -> int:
        """Pairs that are not among `pairs`, since fewer were wanted."""
        return self.count.reasons.get(_LEFT_OUT, 0)

    @property
    def num_ties(self) -> int:
        """Tasks whose best and worst responses score alike, or say the same."""
        return self.count.reasons.get(_TIE, 0)


@dataclass(frozen=True)
class Judged:
    """A response with its score."""

    response: Response
    score: float
    judge: str

    @property
    def words(self) -> str:
        """What the response says, however it is spaced."""
        return self.response.words


PairPolicy = Callable[[Task, Sequence[Judged], Sequence[Judged]], "tuple[Judged, Judged] | None"]
"""Picks a task's chosen and rejected response; None where it finds no pair, which counts as a tie (docs/extending.md).

It is given the task, those of its judged responses that may be chosen (at least one), and all of them (at least two), in
the order of their index. The chosen one must score higher than the rejected one, and say something else.
"""
PAIR_POLICIES: Plugins[PairPolicy] = PAIR_POLICY_NAMES.of_kind(callable, "a function (pipeline.pairs.PairPolicy)")


def build_pairs(
    tasks: Sequence[Task],
    responses: Sequence[Response],
    judgments: Mapping[str, Judgment],
    *,
    policy: str = "best_worst",
    choose_cut: bool = False,
) -> PairSet:
    """At most a pair for each task, as `policy` picks it; ties and other tasks without one are dropped and counted.

    `judgments` are by response key. A response that was cut off at its longest length may not be chosen, unless
    `choose_cut`: it would teach not to come to an end. Raises RecipeError where the policy is not found, and DataError
    where it picks what is no pair.
    """
    pick = PAIR_POLICIES.resolve(policy)
    groups: dict[str, list[Response]] = defaultdict(list)
    for response in responses:
        groups[response.task].append(response)
    tally = Tally("pair", total=len(tasks))
    pairs: list[PreferencePair] = []
    for task in tasks:
        judged = _list_judged(groups[task.id], judgments)
        if len(judged) < 2 or task.image is None:
            tally.add("failed", reason="too_few_judged" if task.image else "no_image")
            continue
        may_be_chosen = [one for one in judged if choose_cut or one.response.finish_reason != "length"]
        picked = pick(task, may_be_chosen, judged) if may_be_chosen else None
        tally.add("refused" if picked is None else "ok", reason=_TIE if may_be_chosen else _CUT)
        if picked is not None:
            pairs.append(_pair(task, *_check(policy, task, picked, may_be_chosen, judged)))
    return PairSet(tuple(pairs), tally.close())


def _list_judged(responses: Sequence[Response], judgments: Mapping[str, Judgment]) -> list[Judged]:
    """Those with a score, by index."""
    ordered = sorted(responses, key=lambda response: response.index)
    found = ((response, judgments.get(response.key)) for response in ordered)
    return [Judged(r, j.score, j.judge) for r, j in found if j is not None and j.score is not None]


def choose_best_worst(
    task: Task, may_be_chosen: Sequence[Judged], judged: Sequence[Judged]
) -> tuple[Judged, Judged] | None:
    """The best, and the worst that says something else; None where that one scores no less.

    Where several share the best (or worst) score, the first is taken, so that the same records always give the same pairs.
    """
    best = min(may_be_chosen, key=lambda one: -one.score)
    others = [one for one in judged if one.words != best.words]
    worst = min(others, key=lambda one: one.score, default=best)
    return (best, worst) if worst.score < best.score else None


def _check(
    policy: str, task: Task, picked: tuple[Judged, Judged], may_be_chosen: Sequence[Judged], judged: Sequence[Judged]
) -> tuple[Judged, Judged]:
    """What was picked, if it is a pair. Raises DataError."""
    chosen, rejected = picked
    if chosen not in may_be_chosen or rejected not in judged:
        fault = "which are not the task's"
    elif chosen.words == rejected.words:
        fault = "which say the same"
    elif chosen.score <= rejected.score:
        fault = f"of which the chosen one scores {chosen.score:g}, and the rejected one {rejected.score:g}"
    else:
        return picked
    raise DataError(f"pairs.policy {policy} picked two responses to task {task.id}, {fault}; mend the policy")


def _pair(task: Task, chosen: Judged, rejected: Judged) -> PreferencePair:
    assert task.image is not None
    assert chosen.response.text is not None
    assert rejected.response.text is not None
    return PreferencePair(
        task=task.id,
        image=task.image,
        prompt=render_prompt(chosen.response.prompt, task),
        chosen=chosen.response.text,
        rejected=rejected.response.text,
        chosen_key=chosen.response.key,
        rejected_key=rejected.response.key,
        chosen_score=chosen.score,
        rejected_score=rejected.score,
        judge=chosen.judge,
        policy=chosen.response.checkpoint.digest,
    )


def draw_pairs(pairs: Sequence[PreferencePair], num_pairs: int, seed: int) -> list[PreferencePair]:
    """At most `num_pairs` of them, drawn by image, in the order they came; all of them where there are no more."""
    drawn = sorted(pairs, key=lambda pair: _place(f"draw:{seed}", pair.image.sha256))[:num_pairs]
    kept = {pair.task for pair in drawn}
    return [pair for pair in pairs if pair.task in kept]


def limit_pairs(pair_set: PairSet, num: int | None, seed: int) -> PairSet:
    """At most `num` of the pairs, drawn by image, the rest counted as left out; None keeps all."""
    if num is None or len(pair_set.pairs) <= num:
        return pair_set
    kept = draw_pairs(pair_set.pairs, num, seed)
    num_left_out, count = len(pair_set.pairs) - len(kept), pair_set.count
    changes = {
        "ok": count.ok - num_left_out,
        "refused": count.refused + num_left_out,
        "reasons": count.reasons | {_LEFT_OUT: num_left_out},
    }
    return PairSet(tuple(kept), count.model_copy(update=changes))


def split_pairs(
    pairs: Sequence[PreferencePair], validation_fraction: float, seed: int
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """(train, validation), split by image: no image is in both. Raises DataError where there is too little to split."""
    images = sorted({pair.image.sha256 for pair in pairs}, key=lambda sha: _place(str(seed), sha))
    if len(images) < 2:
        raise DataError(
            f"{len(pairs)} preference pair(s) on {len(images)} image(s) cannot be split into train and validation; "
            "sample more tasks (tasks.num_tasks), or responses that differ more (sample.temperature)"
        )
    num_validation = min(len(images) - 1, max(1, math.ceil(len(images) * validation_fraction)))
    held_out = set(images[:num_validation])
    train = [pair for pair in pairs if pair.image.sha256 not in held_out]
    return train, [pair for pair in pairs if pair.image.sha256 in held_out]


def _place(seed: str, sha: str) -> bytes:
    """Where an image comes in a random order of images."""
    return hashlib.sha256(f"{seed}:{sha}".encode()).digest()
