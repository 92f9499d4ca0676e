"""Asking a served checkpoint how likely it finds each option of a question as its answer.

Each option is sent back as a conversation that breaks off with `The answer is (B)`, and vLLM tells how likely each token is
(`prompt_logprobs`). The conversations of one question begin alike, so from the first token on at which they differ the sum
says which option the model would give, whatever the tokenizer makes of a letter. Nothing is drawn, so there is no seed, and
no answer that cannot be read. What was told is in the ledger before it counts, and what is there is not asked again.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vcot.pipeline.client import ChatClient, Scored, user_message
from vcot.pipeline.concurrency import with_retry
from vcot.pipeline.errors import BadAnswer, RequestError
from vcot.pipeline.images import ImageStore
from vcot.pipeline.ledger import Ledger
from vcot.pipeline.odds import OptionScores
from vcot.pipeline.records import SamplingParams, StageCount, Usage, content_key
from vcot.pipeline.sample import GATEWAY, SampleRequest
from vcot.pipeline.stage import OnProgress, Tally, work_off

OPTION_PROMPT = "zero_shot"
"""The paper's prompt that asks for the answer alone; after `cot` a model would have to answer before it has thought."""
NOT_DRAWN = SamplingParams(temperature=0, max_tokens=1, n=1, seed=0)
"""What the requests' keys are made with."""
_ANSWER = "The answer is ({letter})"


def key_options(request: SampleRequest) -> str:
    """Key of what is asked about the options of the request's question."""
    return content_key(options=request.key, answer=_ANSWER)


def list_owed_options(requests: Sequence[SampleRequest], ledger: Ledger) -> tuple[list[SampleRequest], Tally]:
    """Those that were not asked, or failed, and the account of the others."""
    found, tally = ledger.get(OptionScores, map(key_options, requests)), Tally("margins", total=len(requests))
    owed = []
    for request in requests:
        kept = found.get(key_options(request))
        if kept is None or not kept.is_final:
            owed.append(request)
        else:
            tally.add_kept(kept)
    return owed, tally


async def score_options(
    requests: Sequence[SampleRequest],
    client: ChatClient,
    ledger: Ledger,
    images: ImageStore,
    *,
    max_concurrency: int,
    on_progress: OnProgress = lambda _: None,
) -> StageCount:
    """Ask what is owed of `requests`, whose questions have options. Raises as `work_off` does."""
    owed, tally = list_owed_options(requests, ledger)
    asker = _Asker(client, ledger, images)
    return await work_off(owed, asker.score, tally, limit=max_concurrency, place=GATEWAY, on_progress=on_progress)


def compare_options(options: Sequence[Scored]) -> tuple[float, ...]:
    """The log-probability of each from the first token on at which not all are alike.

    Raises BadAnswer, of the item, where one is the beginning of another, or is no finite number.
    """
    begin = next(
        (at for at, tokens in enumerate(zip(*(o.tokens for o in options), strict=False)) if len(set(tokens)) > 1), 0
    )
    if not begin:
        fault = "the options are the same tokens, or one is the beginning of another"
        raise BadAnswer(f"no margin: {fault}", scope="item", reason="not_comparable")
    logps = tuple(math.fsum(option.logprobs[begin - 1 :]) for option in options)
    if not all(map(math.isfinite, logps)):
        raise BadAnswer("no margin: a token has no finite log-probability", scope="item", reason="not_comparable")
    return logps


@dataclass(frozen=True)
class _Asker:
    client: ChatClient
    ledger: Ledger
    images: ImageStore

    async def score(self, request: SampleRequest) -> list[OptionScores]:
        """What is told of a question's options, durable. Raises RequestError of the account."""
        shown = await asyncio.to_thread(self.images.read_all, request.task.images) if request.task.images else []
        user, options = user_message(request.text, shown), list[Scored]()
        try:
            for number in range(len(request.task.choices)):
                options.append(await self._ask(request, user, chr(ord("A") + number)))
            scores = _sign(request, options, logps=compare_options(options))
        except RequestError as fault:
            if fault.scope == "account":
                raise
            scores = _sign(request, options, error=str(fault), reason=fault.reason, refused=fault.scope == "item")
        await self.ledger.write([scores])
        return [scores]

    async def _ask(self, request: SampleRequest, user: dict[str, Any], letter: str) -> Scored:
        messages = [user, {"role": "assistant", "content": _ANSWER.format(letter=letter)}]
        ref = request.checkpoint
        return await with_retry(lambda: self.client.score(ref.name, messages, expect=ref.digest, has_end=False))


def _sign(request: SampleRequest, options: Sequence[Scored], **outcome: Any) -> OptionScores:
    usage = Usage(prompt_tokens=sum(len(each.tokens) for each in options), completion_tokens=len(options))
    return OptionScores(
        key=key_options(request),
        task=request.task.id,
        checkpoint=request.checkpoint.digest,
        usage=usage if options else None,
        **outcome,
    )
