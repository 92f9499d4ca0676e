"""Asking a judge that may be a model: a test and an estimate before it is paid, then one by one, or in batches."""

from __future__ import annotations

from collections.abc import Sequence

from vcot.pipeline.errors import StageError
from vcot.pipeline.judge_batches import BatchClient, Batches, judge_in_batches
from vcot.pipeline.judges import Judge
from vcot.pipeline.judges.cost import Meter
from vcot.pipeline.judges.model import ModelJudge
from vcot.pipeline.judging import Standing, find_unjudged_fault
from vcot.pipeline.records import StageCount
from vcot.pipeline.report import Said, progress, tracking
from vcot.pipeline.sample import Group, Groups
from vcot.services.run.billing import read_meter, say_estimate, test_judge
from vcot.services.run.session import Session


async def judge_groups(
    session: Session, judge: Judge, groups: Groups | Sequence[Group], standing: Standing, *, stage: str = "judge"
) -> None:
    """Judge what is owed, and account for it as `stage`.

    Raises as `ask_judge`, and StageError where the judge gave no verdict on more than the recipe tolerates.
    """
    count = await ask_judge(session, judge, groups, standing)
    session.account(count.model_copy(update={"stage": stage}))
    if (fault := find_unjudged_fault(count, judge.section)) is not None:
        raise StageError(fault)


async def ask_judge(
    session: Session,
    judge: Judge,
    groups: Groups | Sequence[Group],
    standing: Standing,
    *,
    num_times: int = 1,
) -> StageCount:
    """Judge what is owed of `groups`, after the judge's members. The estimate is for `num_times` as much; 0 says none.

    Raises as `test_judge` and `judge_responses` do.
    """
    async with judge:
        meter = read_meter(session, judge)
        if judge.is_model and standing.num_owed and num_times:
            num_owed = num_times * standing.num_requests
            if meter.num_requests or judge.name in session.tested:
                say_estimate(session, judge, meter, num_owed)
            else:
                await test_judge(session, judge, num_owed)
                meter = read_meter(session, judge)
        if isinstance(judge, ModelJudge) and judge.section.batch:
            count = await _ask_in_batches(session, judge, groups, meter)
        else:
            with tracking(session.report, "judgments", lambda: meter.summary) as on_progress:
                count = await session.engine.judge(
                    judge, groups, standing=standing, meter=meter, on_progress=on_progress
                )
    if meter.num_requests and num_times:
        session.report(Said(f"paid for {meter.cost.summary}"))
    return count


async def _ask_in_batches(
    session: Session, judge: ModelJudge, groups: Groups | Sequence[Group], meter: Meter
) -> StageCount:
    batches = Batches(session.run.path("batches", "."))
    async with judge.open(BatchClient, batches) as client:
        with judge.asking_by(client), progress(session.report, "requests in batches") as on_states:
            return await judge_in_batches(
                judge, client, groups, session.run.ledger, judge.section, meter=meter, on_states=on_states
            )
