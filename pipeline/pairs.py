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


def build_pairs(
    tasks: Sequence[Task],
    responses: Sequence[Response],
    judgments: Mapping[str, Judgment],
    *,
    choose_cut: bool = False,
) -> PairSet:
    """Best against worst response by score, a pair per task; equal scores are dropped and counted.

    `judgments` are by response key. A response that was cut off at its longest length is never the best one, unless
    `choose_cut`: it would teach not to come to an end. Where several responses share the best (or worst) score, the first
    by index is taken, so that the same records always give the same pairs.
    """
    groups: dict[str, list[Response]] = defaultdict(list)
    for response in responses:
        groups[response.task].append(response)
    tally = Tally("pair", total=len(tasks))
    pairs: list[PreferencePair] = []
    for task in tasks:
        judged = [(r, j) for r in groups[task.id] if (j := judgments.get(r.key)) is not None and j.score is not None]
        if len(judged) < 2 or task.image is None:
            tally.add("failed", reason="too_few_judged" if task.image else "no_image")
            continue
        whole = [(r, j) for r, j in judged if choose_cut or r.finish_reason != "length"]
        pair = best_worst(task, whole, judged) if whole else None
        tally.add("refused" if pair is None else "ok", reason=_TIE if whole else _CUT)
        if pair is not None:
            pairs.append(pair)
    return PairSet(tuple(pairs), tally.close())


def best_worst(
    task: Task, candidates: Sequence[tuple[Response, Judgment]], judged: Sequence[tuple[Response, Judgment]]
) -> PreferencePair | None:
    """The best of `candidates` and the worst that was judged and says something else; None where that is no worse."""
    best, best_judgment = min(candidates, key=_by_score)
    others = sorted((item for item in judged if item[0].words != best.words), key=_by_score)
    if not others or (others[-1][1].score or 0.0) >= (best_judgment.score or 0.0):
        return None
    worst, worst_judgment = next(item for item in others if item[1].score == others[-1][1].score)
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


def _by_score(item: tuple[Response, Judgment]) -> tuple[float, int]:
    """The best first, and of equals the first by index."""
    return -(item[1].score or 0.0), item[0].index


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
