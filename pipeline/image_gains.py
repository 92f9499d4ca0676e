"""Asking a served checkpoint what images add to its responses (pipeline/gain.py says what that is).

Each text is sent back twice as a conversation that breaks off with it, about the task's images and about blank ones, and
vLLM tells how likely each token is; how many tokens the prompt has is asked once for a task. A gain is in the ledger before
it counts, and what is there is not asked again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from vcot.pipeline.client import ChatClient, user_message
from vcot.pipeline.concurrency import with_retry
from vcot.pipeline.errors import RequestError
from vcot.pipeline.gain import compare_images, key_gain
from vcot.pipeline.images import ImageStore
from vcot.pipeline.ledger import Ledger
from vcot.pipeline.prompts import render_prompt
from vcot.pipeline.records import ImageGain, ImageRef, Response, StageCount, Task, Usage
from vcot.pipeline.sample import GATEWAY
from vcot.pipeline.stage import OnProgress, Tally, work_off

T = TypeVar("T")


@dataclass(frozen=True)
class GainAsk:
    """Responses of one checkpoint to one task, and what is shown instead of its images."""

    task: Task
    blanks: tuple[ImageRef, ...]
    responses: Sequence[Response]


async def measure_gains(
    asks: Iterable[GainAsk],
    client: ChatClient,
    ledger: Ledger,
    images: ImageStore,
    tally: Tally,
    *,
    max_concurrency: int,
    on_progress: OnProgress = lambda _: None,
) -> StageCount:
    """Ask all of `asks`, tasks at a time; `tally` has what needs no asking. Raises as `work_off` does."""
    asker = _Asker(client, ledger, images)
    return await work_off(asks, asker.measure, tally, limit=max_concurrency, place=GATEWAY, on_progress=on_progress)


@dataclass(frozen=True)
class _Asker:
    client: ChatClient
    ledger: Ledger
    images: ImageStore

    async def measure(self, ask: GainAsk) -> list[ImageGain]:
        """The gains of a task's responses, each durable as soon as it is known. Raises RequestError of the account."""
        text = render_prompt(ask.responses[0].prompt, ask.task)
        true, blank = [
            user_message(text, await asyncio.to_thread(self.images.read_all, shown))
            for shown in (ask.task.images, ask.blanks)
        ]
        ref = ask.responses[0].checkpoint
        prompt = await _try(lambda: self.client.read_prompt(ref.name, [true], expect=ref.digest))
        gains = []
        for response in ask.responses:
            gain = await self._compare(response, true, blank, prompt)
            await self.ledger.write([gain])
            gains.append(gain)
        return gains

    async def _compare(
        self, response: Response, true: dict[str, Any], blank: dict[str, Any], prompt: tuple[int, ...] | RequestError
    ) -> ImageGain:
        ref, said = response.checkpoint, {"role": "assistant", "content": response.text}
        if isinstance(prompt, RequestError):
            return _fail(response, prompt)
        scored = []
        for user in (true, blank):
            found = await _try(
                lambda user=user: self.client.score(ref.name, [user, said], expect=ref.digest, has_end=False)  # type: ignore[misc]
            )
            if isinstance(found, RequestError):
                return _fail(response, found)
            scored.append(found)
        usage = Usage(prompt_tokens=sum(len(each.tokens) for each in scored), completion_tokens=len(scored))
        try:
            compared = compare_images(prompt, *scored)
        except RequestError as fault:
            return _fail(response, fault, usage=usage)
        return _sign(
            response,
            logp_true=compared.logp_true,
            logp_blank=compared.logp_blank,
            num_tokens=compared.num_tokens,
            usage=usage,
        )


async def _try(call: Callable[[], Awaitable[T]]) -> T | RequestError:
    """What came of it, or the fault. Raises RequestError of the account."""
    try:
        return await with_retry(call)
    except RequestError as fault:
        if fault.scope == "account":
            raise
        return fault


def _fail(response: Response, fault: RequestError, **outcome: Any) -> ImageGain:
    return _sign(response, error=str(fault), reason=fault.reason, refused=fault.scope == "item", **outcome)


def _sign(response: Response, **outcome: Any) -> ImageGain:
    return ImageGain(key=key_gain(response), response=response.key, checkpoint=response.checkpoint.digest, **outcome)
