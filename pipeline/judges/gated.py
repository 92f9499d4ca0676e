"""Gated: the gold answer decides right and wrong, and another judge ranks only within each.

As MPO (Wang et al. 2024) and LLaVA-Reasoner (Zhang et al. 2024) make their pairs: a response with the right answer scores
above each with a wrong one, and among equals the member's ranking decides. A score is 1 for a right answer, 0 for a wrong
one, plus half the share of the other responses to the task that the member ranks below.
"""

from __future__ import annotations

from collections.abc import Sequence

from vcot.pipeline.errors import RecipeError
from vcot.pipeline.images import ImageStore
from vcot.pipeline.judges.combined import CombinedJudge, find_shares
from vcot.pipeline.parser_version import PARSER
from vcot.pipeline.parsers import parse_choice
from vcot.pipeline.records import Judgment, Response, Task, Verdict, content_key
from vcot.pipeline.sections import JudgeSection


class GatedJudge(CombinedJudge):
    """By gold, then by its one member."""

    version = "gated/1"
    knows_gold = True

    def __init__(self, section: JudgeSection, images: ImageStore) -> None:
        """Raises RecipeError unless there is one member."""
        super().__init__(section, images)
        if len(section.members) != 1:
            raise RecipeError(
                f"judge.kind = gated ranks by one member, and judge.members has {len(section.members)}; "
                'set judge.members = [{kind = "..."}]'
            )
        self.fingerprint = content_key(members=self.fingerprint, parser=PARSER)

    def combine(self, task: Task, responses: Sequence[Response], found: Sequence[Sequence[Judgment]]) -> list[Verdict]:
        """By the member's scores of all `responses`."""
        if task.answer is None:
            error = f"task {task.id} has no gold answer to go by; take its member alone"
            return [Verdict(error=error, reason="no_gold", refused=True)] * len(responses)
        (ranked,) = found
        shares = find_shares([judgment.score or 0.0 for judgment in ranked])
        verdicts = []
        for response, share, judgment in zip(responses, shares, ranked, strict=True):
            letter = parse_choice(response.answer or "", task.choices)
            is_right = letter is not None and task.is_right(letter)
            told = f"answer {letter or 'not readable'}, gold {task.answer_letter}; {judgment.rationale}"
            verdicts.append(Verdict(score=is_right + share / 2, rationale=told))
        return verdicts
