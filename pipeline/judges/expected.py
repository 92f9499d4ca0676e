"""The expected score: the mean over the probabilities that a model gives each score, instead of the score that it says.

It tells apart what gets the same likeliest score, so that fewer tasks are ties; as in G-Eval (Liu et al. 2023), and
better than the likeliest score in 92 of 120 comparisons of Wang et al. 2025 ("Improving LLM-as-a-Judge inference with the
judgment distribution"). The score is one digit, 1 to 9, since every tokenizer has a token for each, where "10" may be two.
It needs an API that tells log-probs, as OpenAI's chat models and vLLM do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib import resources

from pipeline.client import Choice
from pipeline.errors import RequestError
from pipeline.judges.model import ModelJudge
from pipeline.judges.verdict import Unreadable
from pipeline.records import Verdict

_DIGITS = "123456789"
_LEAST_MASS = 0.5
_NUM_SHOWN = 3


class ExpectedJudge(ModelJudge):
    """A model whose probabilities of the scores are read."""

    version = "expected/1"
    template = resources.files(__package__).joinpath("expected.txt").read_text("utf-8").strip()
    takes = ModelJudge.takes - {"num_samples"}
    top_logprobs = 20

    def read(self, text: str) -> Verdict:
        """The likeliest score alone. Raises Unreadable."""
        if text.strip() not in _DIGITS or not text.strip():
            raise Unreadable("it is no digit from 1 to 9")
        return Verdict(score=float(text))

    def read_choice(self, choice: Choice) -> Verdict:
        """The mean score. Raises Unreadable; RequestError of the account where the API tells no log-probs."""
        if not choice.top:
            message = f"{self._model} tells no log-probs, which judge.kind = expected goes by; take pointwise"
            raise RequestError(message, scope="account", reason="parameter")
        shares = next(filter(None, map(read_shares, choice.top)), {})
        mass = sum(shares.values())
        if mass < _LEAST_MASS:
            raise Unreadable(f"the scores 1 to 9 have only {mass:.0%} of the probability")
        score = sum(int(digit) * share for digit, share in shares.items()) / mass
        likeliest = sorted(shares.items(), key=lambda item: -item[1])[:_NUM_SHOWN]
        told = ", ".join(f"{digit} with {share / mass:.0%}" for digit, share in likeliest)
        return Verdict(score=score, rationale=f"no words; {told}")


def read_shares(tokens: Mapping[str, float]) -> dict[str, float]:
    """The probability of each score at one position, from log-probs; empty where the likeliest token is no score."""
    if max(tokens, key=tokens.__getitem__).strip() not in set(_DIGITS):
        return {}
    shares: dict[str, float] = {}
    for token, logprob in tokens.items():
        if token.strip() in set(_DIGITS):
            shares[token.strip()] = shares.get(token.strip(), 0.0) + math.exp(logprob)
    return shares
