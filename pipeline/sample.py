"""Drawing responses: k per task, one request with `n=k`, several requests in flight.

A request's key says all that determines its answer, so planning is pure: the same tasks, prompt, weights and settings give
the same keys, the ledger says which are answered, and only the rest are asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from pipeline.client import ChatClient, Completion, user_message
from pipeline.concurrency import with_retry
from pipeline.errors import RequestError
from pipeline.faults import Place
from pipeline.images import ImageStore
from pipeline.ledger import Ledger
from pipeline.prompts import PROMPTS, render_prompt, split_thought
from pipeline.records import (
    CheckpointRef,
    ImageRef,
    PromptName,
    Response,
    SamplingParams,
    StageCount,
    Task,
    content_key,
)
from pipeline.stage import OnProgress, Tally, batched, work_off

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
    text = render_prompt(prompt, task)
    image = task.image.sha256 if task.image else None
    key = content_key(weights=checkpoint.digest, task=task.id, image=image, prompt=text, sampling=sampling, **code)
    own_seed = sampling.model_copy(update={"seed": int(key[:8], 16) >> 1})
    return SampleRequest(task, prompt, text, checkpoint, own_seed, key)


def show_image(request: SampleRequest, image: ImageRef) -> SampleRequest:
    """The same request about `image` instead: same text, settings and seed, and a key of its own. Pure."""
    task = request.task.model_copy(update={"image": image})
    return replace(request, task=task, key=content_key(asked=request.key, image=image.sha256))


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
    max_concurrency: int = 8,
    on_progress: OnProgress = lambda _: None,
) -> StageCount:
    """Ask what is owed of `requests`; every answer is in the ledger before it counts. Counts are of responses.

    Requests are gone through twice, and none is held: what is there already is counted, and the others are asked.
    """
    tally = Tally("sample", total=0)
    for request, is_done in look(requests, ledger):
        tally.total += request.sampling.n
        tally.cached += request.sampling.n * is_done
    owed = (request for request, is_done in look(requests, ledger) if not is_done)

    async def answer(request: SampleRequest) -> Sequence[Response]:
        responses = await _ask(request, client, images)
        await ledger.write(responses)
        return responses

    return await work_off(owed, answer, tally, limit=max_concurrency, place=GATEWAY, on_progress=on_progress)


def look(requests: Iterable[SampleRequest], ledger: Ledger) -> Iterator[tuple[SampleRequest, bool]]:
    """Each request, and whether its group is wholly answered."""
    for chunk in batched(requests):
        done = ledger.done(Response, (key for request in chunk for key in request.response_keys()))
        for request in chunk:
            yield request, done.issuperset(request.response_keys())


def is_owed(requests: Iterable[SampleRequest], ledger: Ledger) -> bool:
    """Whether any of them is not wholly answered."""
    return any(not is_done for _, is_done in look(requests, ledger))


async def _ask(request: SampleRequest, client: ChatClient, images: ImageStore) -> list[Response]:
    """The group's responses, or n records of the error that came instead. Raises RequestError of the account."""
    image = request.task.image
    data = await asyncio.to_thread(images.read, image) if image else None
    messages = [user_message(request.text, image, data)]

    async def call() -> Completion:
        digest = request.checkpoint.digest
        return await client.complete(request.checkpoint.name, messages, request.sampling, expect=digest)

    try:
        completion = await with_retry(call)
    except RequestError as error:
        if error.scope == "account":
            raise
        outcome = {"error": str(error), "reason": error.reason, "refused": error.scope == "item"}
        return [_response(request, i, **outcome) for i in range(request.sampling.n)]
    return [_answered(request, i, completion) for i in range(request.sampling.n)]


def _answered(request: SampleRequest, index: int, completion: Completion) -> Response:
    choice = completion.choices[index]
    thought, answer = split_thought(request.prompt, choice.text)
    return _response(
        request,
        index,
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
