"""The expected score: the mean over the probabilities that a model gives each score, instead of the score that it says.

It tells apart what gets the same likeliest score, so that fewer tasks are ties; as in G-Eval (Liu et al. 2023), and
better than the likeliest score in 92 of 120 comparisons of Wang et al. 2025 ("Improving LLM-as-a-Judge inference with the
judgment distribution"). The score is one digit, 1 to 9, since every tokenizer has a token for each, where "10" may be two.
The answer is structured output where that is offered, so that a model which likes to talk comes to its score. It needs an
API that tells log-probs, as OpenAI's chat models and vLLM do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from importlib import resources
from typing import Any, ClassVar

from vcot.pipeline.client import Choice
from vcot.pipeline.errors import RequestError
from vcot.pipeline.judges.model import ModelJudge
from vcot.pipeline.judges.verdict import Unreadable, build_format
from vcot.pipeline.records import Verdict

_DIGITS = frozenset("123456789")
_DIGIT = re.compile(r"(?<!\d)[1-9](?!\d)")
_LEAST_MASS = 0.5
_NUM_SHOWN = 3


class ExpectedJudge(ModelJudge):
    """A model whose probabilities of the scores are read."""

    version = "expected/1"
    scale = (1, 9)
    template = resources.files(__package__).joinpath("expected.txt").read_text("utf-8").strip()
    takes = ModelJudge.takes - {"num_samples"}
    response_format: ClassVar[dict[str, Any] | None] = build_format(
        "score", {"score": {"type": "integer", "enum": list(range(1, 10))}}
    )
    top_logprobs = 20

    def read(self, text: str) -> Verdict:
        """The score that is said, alone. Raises Unreadable unless one digit from 1 to 9 is."""
        digits = _DIGIT.findall(text)
        if len(digits) != 1:
            raise Unreadable(f"it has {len(digits)} scores from 1 to 9 instead of one")
        return Verdict(score=float(digits[0]))

    def read_choice(self, choice: Choice) -> Verdict:
        """The mean score. Raises Unreadable; RequestError of the account where the API tells no log-probs."""
        if not choice.steps:
            message = f"{self._model} tells no log-probs, which judge.kind = expected goes by; take pointwise"
            raise RequestError(message, scope="account", reason="parameter")
        self.read(choice.text)
        said = next((step for step in choice.steps if _DIGIT.search(step.token)), None)
        shares = {} if said is None else read_shares(said.top)
        mass = sum(shares.values())
        if mass < _LEAST_MASS:
            raise Unreadable(f"the scores 1 to 9 have only {mass:.0%} of the probability")
        score = sum(int(digit) * share for digit, share in shares.items()) / mass
        likeliest = sorted(shares.items(), key=lambda item: -item[1])[:_NUM_SHOWN]
        told = ", ".join(f"{digit} with {share / mass:.0%}" for digit, share in likeliest)
        return Verdict(score=score, rationale=f"no words; {told}")


def read_shares(tokens: Mapping[str, float]) -> dict[str, float]:
    """The probability of each score at one position, from log-probs."""
    shares: dict[str, float] = {}
    for token, logprob in tokens.items():
        if token.strip() in _DIGITS:
            shares[token.strip()] = shares.get(token.strip(), 0.0) + math.exp(logprob)
    return shares
