"""A judge that is a model behind an OpenAI-compatible API: the one place that opens, asks, asks again, and counts usage.

What it is asked and how its answer is read is a subclass's. A refusal, a filtered answer, and a verdict that is cut off
or cannot be read are refused with their usage, never a score.
"""

from __future__ import annotations

import asyncio
import io
import os
import re
from abc import abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pipeline.client import ChatClient, Choice, Completion, user_message
from pipeline.concurrency import with_retry
from pipeline.errors import MachineError, RecipeError, RequestError
from pipeline.faults import Place
from pipeline.images import ImageStore
from pipeline.judges import Judge
from pipeline.judges.verdict import Unreadable
from pipeline.pacing import Gate
from pipeline.prompts import render_options
from pipeline.records import ImageRef, Response, SamplingParams, Task, Usage, Verdict, content_key
from pipeline.sections import JudgeSection

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


class ModelJudge(Judge):
    """A model that is asked about one response at a time. A subclass says what it is asked, and reads what it answers."""

    is_model = True
    version: ClassVar[str]
    """Judge and version, for example `pointwise/1`; a new one judges everything anew."""
    template: ClassVar[str]
    """What is asked, beside the image. `<question>`, `<options>` and `<response>` are filled in, in one pass."""
    response_format: ClassVar[dict[str, Any] | None] = None
    """OpenAI's `response_format`, for structured output."""

    def __init__(
        self, section: JudgeSection, images: ImageStore, transport: httpx2.AsyncBaseTransport | None = None
    ) -> None:
        """`transport` replaces the network in tests. Raises RecipeError where the recipe names no model."""
        super().__init__(section, images)
        if section.model is None:
            raise RecipeError(f"judge.kind = {section.kind} needs judge.model, for example gpt-4o-mini")
        self._model = section.model
        self.transport = transport
        self._params = SamplingParams(temperature=0.0, max_tokens=section.max_tokens, seed=0)
        self.name = f"{self.version}:{section.model}"
        self.fingerprint = content_key(prompt=self.template, params=self._params, detail=section.image_detail)
        self.place = Place(section.api_key_env, "judge.model", "judge.base_url")

    @abstractmethod
    def read(self, text: str) -> Verdict:
        """The verdict in what the model answered. Raises Unreadable where there is none."""

    async def __aenter__(self) -> Self:
        """Open the client. Raises MachineError where the environment does not hold the key."""
        self._client = ChatClient(
            self.section.base_url,
            read_api_key(self.section),
            max_connections=self.section.max_concurrency,
            gate=Gate(),
            transport=self.transport,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the client."""
        await self._client.close()

    async def score(self, task: Task, response: Response, *, num_asked: int = 0) -> Verdict:
        """The verdict of one call. A later ask has another seed, or it would be answered alike."""
        data = await asyncio.to_thread(self.images.read, task.image) if task.image else None
        text = self._render(task.question, task.choices, response.text or "")
        return await self._ask(text, task.image, data, num_asked)

    async def test(self) -> Verdict:
        """The verdict on a red disc, of the size of a photo and with a response of a usual length."""
        image = ImageRef(sha256="", path="test.png", width=_TEST_SIZE[0], height=_TEST_SIZE[1])
        text = self._render(_TEST_QUESTION, _TEST_CHOICES, _TEST_RESPONSE)
        return await self._ask(text, image, _draw_test_image(), 0)

    def _render(self, question: str, choices: Sequence[str], response: str) -> str:
        fields = {"<question>": question, "<options>": render_options(choices), "<response>": response}
        return _FIELD.sub(lambda match: fields[match.group()], self.template)

    async def _ask(self, text: str, image: ImageRef | None, data: bytes | None, num_asked: int) -> Verdict:
        """`usage` is of all attempts. Raises RequestError of the account."""
        message = user_message(text, image, data, detail=self.section.image_detail)
        params = self._params.model_copy(update={"seed": num_asked})
        billed: list[Usage] = []

        async def call() -> Completion:
            return await self._client.complete(self._model, [message], params, response_format=self.response_format)

        def count(error: RequestError) -> None:
            billed.extend([error.usage] if error.usage else [])

        try:
            completion = await with_retry(call, on_failure=count)
        except RequestError as error:
            if error.scope == "account":
                raise
            count(error)
            verdict = Verdict(error=str(error), reason=error.reason, refused=error.scope == "item")
        else:
            billed.append(completion.usage)
            verdict = self._read(completion.choices[0])
        told = [usage for usage in billed if usage.num_tokens]  # some servers tell none
        return verdict.model_copy(update={"usage": sum(told[1:], told[0]) if told else None})

    def _read(self, choice: Choice) -> Verdict:
        try:
            return self.read(choice.text)
        except Unreadable as error:
            is_cut = choice.finish_reason == "length"
            said = "was cut off at judge.max_tokens" if is_cut else f"cannot be read: {error}"
            reason = "cut_by_length" if is_cut else "unreadable"
            return Verdict(error=f"verdict {choice.text[:80]!r} {said}", reason=reason, refused=True)


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
