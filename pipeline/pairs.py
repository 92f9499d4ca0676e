"""Judgments -> preference pairs, and the split of the pairs. Pure, but for reading the texts of pairs."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from pipeline.errors import DataError
from pipeline.ledger import Ledger
from pipeline.open_lists import PAIR_POLICY_NAMES
from pipeline.plugins import Plugins
from pipeline.prompts import render_prompt
from pipeline.records import ImageRef, PreferencePair, Response, StageCount, Task
from pipeline.stage import Tally, batched

_TIE, _CUT, _LEFT_OUT = "tie", "all_cut_off", "beyond_pairs_num"


@dataclass(frozen=True, slots=True)
class Couple:
    """A pair by its keys: what is held of each while pairs are drawn and split; `read_pairs` has the texts."""

    task: str
    image: ImageRef
    chosen_key: str
    rejected_key: str
    chosen_score: float
    rejected_score: float
    judge: str
    policy: str
    """Digest of the weights that sampled both."""


@dataclass(frozen=True)
class PairSet:
    """The pairs of a run, and the account of the tasks that gave none."""

    pairs: tuple[Couple, ...]
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
    groups: Iterable[tuple[Task, Sequence[Judged]]], *, policy: str = "best_worst", choose_cut: bool = False
) -> PairSet:
    """At most a pair for each task, as `policy` picks it; ties and other tasks without one are dropped and counted.

    Each group is a task with those of its responses that have a score, by index. A response that was cut off at its longest
    length may not be chosen, unless `choose_cut`: it would teach not to come to an end. Raises RecipeError where the policy
    is not found, and DataError where it picks what is no pair.
    """
    pick = PAIR_POLICIES.resolve(policy)
    tally = Tally("pair", total=0)
    couples: list[Couple] = []
    for task, judged in groups:
        tally.total += 1
        if len(judged) < 2 or task.image is None:
            tally.add("failed", reason="too_few_judged" if task.image else "no_image")
            continue
        may_be_chosen = [one for one in judged if choose_cut or one.response.finish_reason != "length"]
        picked = pick(task, may_be_chosen, judged) if may_be_chosen else None
        tally.add("refused" if picked is None else "ok", reason=_TIE if may_be_chosen else _CUT)
        if picked is not None:
            couples.append(_join(task, *_check(policy, task, picked, may_be_chosen, judged)))
    return PairSet(tuple(couples), tally.close())


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


def _join(task: Task, chosen: Judged, rejected: Judged) -> Couple:
    assert task.image is not None
    return Couple(
        task=task.id,
        image=task.image,
        chosen_key=chosen.response.key,
        rejected_key=rejected.response.key,
        chosen_score=chosen.score,
        rejected_score=rejected.score,
        judge=sys.intern(chosen.judge),  # the same of all, and read anew for each
        policy=sys.intern(chosen.response.checkpoint.digest),
    )


def read_pairs(couples: Iterable[Couple], tasks: Iterable[Task], ledger: Ledger) -> Iterator[PreferencePair]:
    """The pairs with their texts, in the same order, some at a time."""
    by_id = {task.id: task for task in tasks}
    for chunk in batched(couples):
        responses = ledger.get(Response, (key for c in chunk for key in (c.chosen_key, c.rejected_key)))
        for couple in chunk:
            chosen, rejected = responses[couple.chosen_key], responses[couple.rejected_key]
            assert chosen.text is not None
            assert rejected.text is not None
            yield PreferencePair(
                **{name: getattr(couple, name) for name in Couple.__slots__},
                prompt=render_prompt(chosen.prompt, by_id[couple.task]),
                chosen=chosen.text,
                rejected=rejected.text,
            )


def draw_pairs(pairs: Sequence[Couple], num_pairs: int, seed: int) -> list[Couple]:
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


def split_pairs(pairs: Sequence[Couple], validation_fraction: float, seed: int) -> tuple[list[Couple], list[Couple]]:
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
