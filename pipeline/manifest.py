"""`checkpoint.json`: what a checkpoint says of itself, and how it is recognised again."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from vcot.pipeline.records import CheckpointRef, Record


class Canary(Record):
    """A fixed question about a fixed image with the greedy answer that the Hugging Face model gave (float32 log-probs).

    The gateway asks it after every swap. `logprobs[i]` is log p(tokens[i] | image, prompt, tokens[:i]). How much of it must
    agree depends on the type that the server computes in, and is not said here (services/gateway/swap/canary_check.py).
    """

    image_png_base64: str
    prompt: str
    prompt_tokens: Annotated[tuple[int, ...], Field(min_length=1)]
    """Token ids as the model reads them, each image's tokens included."""
    tokens: Annotated[tuple[int, ...], Field(min_length=1)]
    """Token ids of the answer, up to EOS."""
    logprobs: tuple[float, ...]
    leads: tuple[Annotated[float, Field(ge=0)], ...]
    """By how much each token's log-prob leads the runner-up's."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not len(self.tokens) == len(self.logprobs) == len(self.leads):
            raise ValueError(
                f"a canary of {len(self.tokens)} tokens has {len(self.logprobs)} logprobs and {len(self.leads)} leads"
            )
        return self


class CheckpointManifest(Record):
    """`checkpoint.json`, beside the weights: what they are, where they come from, and how to recognise them."""

    checkpoint: CheckpointRef
    job: str | None = None
    """Key of the training job that made it; None for a base."""
    canary: Canary | None = None
