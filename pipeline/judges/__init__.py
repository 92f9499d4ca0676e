"""Judges score responses. They differ only in what they look at and how their verdict is read.

A recipe names one in `judge.kind`: a built-in, a class of a module of one's own, or an entry point of the group
`vcot.judges`. docs/extending.md shows how to write one, with a model behind it (pipeline/judges/model.py) or without.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import ClassVar, Self

from vcot.pipeline.errors import RecipeError
from vcot.pipeline.faults import Place
from vcot.pipeline.images import ImageStore
from vcot.pipeline.judges.cost import Meter
from vcot.pipeline.ledger import Ledger
from vcot.pipeline.open_lists import JUDGE_NAMES
from vcot.pipeline.plugins import Plugins
from vcot.pipeline.records import Response, Task, Verdict, content_key
from vcot.pipeline.sections import JudgeSection

_OF_SOME = ("members", "image", "sees", "gold", "num_samples", "temperature", "seed", "schedule", "max_meta", "batch")
"""Fields of the section that mean something to some judges only."""


class Judge(ABC):
    """Scores responses one by one; higher is better. A failure is a verdict with an error, never a score.

    An async context manager: what it needs to score (a client, a key) is taken on entering, so that a judgment's key can be
    computed without it.
    """

    name: str
    """Judge, version and model, for example `pointwise/1:gpt-4o-mini`; part of every key."""
    fingerprint: str = ""
    """A hash of all else that determines a verdict, such as the prompt's text and settings."""
    place = Place(key_env="OPENAI_API_KEY", model_field="judge.model", url_field="judge.base_url")
    """Where a fault of its account is mended."""

    section = JudgeSection()
    """The recipe's, of one that takes it."""
    is_model: bool = False
    """Whether a model is asked, which may be refused, have limits, and cost money."""
    compares: ClassVar[bool] = False
    """Whether a verdict depends on the task's other responses, so that all are judged together."""
    keeps_replies: ClassVar[bool] = False
    """Whether a verdict is made of several answers, of which those that the ledger holds are not asked for again."""
    knows_gold: bool = False
    """Whether the gold answer decides, so that ranking right above wrong is no proof of anything."""
    scale: ClassVar[tuple[float, float]] = (0.0, 1.0)
    """The lowest and the highest score that it gives, where it scores a response by itself."""
    takes: ClassVar[frozenset[str]] = frozenset()
    """Those of the section's fields that not every judge goes by, and this one does."""
    members: Sequence[Judge] = ()
    """Judges whose judgments it goes by; they judge first."""
    code: Mapping[str, str] = {}
    """`{"code": the digest of its file}` of one that is not built in, for keys; `find_judge` sets it."""

    def __init__(self, section: JudgeSection, images: ImageStore) -> None:
        """By the recipe's section, with the run's images. Raises RecipeError where the section does not fit."""
        self.section = section
        self.images = images
        for field in _OF_SOME:
            if field not in self.takes and getattr(section, field) != JudgeSection.model_fields[field].default:
                raise RecipeError(f"judge.kind = {section.kind} does not go by judge.{field}; leave it out")

    @classmethod
    def count_requests(cls, section: JudgeSection, num_responses: int) -> int:
        """How many requests it takes a model to judge so many responses to a task, at most or as a rule."""
        return num_responses if cls.is_model else 0

    def attend(self, ledger: Ledger, meter: Meter) -> None:
        """Before it judges: where its members' judgments are and its replies are kept, and what counts its cost."""

    async def judge(self, task: Task, responses: Sequence[Response], *, num_asked: int = 0) -> list[Verdict]:
        """A verdict for each of `responses`, as `score` gives it."""
        return [await self.score(task, response, num_asked=num_asked) for response in responses]

    @abstractmethod
    async def score(self, task: Task, response: Response, *, num_asked: int = 0) -> Verdict:
        """The verdict, after `num_asked` answers without a score. Raises RequestError of the account."""

    def read_words(self, response: Response) -> str:
        """What it reads of a response, however it is spaced: where that is the same, so is the verdict."""
        return response.words

    async def test(self) -> Verdict:
        """The verdict on a drawn image and a fixed question, of a judge that is a model.

        Raises RequestError of the account.
        """
        raise NotImplementedError

    def list_templates(self) -> list[str]:
        """What a model is asked, as texts with places; none of a program."""
        return []

    def walk(self) -> Iterator[Judge]:
        """Its members, theirs before them, and itself: the order in which they judge."""
        for member in self.members:
            yield from member.walk()
        yield self

    async def __aenter__(self) -> Self:
        """Nothing to open, by default."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to close, by default."""


class GroupJudge(Judge):
    """Judges the responses to a task together, since a verdict depends on the others."""

    compares = True

    @abstractmethod
    async def judge(self, task: Task, responses: Sequence[Response], *, num_asked: int = 0) -> list[Verdict]:
        """A verdict for each of `responses`, which are all good ones of the task, by index."""

    async def score(self, task: Task, response: Response, *, num_asked: int = 0) -> Verdict:
        """Of a response that has no other to compare it with."""
        (verdict,) = await self.judge(task, [response], num_asked=num_asked)
        return verdict


JUDGES: Plugins[type[Judge]] = JUDGE_NAMES.of_kind(
    lambda found: isinstance(found, type) and issubclass(found, Judge), "a subclass of vcot.Judge"
)


def find_judge(section: JudgeSection, images: ImageStore) -> Judge:
    """The recipe's judge. Raises RecipeError where it cannot be imported, or the section does not fit."""
    judge = JUDGES.resolve(section.kind)(section, images)
    if not getattr(judge, "name", ""):
        raise RecipeError(f"judge {section.kind} has no name; give its class one, such as name = 'mine/1'")
    judge.code = JUDGES.digest_own(section.kind)
    return judge


def list_sections(section: JudgeSection) -> Iterator[JudgeSection]:
    """The sections of a judge's members, theirs before them, and its own, as `Judge.walk` goes; nothing is opened."""
    for member in section.members:
        yield from list_sections(member)
    yield section


def count_requests(section: JudgeSection, num_responses: int) -> int:
    """As `Judge.count_requests` of the section's judge, which is not opened. Raises RecipeError where it is not found."""
    return JUDGES.resolve(section.kind).count_requests(section, num_responses)


def judgment_keys(judge: Judge, task: Task, responses: Sequence[Response]) -> list[str]:
    """Keys of `judge`'s judgments of `responses`, which are all good ones of the task where it compares them.

    The task is in them, since gold answers and facts may decide the score.
    """
    words = {"words": [task.gold, *task.accepted]} if task.gold else {}
    gold = content_key(question=task.question, choices=task.choices, answer=task.answer, facts=task.facts, **words)
    among = {"among": [response.key for response in responses]} if judge.compares else {}
    shown = {"image": task.picture} if task.images and judge.section.image in ("blank", "other") else {}
    return [
        content_key(
            judge=judge.name,
            fingerprint=judge.fingerprint,
            response=response.key,
            gold=gold,
            **among,
            **shown,
            **judge.code,
        )
        for response in responses
    ]
