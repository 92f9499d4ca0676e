"""Asking the canary: is what the server holds what the manifest says? Pure.

The question is a fixed image and prompt, answered greedily; the reference are the tokens and log-probs that the Hugging
Face model gave (training/canary.py). The prompt must be as many tokens as in training, the answer's tokens must be equal,
and their log-probs within the manifest's tolerance, which in 16 bits would forgive a prompt that is a token longer. Two
different weights may well give the same tokens, but not the same log-probs to the last bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pipeline.errors import ServerError
from pipeline.records import Canary

_HALF = "\ufffd"
"""How a token that is no whole character decodes by itself; vLLM gives such a one as an empty string."""


@dataclass(frozen=True)
class CanaryAnswer:
    """What a server answered, token by token."""

    num_prompt_tokens: int
    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]


def canary_request(canary: Canary, model: str) -> dict[str, Any]:
    """The body of the chat completion that asks it."""
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{canary.image_png_base64}"}}
    return {
        "model": model,
        "messages": [{"role": "user", "content": [image, {"type": "text", "text": canary.prompt}]}],
        "temperature": 0.0,
        "max_tokens": len(canary.tokens),
        "ignore_eos": True,
        "logprobs": True,
    }


def parse_canary(payload: dict[str, Any]) -> CanaryAnswer:
    """The answer in a chat completion. Raises ServerError for anything else."""
    try:
        content = payload["choices"][0]["logprobs"]["content"]
        return CanaryAnswer(
            num_prompt_tokens=int(payload["usage"]["prompt_tokens"]),
            tokens=tuple(str(t["token"]) for t in content),
            logprobs=tuple(float(t["logprob"]) for t in content),
        )
    except (KeyError, IndexError, TypeError, ValueError):
        raise ServerError(f"the canary's answer holds no log-probs or no usage: {str(payload)[:200]}") from None


def distance(canary: Canary, answer: CanaryAnswer) -> float:
    """How far the answer is from the manifest's: the worst log-prob's difference, or infinity for other tokens."""
    if len(answer.tokens) != len(canary.tokens) or not all(map(_is_same, canary.tokens, answer.tokens)):
        return math.inf
    return max((abs(a - b) for a, b in zip(canary.logprobs, answer.logprobs, strict=True)), default=0.0)


def _is_same(expected: str, token: str) -> bool:
    return token == expected or (token == "" and expected.endswith(_HALF))


def explain_difference(canary: Canary, answer: CanaryAnswer) -> str | None:
    """Why the answer is not the manifest's, or None where it is."""
    if answer.num_prompt_tokens != canary.num_prompt_tokens:
        return (
            f"the server read the prompt as {answer.num_prompt_tokens} tokens, and it was {canary.num_prompt_tokens} in "
            "training: another chat template or image processor"
        )
    for position, (expected, token) in enumerate(zip(canary.tokens, answer.tokens, strict=False)):
        if not _is_same(expected, token):
            return f"token {position + 1} is {token!r}, and {expected!r} in the manifest"
    if len(answer.tokens) != len(canary.tokens):
        return f"{len(answer.tokens)} tokens came, and {len(canary.tokens)} are in the manifest"
    worst = distance(canary, answer)
    if not worst <= canary.tolerance:
        return f"a log-prob differs by {worst:.2g}, and the tolerance is {canary.tolerance:.2g}"
    return None
