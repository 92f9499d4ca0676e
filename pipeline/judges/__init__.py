"""Judges score responses. They differ only in what they look at and how their verdict is read.

A recipe names one in `judge.kind`: a built-in, a class of a module of one's own, or an entry point of the group
`vcot.judges`. docs/extending.md shows how to write one, with a model behind it (pipeline/judges/model.py) or without.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from pipeline.errors import RecipeError
from pipeline.faults import Place
from pipeline.images import ImageStore
from pipeline.open_lists import JUDGE_NAMES
from pipeline.plugins import Plugins
from pipeline.records import Response, Task, Verdict, content_key
from pipeline.sections import JudgeSection


class Judge(ABC):
    """Scores one response; higher is better. A failure is a verdict with an error, never a score.

    An async context manager: what it needs to score (a client, a key) is taken on entering, so that a judgment's key can be
    computed without it.
    """

    name: str
    """Judge, version and model, for example `pointwise/1:gpt-4o-mini`; part of every key."""
    fingerprint: str = ""
    """A hash of all else that determines a verdict, such as the prompt's text and settings."""
    place = Place(key_env="OPENAI_API_KEY", model_field="judge.model", url_field="judge.base_url")
    """Where a fault of its account is mended."""

    is_model: bool = False
    """Whether a model is asked, which may be refused, have limits, and cost money."""
    code: Mapping[str, str] = {}
    """`{"code": the digest of its file}` of one that is not built in, for keys; `find_judge` sets it."""

    def __init__(self, section: JudgeSection, images: ImageStore) -> None:
        """By the recipe's section, with the run's images. Raises RecipeError where the section does not fit."""
        self.section = section
        self.images = images

    @abstractmethod
    async def score(self, task: Task, response: Response, *, num_asked: int = 0) -> Verdict:
        """The verdict, after `num_asked` answers without a score. Raises RequestError of the account."""

    async def test(self) -> Verdict:
        """The verdict on a drawn image and a fixed question, of a judge that is a model.

        Raises RequestError of the account.
        """
        raise NotImplementedError

    async def __aenter__(self) -> Self:
        """Nothing to open, by default."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to close, by default."""


JUDGES: Plugins[type[Judge]] = JUDGE_NAMES.of_kind(
    lambda found: isinstance(found, type) and issubclass(found, Judge), "a subclass of pipeline.judges.Judge"
)


def find_judge(section: JudgeSection, images: ImageStore) -> Judge:
    """The recipe's judge. Raises RecipeError where it cannot be imported, or the section does not fit."""
    judge = JUDGES.resolve(section.kind)(section, images)
    if not getattr(judge, "name", ""):
        raise RecipeError(f"judge {section.kind} has no name; give its class one, such as name = 'mine/1'")
    judge.code = JUDGES.digest_own(section.kind)
    return judge


def judgment_key(judge: Judge, task: Task, response: Response) -> str:
    """Key of `judge`'s judgment of `response`; the task is in it, since gold answers and facts may decide the score."""
    gold = content_key(question=task.question, choices=task.choices, answer=task.answer, facts=task.facts)
    return content_key(judge=judge.name, fingerprint=judge.fingerprint, response=response.key, gold=gold, **judge.code)
