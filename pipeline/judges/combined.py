"""Judges that ask nobody: they combine what their members, judges of their own, have said of the same responses.

The members judge first and their judgments are in the ledger, so that a judgment is paid for once, whoever goes by it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from vcot.pipeline.images import ImageStore
from vcot.pipeline.judges import GroupJudge, Judge, find_judge, judgment_keys
from vcot.pipeline.judges.cost import Meter
from vcot.pipeline.ledger import Ledger
from vcot.pipeline.records import Judgment, Response, Task, Verdict, content_key
from vcot.pipeline.sections import JudgeSection


class CombinedJudge(GroupJudge):
    """A subclass says how the members' judgments become verdicts."""

    takes = frozenset(("members",))
    version: ClassVar[str]

    def __init__(self, section: JudgeSection, images: ImageStore) -> None:
        """Raises RecipeError for a member that is none."""
        super().__init__(section, images)
        self.members = [find_judge(member, images) for member in section.members]
        self.name = f"{self.version}({'+'.join(member.name for member in self.members)})"
        self.fingerprint = content_key(members=[[m.fingerprint, dict(m.code)] for m in self.members])
        self._ledger: Ledger | None = None

    def attend(self, ledger: Ledger, meter: Meter) -> None:
        """The members' judgments are in `ledger`; it pays for none itself."""
        self._ledger = ledger

    @abstractmethod
    def combine(self, task: Task, responses: Sequence[Response], found: Sequence[Sequence[Judgment]]) -> list[Verdict]:
        """A verdict for each of `responses`, from each member's judgments of them, all with a score."""

    async def judge(self, task: Task, responses: Sequence[Response], *, num_asked: int = 0) -> list[Verdict]:
        """Of those that every member gave a score, in comparison with each other; the others are refused."""
        found = [self._read(member, task, responses) for member in self.members]
        judged = [place for place, _ in enumerate(responses) if all(place in each for each in found)]
        verdicts = self.combine(
            task, [responses[place] for place in judged], [[each[place] for place in judged] for each in found]
        )
        by_place = dict(zip(judged, verdicts, strict=True))
        none = Verdict(error="a member gave no verdict", reason="member_without_verdict", refused=True)
        return [by_place.get(place, none) for place, _ in enumerate(responses)]

    def _read(self, member: Judge, task: Task, responses: Sequence[Response]) -> dict[int, Judgment]:
        """A member's judgments with a score, by the place of the response."""
        assert self._ledger is not None, "attend before you judge"
        keys = judgment_keys(member, task, responses)
        found = self._ledger.get(Judgment, keys)
        return {place: found[key] for place, key in enumerate(keys) if key in found and found[key].score is not None}


def find_shares(scores: Sequence[float]) -> list[float]:
    """For each score, the share of the others that are lower, a tie as half; of one alone, a half."""
    others = len(scores) - 1
    if not others:
        return [0.5]
    return [
        (sum(other < score for other in scores) + (sum(other == score for other in scores) - 1) / 2) / others
        for score in scores
    ]
