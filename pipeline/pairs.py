"""Judgments -> preference pairs, and the split of the pairs. Pure."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.errors import DataError
from pipeline.prompts import render_prompt
from pipeline.records import Judgment, PreferencePair, Response, StageCount, Task
from pipeline.stage import Tally


@dataclass(frozen=True)
class PairSet:
    """The pairs of a run, and the account of the tasks that gave none."""

    pairs: tuple[PreferencePair, ...]
    count: StageCount
    """Of tasks: refused are ties and pairs that were left out, failed are those with fewer than two judged responses."""
    num_left_out: int = 0
    """Pairs that are not among `pairs`, since fewer were wanted."""

    @property
    def num_ties(self) -> int:
        """Tasks whose best and worst responses score alike, or say the same."""
        return self.count.refused - self.num_left_out


def build_pairs(tasks: Sequence[Task], responses: Sequence[Response], judgments: Mapping[str, Judgment]) -> PairSet:
    """Best against worst response by score, a pair per task; equal scores are dropped and counted.

    `judgments` are by response key. Where several responses share the best (or worst) score, the first by index is taken,
    so that the same records always give the same pairs.
    """
    groups: dict[str, list[Response]] = defaultdict(list)
    for response in responses:
        groups[response.task].append(response)
    tally = Tally("pair", total=len(tasks))
    pairs: list[PreferencePair] = []
    for task in tasks:
        judged = [(r, j) for r in groups[task.id] if (j := judgments.get(r.key)) is not None and j.score is not None]
        if len(judged) < 2 or task.image is None:
            tally.add("failed")
            continue
        pair = best_worst(task, judged)
        tally.add("refused" if pair is None else "ok")
        if pair is not None:
            pairs.append(pair)
    return PairSet(tuple(pairs), tally.close())


def best_worst(task: Task, judged: Sequence[tuple[Response, Judgment]]) -> PreferencePair | None:
    """The pair of one task, or None where best and worst score alike or say the same."""
    ordered = sorted(judged, key=lambda item: (-(item[1].score or 0.0), item[0].index))
    best, best_judgment = ordered[0]
    worst_score = ordered[-1][1].score
    worst, worst_judgment = next(item for item in ordered if item[1].score == worst_score)
    if best_judgment.score == worst_score or best.text == worst.text:
        return None
    assert task.image is not None
    assert best.text is not None
    assert worst.text is not None
    assert best_judgment.score is not None
    assert worst_judgment.score is not None
    return PreferencePair(
        task=task.id,
        image=task.image,
        prompt=render_prompt(best.prompt, task),
        chosen=best.text,
        rejected=worst.text,
        chosen_key=best.key,
        rejected_key=worst.key,
        chosen_score=best_judgment.score,
        rejected_score=worst_judgment.score,
        judge=best_judgment.judge,
        policy=best.checkpoint.digest,
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
    num_left_out = len(pair_set.pairs) - len(kept)
    count = pair_set.count.model_copy(
        update={"ok": pair_set.count.ok - num_left_out, "refused": pair_set.count.refused + num_left_out}
    )
    return PairSet(tuple(kept), count, num_left_out)


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
