"""Drawing responses: k per task, one request with `n=k`, several requests in flight.

A request's key says all that determines its answer, so planning is pure: the same tasks, prompt, weights and settings give
the same keys, the ledger says which are answered, and only the rest are asked.

A prompt of two turns is asked in two: the first with `n=k` in one request, then the second once for each text that came,
with as many choices as there were answers of that text. The first turn's answers are kept under a key of their own, which
says all that determines them, before the second is asked: whatever stops a command, no answered turn is asked again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import ceil
from typing import Any

from vcot.pipeline.client import ChatClient, Completion, user_message
from vcot.pipeline.concurrency import map_bounded, with_retry
from vcot.pipeline.errors import RequestError
from vcot.pipeline.faults import Place
from vcot.pipeline.images import ImageStore
from vcot.pipeline.ledger import Ledger
from vcot.pipeline.prompts import PROMPTS, join_turns, render_prompt, render_second, split_thought
from vcot.pipeline.records import (
    CheckpointRef,
    ImageRef,
    PromptName,
    Response,
    SamplingParams,
    StageCount,
    Task,
    add_usages,
    content_key,
)
from vcot.pipeline.saturation import Saturation
from vcot.pipeline.stage import OnProgress, Tally, batched, work_off

_NO_ROOM = (429, 503)
_FIRST_RESPONSES = 64
"""In flight to begin with, however many a request asks for: a server generates so many at once with any model."""
GATEWAY = Place(key_env="VCOT_API_KEY", model_field="model.name", url_field="serve.url")


@dataclass(frozen=True)
class SampleRequest:
    """One request: the group of `sampling.n` responses to one task."""

    task: Task
    prompt: PromptName
    text: str
    """The rendered user turn."""
    checkpoint: CheckpointRef
    sampling: SamplingParams
    """With the request's own seed."""
    key: str
    first_key: str | None = None
    """Of a prompt of two turns: the key of the first turn's group."""
    is_first_turn: bool = False

    def response_key(self, index: int) -> str:
        """Key of the response with this index."""
        return content_key(group=self.key, index=index)

    def response_keys(self) -> list[str]:
        """Keys of the whole group."""
        return [self.response_key(index) for index in range(self.sampling.n)]


