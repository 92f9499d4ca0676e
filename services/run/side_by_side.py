"""Asking several checkpoints the same questions: those that are served at the same time, at the same time.

A gateway has one checkpoint on trial, and serves others beside it: what is live on its other replicas, an adapter's base on
the same engine. So each turn puts on trial what is not served, and asks with it all that is served then. With one replica
and merged checkpoints that is one at a time, with a swap between.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from vcot.eval.evaluate import Questions
from vcot.pipeline.client import ChatClient
from vcot.pipeline.records import StageCount
from vcot.pipeline.report import Said, tracking_several, waiting
from vcot.pipeline.sample import Requests, is_owed
from vcot.services.checkpoints.registry import Checkpoint
from vcot.services.run.session import Session


@dataclass(frozen=True)
class Asking:
    """What is asked of one checkpoint, and what the account of it is called."""

    stage: str
    checkpoint: Checkpoint
    requests: Requests

    @property
    def digest(self) -> str:
        """The checkpoint's."""
        return self.checkpoint.ref.digest


async def ask_checkpoints(
    session: Session, stage: str, checkpoints: Sequence[Checkpoint], questions: Questions
) -> None:
    """Ask each what it has not answered yet, as `ask_all` does."""
    asks = [Asking(f"{stage} {each.ref.name}", each, questions.requests_by_task(each.ref)) for each in checkpoints]
    await ask_all(session, asks, questions.section.max_concurrency)


async def ask_all(session: Session, asks: Sequence[Asking], max_concurrency: int) -> None:
    """Ask what is owed, and account for all; no server is needed where nothing is.

    Raises StageError where something is still owed then.
    """
    with waiting(session.report, "looking for what is not answered yet"):
        owed = [each for each in asks if is_owed(each.requests, session.run.ledger)]
    counts: dict[str, StageCount] = {}
    while owed:
        counts |= await _ask_turn(session, owed, max_concurrency)
        owed = [each for each in owed if each.digest not in counts]
    for each in asks:
        total = sum(request.sampling.n for request in each.requests)
        count = counts.get(each.digest) or StageCount(stage=each.stage, requested=total, cached=total)
        session.account(count.model_copy(update={"stage": each.stage}))


async def _ask_turn(session: Session, owed: Sequence[Asking], max_concurrency: int) -> dict[str, StageCount]:
    """The account of those that were asked, by digest: at least one."""
    served = await session.trials.list_served()
    tried = next((each for each in owed if each.digest not in served), owed[0])

    async def ask(client: ChatClient) -> dict[str, StageCount]:
        beside = await session.trials.list_served()
        turn = [each for each in owed if each is tried or each.digest in beside]
        if len(turn) > 1:
            session.report(Said(f"{', '.join(each.checkpoint.ref.name for each in turn)} are served side by side"))
        with tracking_several(session.report, "responses") as track:
            asking = [
                asyncio.ensure_future(
                    session.engine.sample(each.requests, client, max_concurrency=max_concurrency, on_progress=track())
                )
                for each in turn
            ]
            try:
                counts = await asyncio.gather(*asking)
            finally:
                for task in asking:
                    task.cancel()
                await asyncio.gather(*asking, return_exceptions=True)
        return {each.digest: count for each, count in zip(turn, counts, strict=True)}

    return await session.measure(tried.checkpoint, ask)
