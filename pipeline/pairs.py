"""Judgments -> preference pairs, and the split of the pairs. Pure, but for reading the texts of pairs.

Which responses to a task make pairs is a policy's to say; those that are built in are in pair_policies.py.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Self

from pydantic import model_validator

from vcot.pipeline.errors import DataError
from vcot.pipeline.ledger import Ledger
from vcot.pipeline.open_lists import PAIR_POLICY_NAMES
from vcot.pipeline.plugins import Plugins
from vcot.pipeline.prompts import render_prompt
from vcot.pipeline.records import ImageGain, ImageRef, Record, Response, StageCount, Task
from vcot.pipeline.sections import PairsSection
from vcot.pipeline.stage import Tally, batched

TIE = "tie"
"""Why a task gives no pair whose responses score alike, or say the same."""
_CUT, _EMPTY, _NO_PAIR, _LEFT_OUT = "all_cut_off", "all_empty", "no_pair", "beyond_pairs_num"


@dataclass(frozen=True, slots=True)
class Couple:
    """A pair by its keys: what is held of each while pairs are drawn and split; `read_pairs` has the texts."""

    task: str
    images: tuple[ImageRef, ...]
    chosen_key: str
    rejected_key: str
    chosen_score: float
    rejected_score: float
    judge: str
    policy: str
    """Digest of the weights that sampled both."""
    chosen_judgment: str
    """The key of the judgment that the score is from."""
    rejected_judgment: str


class PreferencePair(Record):
    """Two responses to one task, of which one is preferred."""

    task: str
    images: tuple[ImageRef, ...]
    prompt: str
    """The rendered user turn, without a place for images."""
    chosen: str
    rejected: str
    chosen_key: str
    rejected_key: str
    chosen_score: float
    rejected_score: float
    judge: str
    policy: str
    """Digest of the weights that sampled both."""
    chosen_judgment: str = ""
    """The key of the judgment that the score is from; response and judge determine it, so no digest holds it."""
    rejected_judgment: str = ""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.chosen == self.rejected:
            raise ValueError(f"pair of task {self.task}: chosen and rejected are the same text")
        if self.chosen_score <= self.rejected_score:
            raise ValueError(
                f"pair of task {self.task}: chosen scores {self.chosen_score}, rejected {self.rejected_score}"
            )
        return self


@dataclass(frozen=True)
class PairSet:
    """The pairs of a run, and the account of the tasks that gave none."""

    pairs: tuple[Couple, ...]
    count: StageCount
    """Of tasks: refused are those that the policy found no pair in, or whose pairs were left out; failed are those with
    fewer than two judged responses."""
    num_left_out: int = 0
    """Pairs that are not among `pairs`, since fewer were wanted."""

    @property
    def num_ties(self) -> int:
        """Tasks whose best and worst responses score alike, or say the same."""
        return self.count.reasons.get(TIE, 0)


@dataclass(frozen=True)
class Judged:
    """A response with its score."""

    response: Response
    score: float
    judge: str
    judgment: str = ""
    """The judgment's key."""
    low: float | None = None
    """With `high`, the 95 % interval of the score, where the judge knows one."""
    high: float | None = None
    gain: ImageGain | None = None
    """What the images add to how likely it is, where that was asked (`going_by_gains`)."""

    @cached_property
    def words(self) -> str:
        """What the response says, however it is spaced."""
        return self.response.words

    @cached_property
    def num_words(self) -> int:
        """How long it is."""
        return len(self.words.split())


Picked = Sequence[tuple[Judged, Judged]] | str
"""The pairs of one task as (chosen, rejected), the best first; or in one word, for the account, why there is none."""
PairPolicy = Callable[[Task, Sequence[Judged], Sequence[Judged], PairsSection], Picked]
"""Picks the pairs of a task (docs/extending.md).

It is given the task, those of its judged responses that may be chosen (at least one), all of them (at least two), both in
the order of their index, and the recipe's section. In each pair the chosen one must score higher than the rejected one,
and say something else. Of many pairs the first `pairs.max_per_task` are kept.
"""
PAIR_POLICIES: Plugins[PairPolicy] = PAIR_POLICY_NAMES.of_kind(callable, "a function (vcot.PairPolicy)")
_DEFAULTS = PairsSection()


def going_by_gains(policy: PairPolicy) -> PairPolicy:
    """Marks a policy that reads `Judged.gain`: the sampled model is asked, before pairs are made, what images add."""
    policy.goes_by_gains = True  # type: ignore[attr-defined]
    return policy


def needs_gains(section: PairsSection) -> bool:
    """Whether the section's policy goes by what images add. Raises RecipeError where the policy is not found."""
    return getattr(PAIR_POLICIES.resolve(section.policy), "goes_by_gains", False)


def list_choosable(judged: Sequence[Judged], section: PairsSection) -> list[Judged]:
    """Those that may be the chosen one: none that is empty, or was cut off at its longest length, unless `choose_cut`."""
    return [one for one in judged if one.words and (section.choose_cut or one.response.finish_reason != "length")]


def build_pairs(groups: Iterable[tuple[Task, Sequence[Judged]]], section: PairsSection = _DEFAULTS) -> PairSet:
    """The pairs of each task, as the section's policy picks them; tasks without one are dropped and counted by reason.

    Each group is a task with those of its responses that have a score, by index. Raises RecipeError where the policy is
    not found, and DataError where it picks what is no pair.
    """
    policy = PAIR_POLICIES.resolve(section.policy)
    tally = Tally("pair", total=0)
    couples: list[Couple] = []
    for task, judged in groups:
        picked = count_picked(tally, policy, task, judged, section)
        couples += [_join(task, chosen, rejected) for chosen, rejected in picked]
    return PairSet(tuple(couples), tally.close())


