"""Ensemble: several judges, whose rankings of a task's responses are averaged.

Their scales differ, so each member counts by ranks: a response's score is the mean, over the members, of the share of the
other responses to the task that it is ranked above (a tie is half). How far the members agree is kept with the score.
"""

from __future__ import annotations

from collections.abc import Sequence

from vcot.pipeline.errors import RecipeError
from vcot.pipeline.images import ImageStore
from vcot.pipeline.judges.combined import CombinedJudge, find_shares
from vcot.pipeline.ranking import list_all
from vcot.pipeline.records import Judgment, Response, Task, Verdict
from vcot.pipeline.sections import JudgeSection


class EnsembleJudge(CombinedJudge):
    """The mean of its members' rankings."""

    version = "ensemble/1"

    def __init__(self, section: JudgeSection, images: ImageStore) -> None:
        """Raises RecipeError unless there are several members that differ."""
        super().__init__(section, images)
        if len(section.members) < 2 or len({member.name + member.fingerprint for member in self.members}) < 2:
            raise RecipeError(
                f"judge.kind = ensemble asks several judges, and judge.members has {len(section.members)} that differ; "
                'set judge.members = [{kind = "..."}, {kind = "..."}]'
            )

    def combine(self, task: Task, responses: Sequence[Response], found: Sequence[Sequence[Judgment]]) -> list[Verdict]:
        """By the ranks that all members give."""
        shares = [find_shares([judgment.score or 0.0 for judgment in ranked]) for ranked in found]
        pairs = list_all(len(responses))
        alike = sum(len({_order(each, *pair) for each in shares}) == 1 for pair in pairs)
        verdicts = []
        for place in range(len(responses)):
            own = [each[place] for each in shares]
            told = ", ".join(f"{member.name} {share:.2f}" for member, share in zip(self.members, own, strict=True))
            verdicts.append(
                Verdict(
                    score=sum(own) / len(own),
                    rationale=f"{told}; the members order {alike} of {len(pairs)} pairs alike",
                )
            )
        return verdicts


def _order(shares: Sequence[float], first: int, second: int) -> int:
    return (shares[first] > shares[second]) - (shares[first] < shares[second])
