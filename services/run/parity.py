"""Asking a served checkpoint its probe, to see that what answers at the URL is what was trained.

Model: the probe's responses are sent back as finished conversations, and the server says how likely it finds each token.
It is asked as any client asks, through the gateway, so template, tokenizer, image processing and weights are all on
trial. The rule is in training/protocol/agreement.py; no torch is needed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

from vcot.pipeline.client import ChatClient, Scored
from vcot.pipeline.concurrency import map_bounded, with_retry
from vcot.pipeline.errors import SwapError
from vcot.pipeline.records import CheckpointRef, Record, SamplingParams
from vcot.training.protocol.agreement import (
    FORCED_TOLERANCES,
    Answers,
    Probe,
    ProbePair,
    compare_served,
    find_served_fault,
)
from vcot.training.protocol.job import Retention
from vcot.training.protocol.train_sections import Dtype

_NEUTRAL = {
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
_UNSET = {"temperature": None, "top_p": None}
_DRAWN = SamplingParams(temperature=1.0, max_tokens=16, n=8, seed=0)


class ParityReport(Record):
    """A checkpoint that passed the gate: what is served is what was trained, and is not the base."""

    checkpoint: CheckpointRef
    dtype: Dtype
    """What vLLM computed in."""
    tolerance: float
    max_abs_logp: dict[str, float]
    """Largest difference of a token's log-prob, by pair of models."""
    differs_from_base: float
    """Largest difference of a token's log-prob between the served checkpoint and the served base."""
    retention: Retention
    """Of the reward margins, as served."""


async def ask_served(client: ChatClient, ref: CheckpointRef, probe: Probe, max_concurrency: int) -> Answers:
    """How likely the server finds the probe's responses.

    Raises SwapError where it reads other tokens than were trained, RequestError where it does not answer.
    """
    asked = [(pair, row) for pair in probe.pairs for row in (pair.chosen, pair.rejected)]

    async def ask(index: int) -> tuple[int, Scored]:
        pair, row = asked[index]
        messages = [*pair.prompt, {"role": "assistant", "content": row.text}]
        return index, await with_retry(lambda: client.score(ref.name, messages, expect=ref.digest))

    answers = {}
    async for index, scored in map_bounded(ask, range(len(asked)), limit=max_concurrency):
        trained = asked[index][1].tokens
        _check_tokens(ref, trained + probe.closing, scored.tokens)
        answers[index] = scored.logprobs[: len(trained) - 1][-len(probe.base[index]) :]
    return Answers.of([answers[index] for index in range(len(asked))])


def _check_tokens(ref: CheckpointRef, trained: tuple[int, ...], served: tuple[int, ...]) -> None:
    if served == trained:
        return
    at = next(i for i, (a, b) in enumerate(zip_longest(trained, served)) if a != b)
    raise SwapError(
        f"{ref.name} is not asked as it was trained: from token {at + 1} on the server reads {served[at : at + 4]}, where "
        f"{trained[at : at + 4]} was trained (a BOS more or less, another chat template, another image size): serve it "
        "with the chat template and processor that were saved with it"
    )


async def check_defaults(client: ChatClient, ref: CheckpointRef, probe: Probe) -> None:
    """See that a request that leaves sampling settings out is answered as one that sets them to nothing.

    A server may take such defaults from the model's generation config. Each request starts with cold caches, so that equal
    requests are computed alike; where even they are answered otherwise, nothing can be said. Raises SwapError.
    """

    async def draw(salt: str, settings: Mapping[str, Any]) -> tuple[str, ...]:
        extra = {"cache_salt": salt, **settings}
        pair: ProbePair = probe.pairs[0]
        answer = await client.complete(ref.name, pair.prompt, _DRAWN, expect=ref.digest, extra_body=extra)
        return tuple(choice.text for choice in answer.choices)

    plain, again, unset = [await draw(*each) for each in (("a", _NEUTRAL), ("b", _NEUTRAL), ("c", _UNSET))]
    if plain == again != unset:
        raise SwapError(
            f"{ref.name} is not sampled as asked: a request without sampling settings is answered with others than "
            "temperature 1 and no filter, which the server took from the model's generation_config.json; start vLLM with "
            "--generation-config vllm"
        )


def verify(ref: CheckpointRef, served: Answers, served_base: Answers, probe: Probe, dtype: Dtype) -> ParityReport:
    """The verdict. Raises SwapError where what is served is not the policy."""
    fault = find_served_fault(served, served_base, probe, dtype)
    if fault:
        raise SwapError(f"{ref.name} is not served as it was trained: {fault}")
    base, policy, stored = (Answers.of(answers) for answers in (probe.base, probe.policy, probe.stored))
    return ParityReport(
        checkpoint=ref,
        dtype=dtype,
        tolerance=FORCED_TOLERANCES[dtype],
        max_abs_logp={
            "HF base + adapter, HF checkpoint": policy.difference(stored),
            "HF checkpoint, vLLM checkpoint": stored.difference(served),
            "HF base, vLLM base": base.difference(served_base),
        },
        differs_from_base=served.difference(served_base),
        retention=compare_served(served, served_base, probe),
    )