def count_picked(
    tally: Tally, policy: PairPolicy, task: Task, judged: Sequence[Judged], section: PairsSection
) -> Sequence[tuple[Judged, Judged]]:
    """The pairs of one task, and its place in the account of tasks.

    A response that was cut off at its longest length may not be chosen, unless `choose_cut`: it would reward not coming to
    an end; an empty one would reward saying nothing. Raises DataError where the policy picks what is no pair.
    """
    tally.total += 1
    if len(judged) < 2:
        tally.add("failed", reason="too_few_judged")
        return ()
    may_be_chosen = list_choosable(judged, section)
    if may_be_chosen:
        picked = policy(task, may_be_chosen, judged, section)
    else:
        picked = _CUT if any(one.words for one in judged) else _EMPTY
    if isinstance(picked, str) or not picked:
        tally.add("refused", reason=str(picked or _NO_PAIR))
        return ()
    tally.add("ok")
    kept = picked[: section.max_per_task]
    for pair in kept:
        _check(section.policy, task, pair, may_be_chosen, judged)
    return kept


def _check(policy: str, task: Task, picked: Any, may_be_chosen: Sequence[Judged], judged: Sequence[Judged]) -> None:
    """Raise DataError where what was picked is no pair."""
    match picked:
        case (chosen, rejected):
            pass
        case _:
            raise DataError(
                f"pairs.policy {policy} gave no list of pairs (chosen, rejected) for task {task.id}; mend the policy"
            )
    if chosen not in may_be_chosen or rejected not in judged:
        fault = "which are not the task's"
    elif chosen.words == rejected.words:
        fault = "which say the same"
    elif chosen.score <= rejected.score:
        fault = f"of which the chosen one scores {chosen.score:g}, and the rejected one {rejected.score:g}"
    else:
        return
    raise DataError(f"pairs.policy {policy} picked two responses to task {task.id}, {fault}; mend the policy")


def _join(task: Task, chosen: Judged, rejected: Judged) -> Couple:
    return Couple(
        task=task.id,
        images=task.images,
        chosen_key=chosen.response.key,
        rejected_key=rejected.response.key,
        chosen_score=chosen.score,
        rejected_score=rejected.score,
        judge=sys.intern(chosen.judge),  # the same of all, and read anew for each
        policy=sys.intern(chosen.response.checkpoint.digest),
        chosen_judgment=chosen.judgment,
        rejected_judgment=rejected.judgment,
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
    scenes = _name_scenes(pairs)
    drawn = sorted(range(len(pairs)), key=lambda place: _place(f"draw:{seed}", scenes[place]))
    return [pairs[place] for place in sorted(drawn[:num_pairs])]


def limit_pairs(pair_set: PairSet, num: int | None, seed: int) -> PairSet:
    """At most `num` of the pairs, drawn by image; tasks that lose all of theirs are counted. None keeps all."""
    if num is None or len(pair_set.pairs) <= num:
        return pair_set
    kept, count = draw_pairs(pair_set.pairs, num, seed), pair_set.count
    num_lost = count.ok - len({pair.task for pair in kept})
    changes = {"ok": count.ok - num_lost, "refused": count.refused + num_lost}
    reasons = count.reasons | ({_LEFT_OUT: num_lost} if num_lost else {})
    left = count.model_copy(update=changes | {"reasons": reasons})
    return replace(pair_set, pairs=tuple(kept), count=left, num_left_out=len(pair_set.pairs) - len(kept))


def split_pairs(pairs: Sequence[Couple], validation_fraction: float, seed: int) -> tuple[list[Couple], list[Couple]]:
    """(train, validation), split by image: no image is in both, and without images no question is.

    Raises DataError where there is too little to split.
    """
    scenes = _name_scenes(pairs)
    images = sorted(set(scenes), key=lambda scene: _place(str(seed), scene))
    if len(images) < 2:
        raise DataError(
            f"{len(pairs)} preference pair(s) on {len(images)} image(s) cannot be split into train and validation; "
            "sample more tasks (tasks.num_tasks), or responses that differ more (sample.temperature)"
        )
    num_validation = min(len(images) - 1, max(1, math.ceil(len(images) * validation_fraction)))
    held_out = set(images[:num_validation])
    placed = list(zip(pairs, scenes, strict=True))
    train = [pair for pair, scene in placed if scene not in held_out]
    return train, [pair for pair, scene in placed if scene in held_out]


def _name_scenes(pairs: Sequence[Couple]) -> list[str]:
    """What each pair is about: its image, or its task where it has none. Pairs that share one of several images, be it by
    way of others, are about the same.
    """
    first: dict[str, str] = {}

    def find(name: str) -> str:
        while (parent := first.setdefault(name, name)) != name:
            name = parent
        return name

    for pair in pairs:
        for one, other in pairwise(pair.images):
            low, high = sorted((find(one.sha256), find(other.sha256)))
            first[high] = low
    return [find(pair.images[0].sha256) if pair.images else f"task {pair.task}" for pair in pairs]


def _place(seed: str, scene: str) -> bytes:
    """Where a scene comes in a random order of them."""
    return hashlib.sha256(f"{seed}:{scene}".encode()).digest()
