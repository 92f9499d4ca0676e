"""The pointwise judge: a stronger model scores each response on its own, from 1 to 10.

It sees the image, the question and the response, not the gold answer. The verdict is structured output; a refusal, a
filtered answer, a verdict that is cut off or cannot be read are refused with their usage, never a score.
"""

from __future__ import annotations

import asyncio
import io
import os
import re
from collections.abc import Sequence
from importlib import resources
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from pipeline.client import ChatClient, Choice, Completion, user_message
from pipeline.concurrency import with_retry
from pipeline.errors import MachineError, RecipeError, RequestError
from pipeline.faults import Place
from pipeline.images import ImageStore
from pipeline.judges import Judge
from pipeline.judges.verdict import MAX_SCORE, MIN_SCORE, Unreadable, read_verdict
from pipeline.pacing import Gate
from pipeline.prompts import render_options
from pipeline.recipe import JudgeSection
from pipeline.records import ImageRef, Judgment, Response, SamplingParams, Task, Usage, content_key

if TYPE_CHECKING:
    import httpx2

_TEST_SIZE = (640, 480)
_TEST_QUESTION, _TEST_CHOICES = (
    "What colour is the disc in the middle of the image?",
    ("red", "blue", "green", "yellow"),
)
_TEST_RESPONSE = (
    "The image shows a single disc on a plain white background. The disc is in the middle, and nothing else is there to "
    "compare it with. Its colour is even, without a pattern or a shadow. Draft: the disc is red, so the option that says "
    "red is right. Evaluation: blue, green and yellow do not fit what the image shows, and the draft answers what was "
    "asked, so it stands.\n<R> The disc is red. The answer is (A) red."
)
_FIELD = re.compile(r"<question>|<options>|<response>")


_PROPERTIES = {
    "rationale": {"type": "string"},
    "score": {"type": "integer", "enum": list(range(MIN_SCORE, MAX_SCORE + 1))},
}
_RESPONSE_FORMAT: dict[str, Any] = {
    "type": "json_schema",
    "json_schema": {
        "name": "verdict",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": _PROPERTIES,
            "required": list(_PROPERTIES),
            "additionalProperties": False,
        },
    },
}


class PointwiseJudge(Judge):
    """A model that scores one response at a time."""

    is_model = True

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
        self.place = Place(section.api_key_env, "judge.model", "judge.base_url")

    async def __aenter__(self) -> Self:
        """Open the client. Raises MachineError where the environment does not hold the key."""
        self._client = ChatClient(
            self._section.base_url,
            read_api_key(self._section),
            max_connections=self._section.max_concurrency,
            gate=Gate(),
            transport=self._transport,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the client."""
        await self._client.close()

    async def score(self, task: Task, response: Response, key: str, *, num_asked: int = 0) -> Judgment:
        """The verdict of one call. A later ask has another seed, or it would be answered alike."""
        data = await asyncio.to_thread(self._images.read, task.image) if task.image else None
        outcome = await self._ask(self._render(task, response), task.image, data, num_asked)
        return Judgment(key=key, response=response.key, task=task.id, judge=self.name, **outcome)

    async def test(self) -> Judgment:
        """The verdict on a red disc, of the size of a photo and with a response of a usual length."""
        data = _draw_test_image()
        image = ImageRef(sha256="", path="test.png", width=_TEST_SIZE[0], height=_TEST_SIZE[1])
        outcome = await self._ask(self._render_text(_TEST_QUESTION, _TEST_CHOICES, _TEST_RESPONSE), image, data, 0)
        return Judgment(key="test", response="test", task="test", judge=self.name, **outcome)

    async def _ask(self, text: str, image: ImageRef | None, data: bytes | None, num_asked: int) -> dict[str, Any]:
        """The fields of a judgment; `usage` is of all attempts. Raises RequestError of the account."""
        message = user_message(text, image, data, detail=self._section.image_detail)
        params = self._params.model_copy(update={"seed": num_asked})
        billed: list[Usage] = []

        async def call() -> Completion:
            return await self._client.complete(self._model, [message], params, response_format=_RESPONSE_FORMAT)

        def count(error: RequestError) -> None:
            billed.extend([error.usage] if error.usage else [])

        outcome: dict[str, Any]
        try:
            completion = await with_retry(call, on_failure=count)
        except RequestError as error:
            if error.scope == "account":
                raise
            count(error)
            outcome = {"error": str(error), "reason": error.reason, "refused": error.scope == "item"}
        else:
            billed.append(completion.usage)
            outcome = _read(completion.choices[0])
        return outcome | {"usage": sum(billed[1:], billed[0]) if billed else None}

    def _render(self, task: Task, response: Response) -> str:
        return self._render_text(task.question, task.choices, response.text or "")

    def _render_text(self, question: str, choices: Sequence[str], response: str) -> str:
        fields = {"<question>": question, "<options>": render_options(choices), "<response>": response}
        return _FIELD.sub(lambda match: fields[match.group()], self._template)


def _read(choice: Choice) -> dict[str, Any]:
    """The fields of a judgment."""
    try:
        verdict = read_verdict(choice.text)
    except Unreadable as error:
        is_cut = choice.finish_reason == "length"
        said = "was cut off at judge.max_tokens" if is_cut else f"cannot be read: {error}"
        reason = "cut_by_length" if is_cut else "unreadable"
        return {"error": f"verdict {choice.text[:80]!r} {said}", "reason": reason, "refused": True}
    return {"score": verdict.score, "rationale": verdict.rationale}


def _draw_test_image() -> bytes:
    """A red disc, as PNG: as many pixels as a photo has, in few bytes."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", _TEST_SIZE, "white")
    ImageDraw.Draw(image).ellipse((220, 140, 420, 340), fill="red")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def read_api_key(section: JudgeSection) -> str:
    """The judge's key; a server of one's own may need none. Raises MachineError where OpenAI's is not in the environment."""
    key = os.environ.get(section.api_key_env, "").strip()
    if not key and section.base_url is not None:
        return "none"
    if not key:
        raise MachineError(f"judge {section.model} needs an API key; set {section.api_key_env} in the environment")
    return key
