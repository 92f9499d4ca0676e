"""The pointwise judge: a stronger model scores each response on its own, from 1 to 10.

It sees the image, the question and the response, and the gold answer only where the recipe says so (judge.gold). The
verdict is structured output.
"""

from __future__ import annotations

from importlib import resources
from typing import Any, ClassVar

from vcot.pipeline.judges.model import ModelJudge
from vcot.pipeline.judges.verdict import MAX_SCORE, MIN_SCORE, build_format, read_verdict
from vcot.pipeline.records import Verdict

_PROPERTIES = {
    "rationale": {"type": "string"},
    "score": {"type": "integer", "enum": list(range(MIN_SCORE, MAX_SCORE + 1))},
}


class PointwiseJudge(ModelJudge):
    """A model that gives a rationale and a score."""

    version = "pointwise/1"
    scale = (MIN_SCORE, MAX_SCORE)
    template = resources.files(__package__).joinpath("pointwise.txt").read_text("utf-8").strip()
    response_format: ClassVar[dict[str, Any] | None] = build_format("verdict", _PROPERTIES)

    def read(self, text: str) -> Verdict:
        """The one verdict in `text`, however it is wrapped. Raises Unreadable."""
        return read_verdict(text)
