"""Judges score responses. They differ only in what they look at and how their verdict is read."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from pipeline.ledger import Ledger
from pipeline.records import Judgment, Response, StageCount, Task, content_key
from pipeline.stage import OnProgress, Tally, work_off


class Judge(ABC):
    """Scores one response; higher is better. A failure is an error record, never a score.

    An async context manager: what it needs to score (a client, a key) is taken on entering, so that a judgment's key can be
    computed without it.
    """

    name: str
    """Judge, version and model; part of every key."""
    fingerprint: str
    """A hash of all else that determines a verdict: the prompt's text and settings."""

    @abstractmethod
    async def score(self, task: Task, response: Response, key: str) -> Judgment:
        """The judgment with this key."""

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


async def judge_responses(
    judge: Judge,
    tasks: Mapping[str, Task],
    responses: Sequence[Response],
    ledger: Ledger,
    *,
    max_concurrency: int,
    on_progress: OnProgress,
) -> StageCount:
    """Judge what is owed of the good ones among `responses`; failed responses are not judged."""
    good = {judgment_key(judge, tasks[r.task], r): r for r in responses if r.error is None}
    done = ledger.done(Judgment, good)
    tally = Tally("judge", total=len(good))
    tally.add("cached", len(done))

    async def score(key: str) -> Sequence[Judgment]:
        response = good[key]
        judgment = await judge.score(tasks[response.task], response, key)
        await asyncio.to_thread(ledger.put, [judgment])
        return [judgment]

    owed = [key for key in good if key not in done]
    return await work_off(owed, score, tally, limit=max_concurrency, on_progress=on_progress)
