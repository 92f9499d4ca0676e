"""How likely a checkpoint finds each option of a question, as the ledger keeps it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from pydantic import model_validator

from vcot.pipeline.records import Answered


class OptionScores(Answered):
    """How likely a checkpoint finds each option of a question as the answer, as the ledger keeps it."""

    key: str
    """Of what was asked: weights, question, options, what was shown, and the words that state an option."""
    task: str
    checkpoint: str
    """Weights digest."""
    logps: tuple[float, ...] = ()
    """Of each option in order, in nats, from the first token on at which the options differ."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (not self.logps) == (self.error is None):
            raise ValueError("options have either log-probabilities or an error")
        return self

    def margin(self, is_right: Sequence[bool]) -> float:
        """By how much the likeliest right option is ahead of the likeliest other, in nats.

        `is_right` says which are: several where options say the same. Raises ValueError of an error, or where none is wrong.
        """
        right, wrong = [
            [logp for logp, is_so in zip(self.logps, is_right, strict=True) if is_so == so] for so in (True, False)
        ]
        return max(right) - max(wrong)
