"""A judge that is a model behind an OpenAI-compatible API: the one place that opens, asks, asks again, and counts usage.

What it is asked and how its answer is read is a subclass's. A refusal, a filtered answer, and a verdict that is cut off
or cannot be read are refused with their usage, never a score.
"""

from __future__ import annotations

import asyncio
import re
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar
from weakref import WeakValueDictionary

from vcot.pipeline.bearer import read_key
from vcot.pipeline.client import ChatClient, Choice, Completion, user_message
from vcot.pipeline.concurrency import with_retry
from vcot.pipeline.errors import MachineError, RecipeError, RequestError
from vcot.pipeline.faults import Place
from vcot.pipeline.images import ImageStore
from vcot.pipeline.judges import Judge
from vcot.pipeline.judges.cost import Meter
from vcot.pipeline.judges.trial import TEST_IMAGE, TEST_RESPONSE, TEST_TASK, draw_test_image
from vcot.pipeline.judges.verdict import Unreadable
from vcot.pipeline.ledger import Ledger
from vcot.pipeline.pacing import Gate
from vcot.pipeline.prompts import render_options
from vcot.pipeline.records import (
    ImageRef,
    Reply,
    Response,
    SamplingParams,
    Task,
    Usage,
    Verdict,
    add_usages,
    content_key,
)
from vcot.pipeline.sections import JudgeSection
from vcot.pipeline.stage import QUEUED

if TYPE_CHECKING:
    import httpx2

_OPTIONS = "Options: <options>\n"
_NO_ANSWER = "(It gives no final answer.)"
T = TypeVar("T")
C = TypeVar("C", bound=ChatClient)
Shown = Sequence[tuple[ImageRef, bytes]]
"""Images with their bytes."""


@dataclass(frozen=True)
class Asked:
    """What came of one request: choices, or why there are none."""

    choices: Sequence[Choice] = ()
    usage: Usage | None = None
    """Of all attempts."""
    error: str | None = None
    reason: str = ""
    refused: bool = False


