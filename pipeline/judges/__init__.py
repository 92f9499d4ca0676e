"""Judges score responses. They differ only in what they look at and how their verdict is read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

from pipeline.faults import Place
from pipeline.records import Judgment, Response, Task, content_key


class Judge(ABC):
    """Scores one response; higher is better. A failure is an error record, never a score.

    An async context manager: what it needs to score (a client, a key) is taken on entering, so that a judgment's key can be
    computed without it.
    """

    name: str
    """Judge, version and model; part of every key."""
    fingerprint: str
    """A hash of all else that determines a verdict: the prompt's text and settings."""
    place = Place(key_env="OPENAI_API_KEY", model_field="judge.model", url_field="judge.base_url")
    """Where a fault of its account is mended."""

    is_model: bool = False
    """Whether a model is asked, which may be refused, have limits, and cost money."""

    @abstractmethod
    async def score(self, task: Task, response: Response, key: str, *, num_asked: int = 0) -> Judgment:
        """The judgment with this key, after `num_asked` answers without a verdict. Raises RequestError of the account."""

    async def test(self) -> Judgment:
        """One judgment of a drawn image and a fixed question, by a judge that is a model.

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


def judgment_key(judge: Judge, task: Task, response: Response) -> str:
    """Key of `judge`'s judgment of `response`; the task is in it, since gold answers and facts may decide the score."""
    gold = content_key(question=task.question, choices=task.choices, answer=task.answer, facts=task.facts)
    return content_key(judge=judge.name, fingerprint=judge.fingerprint, response=response.key, gold=gold)
