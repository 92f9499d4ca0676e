"""Asking the canary: is what the server holds what the manifest says? Pure.

The question is a fixed image and prompt, answered greedily; the reference is what the Hugging Face model answered in float32
(training/model/canary.py). Token ids are compared, never text: how an id decodes by itself differs between programs.

Two log-probs may each be off by the tolerance of the type that the server computes in, so a token that leads the runner-up
by twice that, or less, may come out as the runner-up. With s tokens before the first such one:

    prompt       the same token ids: a tolerance of 16 bits would forgive one more or less
    answer       the same s token ids
    log-probs    within the tolerance, of the s tokens and of the next, whichever it is: the largest log-prob of a step moves
                 no further than the log-probs do

Two different weights may well give the same tokens, but not the same log-probs to the last bit.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from vcot.pipeline.errors import ServerError
from vcot.pipeline.manifest import Canary

_MIN_LONG = 280
"""Tokens of text: two blocks of a CPU's prefix cache, and some."""


@dataclass(frozen=True)
class CanaryAnswer:
    """What a server answered, by token ids."""

    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


def canary_request(canary: Canary, model: str, tolerance: float, salt: str | None = None) -> dict[str, Any]:
    """The body of the chat completion that asks it, as far as it is compared; with a new `salt`, nothing cached answers."""
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{canary.image_png_base64}"}}
    return {
        "model": model,
        "messages": [{"role": "user", "content": [image, {"type": "text", "text": canary.prompt}]}],
        "temperature": 0.0,
        "max_tokens": _num_compared(canary, tolerance),
        "ignore_eos": True,
        "logprobs": True,
        "return_token_ids": True,
        **({"cache_salt": salt} if salt else {}),
    }


def long_request(canary: Canary, model: str) -> dict[str, Any]:
    """The body of one whose prompt fills whole blocks of the prefix cache, on any build: 128 tokens, on a CPU."""
    num_text = len(canary.prompt_tokens) - max(Counter(canary.prompt_tokens).values())  # but for the image's
    text = "\n".join([canary.prompt] * (1 + _MIN_LONG // max(1, num_text)))
    return {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0.0, "max_tokens": 1}


def parse_canary(payload: dict[str, Any]) -> CanaryAnswer:
    """The answer in a chat completion. Raises ServerError for anything else."""
    try:
        choice = payload["choices"][0]
        steps = [
            (int(token), float(step["logprob"]))
            for token, step in zip(choice["token_ids"], choice["logprobs"]["content"], strict=True)
        ]
        return CanaryAnswer(
            prompt_tokens=tuple(int(token) for token in payload["prompt_token_ids"]),
            tokens=tuple(token for token, _ in steps),
            logprobs=tuple(logprob for _, logprob in steps),
        )
    except (KeyError, IndexError, TypeError, ValueError):
        raise ServerError(f"the canary's answer holds no log-probs or no token ids: {str(payload)[:200]}") from None


def distance(canary: Canary, answer: CanaryAnswer, tolerance: float) -> float:
    """How far the answer is from the manifest's: the worst log-prob's difference, or infinity for other tokens."""
    num_sure, num_compared = _num_sure(canary, tolerance), _num_compared(canary, tolerance)
    if answer.tokens[:num_sure] != canary.tokens[:num_sure] or len(answer.logprobs) != num_compared:
        return math.inf
    if not all(map(math.isfinite, answer.logprobs)):
        return math.inf
    return max(abs(a - b) for a, b in zip(canary.logprobs, answer.logprobs, strict=False))


def agree(one: CanaryAnswer, other: CanaryAnswer, tolerance: float) -> bool:
    """Whether two answers are those of the same weights, as far as they go on alike: each log-prob may be off."""
    for a, b, one_token, other_token in zip(one.logprobs, other.logprobs, one.tokens, other.tokens, strict=False):
        if not abs(a - b) <= 2 * tolerance:
            return False
        if one_token != other_token:
            break
    return True


def explain_difference(canary: Canary, answer: CanaryAnswer, tolerance: float) -> str | None:
    """Why the answer is not the manifest's, or None where it is; `tolerance` is of a log-prob."""
    if answer.prompt_tokens != canary.prompt_tokens:
        at = _first_difference(canary.prompt_tokens, answer.prompt_tokens)
        return (
            f"the server read the prompt as {len(answer.prompt_tokens)} tokens, and it was {len(canary.prompt_tokens)} in "
            f"training, others from token {at + 1} on: another chat template or image processor"
        )
    num_sure, num_compared = _num_sure(canary, tolerance), _num_compared(canary, tolerance)
    if len(answer.logprobs) != num_compared:
        return f"{len(answer.logprobs)} tokens came, and {num_compared} were asked for"
    if answer.tokens[:num_sure] != canary.tokens[:num_sure]:
        at = _first_difference(canary.tokens[:num_sure], answer.tokens[:num_sure])
        return f"token {at + 1} of the answer is {answer.tokens[at]}, and {canary.tokens[at]} in the manifest"
    worst = distance(canary, answer, tolerance)
    if not worst <= tolerance:
        return f"a log-prob differs by {worst:.2g}, and the tolerance is {tolerance:.2g}"
    return None


def _num_sure(canary: Canary, tolerance: float) -> int:
    """Tokens before the first that may come out as the runner-up."""
    doubtful = (index for index, lead in enumerate(canary.leads) if not lead > 2 * tolerance)
    return next(doubtful, len(canary.leads))


def _num_compared(canary: Canary, tolerance: float) -> int:
    """Tokens whose log-probs are compared: the sure ones and the next."""
    return min(_num_sure(canary, tolerance) + 1, len(canary.tokens))


def _first_difference(expected: tuple[int, ...], found: tuple[int, ...]) -> int:
    return next(index for index, (a, b) in enumerate(zip_longest(expected, found)) if a != b)
