"""What each pair policy would make of the same judged responses, side by side: counts and means, no files. Pure.

It sees one task at a time and holds a few examples, so that a run of any size can be previewed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from vcot.pipeline.open_lists import PAIR_POLICY_NAMES
from vcot.pipeline.pair_policies import is_response_right
from vcot.pipeline.pairs import PAIR_POLICIES, Judged, PairPolicy, count_picked
from vcot.pipeline.records import Record, StageCount, Task
from vcot.pipeline.sections import PairsSection
from vcot.pipeline.stage import Tally

MAX_EXAMPLES = 10


class PairExample(Record):
    """One pair as a policy makes it."""

    task: str
    question: str
    chosen: str
    rejected: str
    chosen_score: float
    rejected_score: float
    image_gain: float | None = None
    """Of the chosen response, in nats, where it was asked."""


class PolicyPreview(Record):
    """What one policy makes."""

    policy: str
    num_pairs: int
    count: StageCount
    """Of tasks: those that give a pair, and by reason those that give none."""
    mean_length_difference: float | None
    """Words of the chosen response minus words of the rejected one; None without pairs, as the following."""
    mean_score_gap: float | None
    share_right: float | None
    """Of the chosen responses to questions with a gold answer, those that give it; an unreadable answer does not."""
    examples: tuple[PairExample, ...] = ()
    """Its first pairs."""


class PairsPreview(Record):
    """All policies, side by side."""

    policies: tuple[PolicyPreview, ...]
    policy: str
    """The recipe's."""

    @property
    def examples(self) -> tuple[PairExample, ...]:
        """Those of the recipe's policy."""
        return next(row.examples for row in self.policies if row.policy == self.policy)


@dataclass
class _Sums:
    """Of one policy; mutated by `add`."""

    policy: PairPolicy
    section: PairsSection
    tally: Tally = field(default_factory=lambda: Tally("pair", total=0))
    num_pairs: int = 0
    length_difference: int = 0
    score_gap: float = 0.0
    num_with_gold: int = 0
    num_right: int = 0
    examples: list[PairExample] = field(default_factory=list)

    def add(self, task: Task, judged: Sequence[Judged]) -> None:
        picked = count_picked(self.tally, self.policy, task, judged, self.section)
        for chosen, rejected in picked:
            self.num_pairs += 1
            self.length_difference += chosen.num_words - rejected.num_words
            self.score_gap += chosen.score - rejected.score
            self.num_with_gold += task.answer is not None
            self.num_right += is_response_right(task, chosen.response) is True
            if len(self.examples) < MAX_EXAMPLES:
                self.examples.append(_show(task, chosen, rejected))

    def close(self) -> PolicyPreview:
        return PolicyPreview(
            policy=self.section.policy,
            num_pairs=self.num_pairs,
            count=self.tally.close(),
            mean_length_difference=_share(self.length_difference, self.num_pairs),
            mean_score_gap=_share(self.score_gap, self.num_pairs),
            share_right=_share(self.num_right, self.num_with_gold),
            examples=tuple(self.examples),
        )


class Previewing:
    """A preview that is being made, task by task; mutated by `add`. Raises RecipeError where the policy is not found."""

    def __init__(self, section: PairsSection) -> None:
        names = dict.fromkeys((*PAIR_POLICY_NAMES.built_ins, section.policy))
        self._section = section
        self._sums = [_Sums(PAIR_POLICIES.resolve(name), section.model_copy(update={"policy": name})) for name in names]

    def add(self, task: Task, judged: Sequence[Judged]) -> None:
        """See the judged responses to one task."""
        for sums in self._sums:
            sums.add(task, judged)

    def close(self) -> PairsPreview:
        """What was found."""
        return PairsPreview(
            policies=tuple(sums.close() for sums in self._sums),
            policy=self._section.policy,
        )


def _show(task: Task, chosen: Judged, rejected: Judged) -> PairExample:
    return PairExample(
        task=task.id,
        question=task.question,
        chosen=chosen.response.text or "",
        rejected=rejected.response.text or "",
        chosen_score=chosen.score,
        rejected_score=rejected.score,
        image_gain=chosen.gain.value if chosen.gain else None,
    )


def _share(part: float, whole: int) -> float | None:
    return part / whole if whole else None
