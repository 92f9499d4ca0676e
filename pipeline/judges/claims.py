"""The claims judge (RLAIF-V, Yu et al. 2024): a response is split into claims, and each is checked against the image.

One request lists the claims, one for each claim asks yes or no. The score is the share that hold. The scheme is the
paper's, the words of the two prompts are ours.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources
from typing import Any

from vcot.pipeline.judges.model import ModelJudge, await_all
from vcot.pipeline.judges.trial import TEST_TASK
from vcot.pipeline.judges.verdict import Unreadable, build_format, clean, read_object
from vcot.pipeline.plain import after_reasoning
from vcot.pipeline.records import Reply, Response, Task, Verdict
from vcot.pipeline.sections import JudgeSection

MAX_CLAIMS = 32
_USUAL_CLAIMS = 7
"""Of a chain of thought, for estimates."""
_YES_OR_NO = re.compile(r"\b(yes|no)\b", re.IGNORECASE)
_FORMAT = build_format("claims", {"claims": {"type": "array", "items": {"type": "string"}}})
_SPLIT = resources.files(__package__).joinpath("claims_split.txt").read_text("utf-8").strip()


class ClaimsJudge(ModelJudge):
    """A model that lists claims and checks each."""

    version = "claims/1"
    keeps_replies = True
    template = resources.files(__package__).joinpath("claims_check.txt").read_text("utf-8").strip()
    takes = ModelJudge.takes - {"num_samples"}

    @classmethod
    def count_requests(cls, section: JudgeSection, num_responses: int) -> int:
        """One that lists them, and one for each of a usual number of claims."""
        return num_responses * (1 + _USUAL_CLAIMS)

    def list_templates(self) -> list[str]:
        """How claims are listed, and how one is checked."""
        return [_SPLIT, self.template]

    def _list_prompts(self) -> Any:
        return self.list_templates()

    def render_test(self) -> str:
        """A check of one claim, as most requests are."""
        return self.render(self.template, TEST_TASK, claim="The disc in the middle of the image is red.")

    def read(self, text: str) -> Verdict:
        """1 for yes, 0 for no. Raises Unreadable for both, or neither."""
        said = {word.lower() for word in _YES_OR_NO.findall(after_reasoning(text))}
        if len(said) != 1:
            raise Unreadable("it is neither yes nor no" if not said else "it is both yes and no")
        return Verdict(score=float(said == {"yes"}))

    async def score(self, task: Task, response: Response, *, num_asked: int = 0) -> Verdict:
        """The share of the claims that hold."""
        if (lack := self.find_lack(task)) is not None:
            return lack
        text = self.render(_SPLIT, task, response=self._say(response))
        listed = await self.ask_kept(text, [], read_claims, num_asked=num_asked, response_format=_FORMAT)
        if listed.text is None:
            return _pass_on(listed)
        claims = read_claims(listed.text)
        shown = await self.show(task)
        checks = await await_all(
            self.ask_kept(self.render(self.template, task, claim=claim), shown, self.read, num_asked=num_asked)
            for claim in claims
        )
        if (failed := next((check for check in checks if check.text is None), None)) is not None:
            return _pass_on(failed)
        return _add_up(claims, [self.read(check.text or "").score == 1 for check in checks])


def _add_up(claims: Sequence[str], hold: Sequence[bool]) -> Verdict:
    wrong = [claim for claim, holds in zip(claims, hold, strict=True) if not holds]
    told = f"{len(claims) - len(wrong)} of {len(claims)} claims hold"
    return Verdict(score=sum(hold) / len(hold), rationale=told + (f"; not: {wrong[0]}" if wrong else ""))


def _pass_on(reply: Reply) -> Verdict:
    """The verdict where a reply is missing; what it cost is on record with it."""
    return Verdict(error=reply.error, reason=reply.reason, refused=reply.refused)


def read_claims(text: str) -> list[str]:
    """The claims in an answer, each once. Raises Unreadable where there is none, or more than any chain makes."""
    listed = read_object(text, "claims").get("claims")
    if not isinstance(listed, list) or not all(isinstance(claim, str) for claim in listed):
        raise Unreadable("it has no list of claims")
    claims = list(dict.fromkeys(clean(" ".join(claim.split())) for claim in listed if claim.strip()))
    if not claims or len(claims) > MAX_CLAIMS:
        raise Unreadable(f"it lists {len(claims)} claims; 1 to {MAX_CLAIMS} are checked")
    return claims
