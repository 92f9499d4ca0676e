"""Requests of one kind, as estimates count them: what one reads, and how much it is answered."""

from __future__ import annotations

from dataclasses import dataclass

from vcot.pipeline.prompts import PROMPTS
from vcot.pipeline.records import PromptName
from vcot.services.planning.assumptions import ANSWER_TOKENS, THOUGHT_TOKENS, Span


@dataclass(frozen=True)
class Workload:
    """Requests of one kind: `n` responses each, of one prompt with an image."""

    prompt: PromptName
    n: int
    max_concurrency: int
    max_tokens: int
    said_tokens: int = 0
    """Of a text that is sent behind the prompt, to be told how likely it is."""

    @property
    def num_prompts_read(self) -> int:
        """Prompts that the model reads for one request: of two turns, the second for each answer to the first, at most."""
        return 1 if PROMPTS.resolve(self.prompt).then is None else 1 + self.n

    @property
    def text_tokens(self) -> int:
        """Of one prompt and what is sent behind it, without its image."""
        return PROMPTS.resolve(self.prompt).num_tokens + self.said_tokens

    @property
    def response_tokens(self) -> Span:
        """Of one response."""
        return Span(*cut_tokens(ANSWER_TOKENS if self.prompt == "zero_shot" else THOUGHT_TOKENS, self.max_tokens))


def cut_tokens(tokens: Span, max_tokens: int) -> tuple[float, float, float]:
    """The three cases, each at most `max_tokens`."""
    return min(tokens.low, max_tokens), min(tokens.likely, max_tokens), min(tokens.high, max_tokens)
