"""Asking several checkpoints the same questions: those that are served at the same time, at the same time.

A gateway has one checkpoint on trial, and serves others beside it: what is live on its other replicas, an adapter's base on
the same engine. So each turn puts on trial what is not served, and asks with it all that is served then. With one replica
and merged checkpoints that is one at a time, with a swap between.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from eval.evaluate import Questions
from pipeline.client import ChatClient
from pipeline.records import StageCount
from pipeline.report import Said, tracking_several, waiting
from pipeline.sample import SampleRequest, is_owed, sample
from services.checkpoints.registry import Checkpoint
from services.run.session import Session


async def ask_checkpoints(
    session: Session, stage: str, checkpoints: Sequence[Checkpoint], questions: Questions
) -> None:
    """Ask each what it has not answered yet. Raises StageError where something is still owed then."""
    requests = {each.ref.digest: questions.requests_by_task(each.ref) for each in checkpoints}
    with waiting(session.report, "looking for what is not answered yet"):
        owed = [each for each in checkpoints if is_owed(requests[each.ref.digest], session.run.ledger)]
    counts: dict[str, StageCount] = {}
    while owed:
        counts |= await _ask_turn(session, owed, requests, questions.section.max_concurrency)
        owed = [each for each in owed if each.ref.digest not in counts]
    for each in checkpoints:
        total = sum(request.sampling.n for request in requests[each.ref.digest])
        count = counts.get(each.ref.digest) or StageCount(stage=stage, requested=total, cached=total)
        session.account(count.model_copy(update={"stage": f"{stage} {each.ref.name}"}))


async def _ask_turn(
    session: Session, owed: Sequence[Checkpoint], requests: dict[str, list[SampleRequest]], max_concurrency: int
) -> dict[str, StageCount]:
    """The account of those that were asked, by digest: at least one."""
    run, served = session.run, await session.trials.list_served()
    tried = next((each for each in owed if each.ref.digest not in served), owed[0])

    async def ask(client: ChatClient) -> dict[str, StageCount]:
        beside = await session.trials.list_served()
        turn = [each for each in owed if each is tried or each.ref.digest in beside]
        if len(turn) > 1:
            session.report(Said(f"{', '.join(each.ref.name for each in turn)} are served side by side"))
        with tracking_several(session.report, "responses") as track:
            asking = [
                asyncio.ensure_future(
                    sample(
                        requests[each.ref.digest],
                        client,
                        run.ledger,
                        run.images,
                        max_concurrency=max_concurrency,
                        on_progress=track(),
                    )
                )
                for each in turn
            ]
            try:
                counts = await asyncio.gather(*asking)
            finally:
                for task in asking:
                    task.cancel()
                await asyncio.gather(*asking, return_exceptions=True)
        return {each.ref.digest: count for each, count in zip(turn, counts, strict=True)}

    return await session.measure(tried, ask)