class ModelJudge(Judge):
    """A model that is asked. A subclass says what it is asked, and reads what it answers.

    With one question for each response that is all; where a verdict is made of several answers, `judge` is overridden and
    asks by `ask_kept`, so that no answer is paid for twice.
    """

    is_model = True
    takes = frozenset(("image", "sees", "gold", "num_samples", "temperature", "seed", "batch"))
    version: ClassVar[str]
    """Judge and version, for example `pointwise/1`; a new one judges everything anew."""
    template: ClassVar[str]
    """What is asked, beside the image. `<question>`, `<options>` and `<response>` are filled in, in one pass."""
    response_format: ClassVar[dict[str, Any] | None] = None
    """OpenAI's `response_format`, for structured output."""
    top_logprobs: ClassVar[int] = 0
    """How many of the likeliest tokens at each position are asked for."""

    def __init__(
        self, section: JudgeSection, images: ImageStore, transport: httpx2.AsyncBaseTransport | None = None
    ) -> None:
        """`transport` replaces the network in tests. Raises RecipeError where the recipe names no model."""
        super().__init__(section, images)
        if section.model is None:
            raise RecipeError(f"judge.kind = {section.kind} needs judge.model, for example gpt-4o-mini")
        self._model = section.model
        self.transport = transport
        self._params = SamplingParams(
            temperature=section.temperature,
            max_tokens=section.max_tokens,
            n=section.num_samples,
            seed=section.seed,
        )
        self.name = f"{self.version}:{section.model}"
        self.knows_gold = section.gold
        changed = {name: getattr(section, name) for name, usual in _VIEW.items() if getattr(section, name) != usual}
        self.fingerprint = content_key(
            prompt=self._list_prompts(), params=self._params, detail=section.image_detail, **changed
        )
        self.place = Place(section.api_key_env, "judge.model", "judge.base_url")
        self._meter = Meter(None, Usage(prompt_tokens=0, completion_tokens=0))
        self._ledger: Ledger | None = None
        self._room = asyncio.Semaphore(section.max_concurrency)
        self._asking = WeakValueDictionary[str, asyncio.Lock]()
        """Replies that are being asked for, by key."""

    def list_templates(self) -> list[str]:
        """Its one template; more of a judge that asks several questions."""
        return [self.template]

    def _list_prompts(self) -> Any:
        """All that is written into its questions, for the fingerprint."""
        return self.template

    @abstractmethod
    def read(self, text: str) -> Verdict:
        """The verdict in what the model answered. Raises Unreadable where there is none."""

    def read_choice(self, choice: Choice) -> Verdict:
        """The verdict in an answer, by its text alone unless a subclass looks at more. Raises Unreadable, RequestError."""
        return self.read(choice.text)

    async def __aenter__(self) -> Self:
        """Open the client. Raises MachineError where the environment does not hold the key."""
        self._client = self.open(ChatClient, gate=Gate())
        return self

    def open(self, kind: Callable[..., C], *arguments: Any, **options: Any) -> C:
        """A client of the judge's API. Raises MachineError where the environment does not hold the key."""
        return kind(
            self.section.base_url,
            read_api_key(self.section),
            *arguments,
            max_connections=self.section.max_concurrency,
            transport=self.transport,
            **options,
        )

    @contextmanager
    def asking_by(self, client: ChatClient) -> Iterator[None]:
        """Meanwhile its questions go by another client, as by one that gathers them to batches."""
        own, self._client = self._client, client
        try:
            yield
        finally:
            self._client = own

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the client."""
        await self._client.close()

    def attend(self, ledger: Ledger, meter: Meter) -> None:
        """Its replies are kept in `ledger`, and counted by `meter`."""
        self._ledger, self._meter = ledger, meter

    def read_words(self, response: Response) -> str:
        """What it is shown of a response, however it is spaced."""
        return " ".join(self._say(response).split())

    def _say(self, response: Response) -> str:
        """What it is shown of a response."""
        if self.section.sees == "answer":
            return response.answer or _NO_ANSWER
        return response.text or ""

    async def score(self, task: Task, response: Response, *, num_asked: int = 0) -> Verdict:
        """The verdict of one request. A later ask has another seed, or it would be answered alike."""
        if (lack := self.find_lack(task)) is not None:
            return lack
        text = self.render(self.template, task, response=self._say(response))
        asked = await self.ask(
            text,
            await self.show(task),
            seed=num_asked,
            response_format=self.response_format,
            top_logprobs=self.top_logprobs,
        )
        return self._conclude(asked)

    async def test(self) -> Verdict:
        """The verdict on a red disc, of the size of a photo and with a response of a usual length."""
        asked = await self.ask(
            self.render_test(),
            [(TEST_IMAGE, draw_test_image())] if self.section.image != "none" else [],
            response_format=self.response_format,
            top_logprobs=self.top_logprobs,
        )
        return self._conclude(asked)

    def render_test(self) -> str:
        """A usual question, about the red disc."""
        return self.render(self.template, TEST_TASK, response=TEST_RESPONSE)

    def find_lack(self, task: Task) -> Verdict | None:
        """A verdict that says what the task lacks for a judge that is told the right answer; None where it lacks nothing."""
        if not self.section.gold or find_gold(task):
            return None
        error = f"task {task.id} has no gold answer to show the judge; leave judge.gold out"
        return Verdict(error=error, reason="no_gold", refused=True)

    async def show(self, task: Task) -> Shown:
        """The images that go with a question about `task`."""
        if not task.images or self.section.image == "none":
            return []
        return await asyncio.to_thread(self.images.read_all, task.images)

    def render(self, template: str, task: Task, **fields: str) -> str:
        """`template` with the task and `fields` filled in, in one pass. A question without options has no such line."""
        gold = f"\nRight answer, which the author did not see: {find_gold(task)}" if self.section.gold else ""
        fields |= {"question": task.question + gold, "options": render_options(task.choices)}
        if not task.choices:
            template = template.replace(_OPTIONS, "")
        places = re.compile("|".join(f"<{name}>" for name in fields))
        return places.sub(lambda match: fields[match[0][1:-1]], template)

    def _conclude(self, asked: Asked) -> Verdict:
        """The mean of the verdicts that can be read, if most can; else the first that cannot."""
        if asked.error is not None:
            return Verdict(error=asked.error, reason=asked.reason, refused=asked.refused, usage=asked.usage)
        verdicts = [self._read_or_refuse(choice) for choice in asked.choices]
        good = [verdict for verdict in verdicts if verdict.score is not None]
        if 2 * len(good) <= len(verdicts):
            unread = next(verdict for verdict in verdicts if verdict.score is None)
            return unread.model_copy(update={"usage": asked.usage})
        mean = sum(verdict.score or 0.0 for verdict in good) / len(good)
        return good[0].model_copy(update={"score": mean, "usage": asked.usage})

    def _read_or_refuse(self, choice: Choice) -> Verdict:
        read: list[Verdict] = []
        unread = find_unread(choice, lambda _: read.append(self.read_choice(choice)))
        return unread or read[0]

    async def ask(
        self,
        text: str,
        shown: Shown,
        *,
        seed: int = 0,
        response_format: dict[str, Any] | None = None,
        top_logprobs: int = 0,
    ) -> Asked:
        """One request, with its attempts, at the meter's cost; `seed` is added to the recipe's.

        Raises RequestError of the account.
        """
        message = user_message(text, shown, detail=self.section.image_detail)
        params = self._params.model_copy(update={"seed": self._params.seed + seed})
        billed: list[Usage] = []

        async def call() -> Completion:
            return await self._client.complete(
                self._model, [message], params, response_format=response_format, top_logprobs=top_logprobs
            )

        def count(error: RequestError) -> None:
            billed.extend([error.usage] if error.usage else [])

        async with self._room:
            self._meter.begin()
            try:
                completion = await with_retry(call, on_failure=count)
                billed.append(completion.usage)
                asked = Asked(completion.choices)
            except RequestError as error:
                if error.scope == "account":
                    raise
                count(error)
                asked = Asked(error=str(error), reason=error.reason, refused=error.scope == "item")
            finally:
                usage = add_usages(usage for usage in billed if usage.num_tokens)  # some servers tell none
                self._meter.end(usage)
        return replace(asked, usage=usage)

    async def ask_kept(
        self,
        text: str,
        shown: Shown,
        read: Callable[[str], object],
        *,
        num_asked: int = 0,
        response_format: dict[str, Any] | None = None,
    ) -> Reply:
        """The model's reply to one of several questions, asked once: the ledger's, where it holds one that can be read.

        One in which `read` raises Unreadable is refused, and asked again with another seed as often as `num_asked` says.
        Raises RequestError of the account.
        """
        assert self._ledger is not None, "attend before you ask"
        for seed in range(num_asked + 1):
            reply = await self._ask_with_seed(seed, text, shown, read, response_format, self._ledger)
            if reply.error is None:
                break
        return reply

    async def _ask_with_seed(
        self,
        seed: int,
        text: str,
        shown: Shown,
        read: Callable[[str], object],
        response_format: dict[str, Any] | None,
        ledger: Ledger,
    ) -> Reply:
        key = content_key(
            model=self._model,
            text=text,
            images=[image.sha256 for image, _ in shown],
            detail=self.section.image_detail,
            params=self._params.model_copy(update={"seed": self._params.seed + seed}),
            response_format=response_format,
        )
        lock = self._asking.setdefault(key, asyncio.Lock())
        async with lock:  # or two responses that make one claim would have it checked twice
            reply = ledger.get(Reply, [key]).get(key)
            if reply is None or (reply.error is not None and not reply.refused):
                billed = reply.usage if reply else None
                asked = await self.ask(text, shown, seed=seed, response_format=response_format)
                reply = self._sign(key, asked, read, billed=billed)
                await ledger.write([reply] if reply.reason != QUEUED else [])
        return reply

    def _sign(self, key: str, asked: Asked, read: Callable[[str], object], *, billed: Usage | None) -> Reply:
        """The reply, with what earlier commands were `billed` for it."""
        fault: Asked | Verdict | None = asked if asked.error is not None else find_unread(asked.choices[0], read)
        return Reply(
            key=key,
            judge=self.name,
            text=asked.choices[0].text if fault is None else None,
            usage=add_usages((billed, asked.usage)),
            error=fault.error if fault else None,
            reason=fault.reason if fault else "",
            refused=fault.refused if fault else False,
        )


def find_unread(choice: Choice, read: Callable[[str], object]) -> Verdict | None:
    """The verdict that says why `read` finds nothing in an answer; None where it does."""
    try:
        read(choice.text)
    except Unreadable as error:
        is_cut = choice.finish_reason == "length"
        said = "was cut off at judge.max_tokens" if is_cut else f"cannot be read: {error}"
        reason = "cut_by_length" if is_cut else "unreadable"
        return Verdict(error=f"verdict {choice.text[:80]!r} {said}", reason=reason, refused=True)
    return None


_VIEW = {name: JudgeSection.model_fields[name].default for name in ("image", "sees", "gold")}
"""Settings of what a judge is shown, which a fingerprint has where they are not as usual."""


def find_gold(task: Task) -> str:
    """The right answer in words, with its letter; empty where the source has none."""
    if task.answer is None:
        return task.gold
    return f"({task.answer_letter}) {task.choices[task.answer]}"


async def await_all(awaitables: Iterable[Awaitable[T]]) -> list[T]:
    """All results in order; where one raises, the others are waited for first, since they are paid for."""
    found = await asyncio.gather(*awaitables, return_exceptions=True)
    if (error := next((each for each in found if isinstance(each, BaseException)), None)) is not None:
        raise error
    return [each for each in found if not isinstance(each, BaseException)]


def read_api_key(section: JudgeSection) -> str:
    """The judge's key; a server of one's own may need none.

    Raises MachineError where OpenAI's is missing, and for a key that no request can carry.
    """
    key = read_key(section.api_key_env)
    if not key and section.base_url is not None:
        return "none"
    if not key:
        raise MachineError(f"judge {section.model} needs an API key; set {section.api_key_env} in the environment")
    return key
