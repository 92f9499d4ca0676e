"""What judging by a model needs around it: a test before hours of sampling, an estimate before paying, and the sum paid."""

from __future__ import annotations

from collections.abc import Iterable

from vcot.pipeline.errors import AccountError, RecipeError, RequestError, StageError
from vcot.pipeline.faults import find_remedy
from vcot.pipeline.judges import Judge, find_judge
from vcot.pipeline.judges.cost import PRICES_AS_OF, Cost, Meter, open_meter
from vcot.pipeline.report import Began, Said, Warned
from vcot.services.run.rounds import list_rounds, make_judge
from vcot.services.run.session import Session


def read_meter(session: Session, judge: Judge) -> Meter:
    """What was paid for the run's judgments so far. Raises RecipeError where a cap cannot be counted."""
    return open_meter(judge.section, *session.run.ledger.spent(judge.name), session.tested.get(judge.name))


def count_owed(session: Session, judge: Judge) -> int:
    """Requests that the run's recipe will make to a judge's model in this round and all that are to come, as a rule."""
    rounds, recipe = list_rounds(session), session.run.recipe
    num_each = len(rounds[-1].tasks) * judge.count_requests(judge.section, recipe.sample.k)
    return rounds[-1].count_unjudged(judge) + (recipe.rounds.num - len(rounds)) * num_each


async def test_judges(session: Session) -> None:
    """Test each judge that is a model and has judgments to make: what answers nobody is said before hours of sampling.

    Raises as `test_judge` does, and MachineError where a key is not set.
    """
    for judge in make_judge(session).walk():
        async with judge:
            if judge.is_model and (num_owed := count_owed(session, judge)):
                await test_judge(session, judge, num_owed)


async def test_judge(session: Session, judge: Judge, num_owed: int) -> None:
    """One request to a judge that is a model, and what `num_owed` will cost.

    Raises AccountError where the judge answers nobody, StageError where it does not answer now, RecipeError where there is
    a cap and it tells no tokens.
    """
    session.report(Began("judge", f"a test judgment by {judge.name}, before more is asked"))
    try:
        verdict = await judge.test()
    except RequestError as fault:
        remedy = find_remedy(fault.reason, judge.place)
        raise AccountError(f"judge {judge.name}: {fault}; {remedy}, then the same command goes on") from None
    if verdict.error is not None and not verdict.refused:
        raise StageError(
            f"judge {judge.name} does not answer: {verdict.error}; see that it runs, then repeat the command"
        )
    if verdict.reason == "bad_request":
        raise AccountError(
            f"judge {judge.name} does not take the question: {verdict.error}; choose another judge.model, or an API "
            "(judge.base_url) that takes images and structured output"
        )
    session.tested[judge.name], cap = verdict.usage, judge.section.max_cost_usd
    if cap is not None and verdict.usage is None:
        raise RecipeError(f"judge.max_cost_usd = {cap:g} cannot be kept: {judge.name} tells no tokens; leave it out")
    if verdict.refused:
        session.report(Warned(f"the test judgment is no verdict: {verdict.error}"))
    else:
        session.report(Said(f"the test response got {verdict.score:g}"))
    say_estimate(session, judge, read_meter(session, judge), num_owed)


def say_estimate(session: Session, judge: Judge, meter: Meter, num_owed: int) -> None:
    """What is owed will cost, and whether the cap allows it."""
    cost = meter.estimate(num_owed)
    prices = "" if meter.prices is None else f", at {_describe_prices(judge, meter)}"
    session.report(Said(f"estimate for {cost.summary}{prices}"))
    left = None if meter.max_usd is None else meter.max_usd - (meter.cost.usd or 0.0)
    if left is not None and cost.usd is not None and cost.usd > left:
        session.report(
            Warned(
                f"judging will stop at about {num_owed * max(0.0, left) / cost.usd:,.0f} of them: "
                f"${max(0.0, left):,.2f} of judge.max_cost_usd = {meter.max_usd:g} are left"
            )
        )


def _describe_prices(judge: Judge, meter: Meter) -> str:
    assert meter.prices is not None
    source = f"OpenAI's prices of {PRICES_AS_OF}" if judge.section.input_usd is None else "the recipe's prices"
    return f"{source} (${meter.prices.input_usd:g} and ${meter.prices.output_usd:g} per million tokens)"


def read_cost(session: Session) -> Cost | None:
    """What was paid for the run's judgments, to all its judges; None where nothing was."""
    return _add_costs(session, make_judge(session).walk())


def read_whole_cost(session: Session) -> Cost | None:
    """The same, and what was paid to the judge that scores an evaluation's answers."""
    section = session.run.recipe.eval.judge
    graders = [] if section is None else [find_judge(section, session.run.images)]
    return _add_costs(session, (*make_judge(session).walk(), *graders))


def _add_costs(session: Session, judges: Iterable[Judge]) -> Cost | None:
    named = {judge.name: judge for judge in judges if judge.is_model}
    costs = [read_meter(session, judge).cost for judge in named.values()]
    paid = [cost for cost in costs if cost.num_requests]
    return sum(paid[1:], paid[0]) if paid else None