@dataclass(frozen=True)
class Plan:
    """What is asked of one checkpoint: a request for each task, made anew each time that it is gone through."""

    tasks: Sequence[Task]
    prompt: PromptName
    checkpoint: CheckpointRef
    sampling: SamplingParams

    def __len__(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator[SampleRequest]:
        """With keys and seeds. Pure but for the file of a prompt of one's own."""
        code = PROMPTS.digest_own(self.prompt)
        return (_plan(task, self.prompt, self.checkpoint, self.sampling, code) for task in self.tasks)


def _plan(
    task: Task, prompt: PromptName, checkpoint: CheckpointRef, sampling: SamplingParams, code: Mapping[str, str]
) -> SampleRequest:
    text, then = render_prompt(prompt, task), render_second(prompt, task, "<first>")
    asked = {
        "weights": checkpoint.digest,
        "task": task.id,
        "image": task.picture,
        "prompt": text,
        "sampling": sampling,
        **code,
    }
    if then is None:
        key, first_key = content_key(**asked), None
    else:
        first_key = content_key(**asked, turn=1)
        key = content_key(first=first_key, then=then, joint=PROMPTS.resolve(prompt).joint)
    return SampleRequest(task, prompt, text, checkpoint, _seed(sampling, first_key or key), key, first_key)


def _seed(sampling: SamplingParams, key: str) -> SamplingParams:
    """The settings with the seed of what has this key."""
    return sampling.model_copy(update={"seed": int(key[:8], 16) >> 1})


def show_images(request: SampleRequest, images: tuple[ImageRef, ...]) -> SampleRequest:
    """The same request about `images` instead: same text, settings and seed, and a key of its own. Pure."""
    task = request.task.model_copy(update={"images": images})
    key = content_key(asked=request.key, image=task.picture)
    first_key = content_key(asked=request.first_key, image=task.picture) if request.first_key else None
    return replace(request, task=task, key=key, first_key=first_key)


def withhold_question(request: SampleRequest) -> SampleRequest:
    """The same request with the options alone: without images and question, and with a key of its own. Pure."""
    task = request.task.model_copy(update={"images": (), "question": ""})
    key = content_key(asked=request.key, question=None)
    first_key = content_key(asked=request.first_key, question=None) if request.first_key else None
    return replace(request, task=task, text=render_prompt(request.prompt, task), key=key, first_key=first_key)


Requests = Plan | Sequence[SampleRequest]
"""What can be gone through more than once."""


@dataclass(frozen=True)
class Group:
    """A task, and what the ledger holds of the responses that were asked for, errors included, by index."""

    task: Task
    found: Sequence[Response]

    @property
    def good(self) -> list[Response]:
        """The responses that have a text."""
        return [response for response in self.found if response.error is None]


@dataclass(frozen=True)
class Groups:
    """What was answered to some requests, in their order: read anew each time that it is gone through, some at a time."""

    requests: Requests
    ledger: Ledger

    def __iter__(self) -> Iterator[Group]:
        for chunk in batched(self.requests):
            keys = [request.response_keys() for request in chunk]
            found = self.ledger.get(Response, chain.from_iterable(keys))
            for request, own in zip(chunk, keys, strict=True):
                yield Group(request.task, [found[key] for key in own if key in found])


async def sample(
    requests: Requests,
    client: ChatClient,
    ledger: Ledger,
    images: ImageStore,
    *,
    max_concurrency: int = 64,
    on_progress: OnProgress = lambda _: None,
) -> StageCount:
    """Ask what is owed of `requests`; every answer is in the ledger before it counts. Counts are of responses.

    Requests are gone through twice, and none is held: what is there already is counted, and the others are asked. As many
    are in flight as keep the server busy (pipeline/saturation.py), and never more than `max_concurrency`.
    """
    tally, most = Tally("sample", total=0), 1
    for request, is_done in look(requests, ledger):
        tally.total += request.sampling.n
        most = max(most, request.sampling.n)
        tally.cached += count_known(request, ledger, is_done=is_done)
    owed = (request for request, is_done in look(requests, ledger) if not is_done)

    limit = Saturation(max_concurrency, first=ceil(_FIRST_RESPONSES / most))
    upstream = _Upstream(client, ledger, images, limit)
    return await work_off(
        owed, upstream.answer, tally, limit=lambda: limit.limit, place=GATEWAY, on_progress=on_progress
    )


def look(requests: Iterable[SampleRequest], ledger: Ledger) -> Iterator[tuple[SampleRequest, bool]]:
    """Each request, and whether its group is wholly answered."""
    for chunk in batched(requests):
        done = ledger.done(Response, (key for request in chunk for key in request.response_keys()))
        for request in chunk:
            yield request, done.issuperset(request.response_keys())


def is_owed(requests: Iterable[SampleRequest], ledger: Ledger) -> bool:
    """Whether any of them is not wholly answered."""
    return any(not is_done for _, is_done in look(requests, ledger))


def count_known(request: SampleRequest, ledger: Ledger, *, is_done: bool) -> int:
    """Responses of a group that are not asked for."""
    return request.sampling.n if is_done else len(find_kept(request, ledger))


def find_kept(request: SampleRequest, ledger: Ledger) -> set[str]:
    """Keys of an unfinished group that are not asked for again: a group of two turns is answered text by text."""
    return ledger.done(Response, request.response_keys()) if request.first_key else set()


def find_first(request: SampleRequest) -> SampleRequest | None:
    """The request of the first turn, whose answers are kept by themselves; None of a prompt of one turn."""
    if request.first_key is None:
        return None
    return replace(request, key=request.first_key, first_key=None, is_first_turn=True)


@dataclass(frozen=True)
class _Upstream:
    """Who is asked, where the answers go, and how many requests are in flight meanwhile."""

    client: ChatClient
    ledger: Ledger
    images: ImageStore
    saturation: Saturation

    async def answer(self, request: SampleRequest) -> Sequence[Response]:
        """What the group lacks, durable. Raises RequestError of the account."""
        began = asyncio.get_running_loop().time()
        if request.first_key is not None:
            responses = await _ask_in_turns(request, self)
        else:
            responses = await _ask(request, self)
            await self.ledger.write(responses)
        if all(response.error is None for response in responses):
            self.saturation.note(began, asyncio.get_running_loop().time())
        return responses

    async def complete(self, request: SampleRequest) -> Completion | RequestError:
        """The answer, or the fault that came instead. Raises RequestError of the account."""
        loop = asyncio.get_running_loop()
        shown = await asyncio.to_thread(self.images.read_all, request.task.images) if request.task.images else []
        messages = [user_message(request.text, shown)]
        began = loop.time()

        async def call() -> Completion:
            digest = request.checkpoint.digest
            return await self.client.complete(request.checkpoint.name, messages, request.sampling, expect=digest)

        def on_failure(error: RequestError) -> None:
            if error.status in _NO_ROOM:
                self.saturation.shrink(began, loop.time())

        try:
            return await with_retry(call, on_failure=on_failure)
        except RequestError as error:
            if error.scope == "account":
                raise
            return error


async def _ask(request: SampleRequest, upstream: _Upstream) -> list[Response]:
    """The group's responses, or n records of the error that came instead. Raises RequestError of the account."""
    completion = await upstream.complete(request)
    indexes = range(request.sampling.n)
    if isinstance(completion, RequestError):
        return [_response(request, i, **_explain(completion)) for i in indexes]
    return [_answered(request, i, completion) for i in indexes]


def _explain(fault: RequestError) -> dict[str, Any]:
    return {"error": str(fault), "reason": fault.reason, "refused": fault.scope == "item"}


async def _ask_in_turns(request: SampleRequest, upstream: _Upstream) -> list[Response]:
    """What the group still lacks, each text's second turn durable as soon as it is answered. Raises as `_ask` does."""
    firsts = await _ask_first(request, upstream)
    if (failed := next((first for first in firsts if first.error), None)) is not None:
        outcome = failed.model_dump(include={"error", "reason", "refused"})
        responses = [_response(request, i, **outcome) for i in range(request.sampling.n)]
        await upstream.ledger.write(responses)
        return responses
    done = upstream.ledger.done(Response, request.response_keys())
    by_text: dict[str, list[Response]] = {}
    for first in firsts:
        if request.response_key(first.index) not in done:
            by_text.setdefault(first.text or "", []).append(first)

    async def ask_second(same: Sequence[Response]) -> list[Response]:
        responses = await _ask_second(request, same, upstream)
        await upstream.ledger.write(responses)
        return responses

    answered = map_bounded(ask_second, by_text.values(), limit=request.sampling.n)
    return [response async for responses in answered for response in responses]


async def _ask_first(request: SampleRequest, upstream: _Upstream) -> Sequence[Response]:
    """The answers to the first turn, as they are kept; what failed is not."""
    own = find_first(request)
    assert own is not None
    found = upstream.ledger.get(Response, own.response_keys())
    if len(found) == own.sampling.n:
        return [found[key] for key in own.response_keys()]
    firsts = await _ask(own, upstream)
    if not any(first.error for first in firsts):
        await upstream.ledger.write(firsts)
    return firsts


async def _ask_second(request: SampleRequest, same: Sequence[Response], upstream: _Upstream) -> list[Response]:
    """The second turn after one text, as responses of the indexes that share it."""
    text = same[0].text or ""
    second = render_second(request.prompt, request.task, text)
    assert second is not None
    sampling = _seed(request.sampling, content_key(seed=request.sampling.seed, first=text))
    sampling = sampling.model_copy(update={"n": len(same)})
    completion = await upstream.complete(replace(request, text=second, sampling=sampling))
    if isinstance(completion, RequestError):
        return [_response(request, first.index, **_explain(completion)) for first in same]
    return [_joined(request, first, completion, place) for place, first in enumerate(same)]


def _joined(request: SampleRequest, first: Response, completion: Completion, place: int) -> Response:
    """A response of both turns, with its share of the tokens: the first turn's go with the group's first response."""
    choice = completion.choices[place]
    text = join_turns(request.prompt, first.text or "", choice.text)
    thought, answer = split_thought(request.prompt, text)
    return _response(
        request,
        first.index,
        text=text,
        thought=thought,
        answer=answer,
        finish_reason=choice.finish_reason,
        usage=add_usages((completion.usage if place == 0 else None, first.usage)),
        latency_s=(first.latency_s or 0.0) + completion.latency_s,
    )


def _answered(request: SampleRequest, index: int, completion: Completion) -> Response:
    choice = completion.choices[index]
    thought, answer = (None, None) if request.is_first_turn else split_thought(request.prompt, choice.text)
    return _response(
        request,
        index,
        is_first_turn=request.is_first_turn,
        text=choice.text,
        thought=thought,
        answer=answer,
        finish_reason=choice.finish_reason,
        usage=completion.usage if index == 0 else None,
        latency_s=completion.latency_s,
    )


def _response(request: SampleRequest, index: int, **outcome: Any) -> Response:
    return Response(
        key=request.response_key(index),
        group=request.key,
        task=request.task.id,
        index=index,
        checkpoint=request.checkpoint,
        prompt=request.prompt,
        sampling=request.sampling,
        **outcome,
    )
