"""The pointwise judge: a stronger model scores each response on its own, from 1 to 10.

It sees the image, the question and the response, not the gold answer. The verdict is structured output; a verdict that
cannot be read is an error with its usage recorded, never a score.
"""

from __future__ import annotations

import asyncio
import os
import re
from importlib import resources
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.client import ChatClient, user_message
from pipeline.concurrency import with_retry
from pipeline.errors import MachineError, RecipeError, RequestError
from pipeline.images import ImageStore
from pipeline.judges import Judge
from pipeline.prompts import render_options
from pipeline.recipe import JudgeSection
from pipeline.records import Judgment, Response, SamplingParams, Task, Usage, content_key

if TYPE_CHECKING:
    import httpx2

_FIELD = re.compile(r"<question>|<options>|<response>")


class Verdict(BaseModel):
    """What the judge model answers."""

    model_config = ConfigDict(extra="forbid", strict=True)

    rationale: str
    score: Annotated[int, Field(ge=1, le=10)]


_RESPONSE_FORMAT: dict[str, Any] = {
    "type": "json_schema",
    "json_schema": {
        "name": "verdict",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"rationale": {"type": "string"}, "score": {"type": "integer", "enum": list(range(1, 11))}},
            "required": ["rationale", "score"],
            "additionalProperties": False,
        },
    },
}


class PointwiseJudge(Judge):
    """A model that scores one response at a time."""

    def __init__(
        self, section: JudgeSection, images: ImageStore, transport: httpx2.AsyncBaseTransport | None = None
    ) -> None:
        """`transport` replaces the network in tests. Raises RecipeError where the recipe names no model."""
        if section.model is None:
            raise RecipeError("judge.kind = pointwise needs judge.model, for example gpt-4o-mini")
        self._model = section.model
        self._section = section
        self._images = images
        self._transport = transport
        self._params = SamplingParams(temperature=0.0, max_tokens=section.max_tokens, seed=0)
        self._template = resources.files(__package__).joinpath("pointwise.txt").read_text("utf-8").strip()
        self.name = f"pointwise/1:{section.model}"
        self.fingerprint = content_key(prompt=self._template, params=self._params, detail=section.image_detail)

    async def __aenter__(self) -> Self:
        """Open the client. Raises MachineError where the environment does not hold the key."""
        self._client = ChatClient(
            self._section.base_url,
            read_api_key(self._section),
            max_connections=self._section.max_concurrency,
            transport=self._transport,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the client."""
        await self._client.close()

    async def score(self, task: Task, response: Response, key: str) -> Judgment:
        """The verdict of one call."""
        text = self._render(task, response)
        data = await asyncio.to_thread(self._images.read, task.image) if task.image else None
        message = user_message(text, task.image, data, detail=self._section.image_detail)
        outcome: dict[str, Any]
        try:
            completion = await with_retry(
                lambda: self._client.complete(self._model, [message], self._params, response_format=_RESPONSE_FORMAT)
            )
        except RequestError as error:
            outcome = {"error": str(error), "refused": not error.retryable}
        else:
            outcome = _read(completion.choices[0].text, completion.usage)
        return Judgment(key=key, response=response.key, task=task.id, judge=self.name, **outcome)

    def _render(self, task: Task, response: Response) -> str:
        fields = {
            "<question>": task.question,
            "<options>": render_options(task.choices),
            "<response>": response.text or "",
        }
        return _FIELD.sub(lambda match: fields[match.group()], self._template)


def _read(text: str, usage: Usage) -> dict[str, Any]:
    try:
        verdict = Verdict.model_validate_json(text)
    except ValidationError as error:
        return {"error": f"verdict {text[:80]!r} cannot be read: {error.errors()[0]['msg']}", "usage": usage}
    return {"score": float(verdict.score), "rationale": verdict.rationale, "usage": usage}


def read_api_key(section: JudgeSection) -> str:
    """The judge's key; a server of one's own may need none. Raises MachineError where OpenAI's is not in the environment."""
    key = os.environ.get(section.api_key_env, "").strip()
    if not key and section.base_url is not None:
        return "none"
    if not key:
        raise MachineError(f"judge {section.model} needs an API key; set {section.api_key_env} in the environment")
    return key
