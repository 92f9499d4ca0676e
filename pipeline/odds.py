"""How likely a checkpoint finds each option of a question, as the ledger keeps it."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from pipeline.records import Answered


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

    def margin(self, answer: int) -> float:
        """How much likelier option `answer` is than the likeliest of the others, in nats. Raises ValueError of an error."""
        return self.logps[answer] - max(logp for place, logp in enumerate(self.logps) if place != answer)
