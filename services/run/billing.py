"""What judging by a model needs around it: a test before hours of sampling, an estimate before paying, and the sum paid."""

from __future__ import annotations

from pipeline.errors import AccountError, RecipeError, RequestError, StageError
from pipeline.faults import find_remedy
from pipeline.judges import Judge
from pipeline.judges.cost import PRICES_AS_OF, Cost, Meter, open_meter
from pipeline.report import Began, Said, Warned
from services.run.rounds import list_rounds
from services.run.session import Session


def read_meter(session: Session, judge: Judge) -> Meter:
    """What was paid for the run's judgments so far. Raises RecipeError where a cap cannot be counted."""
    return open_meter(session.run.recipe.judge, *session.run.ledger.spent(judge.name), session.test_usage)


def count_owed(session: Session) -> int:
    """Judgments that the run's recipe asks for and that are not made, in all rounds that are to come."""
    rounds, recipe = list_rounds(session), session.run.recipe
    num_each = len(rounds[-1].tasks) * recipe.sample.k
    return rounds[-1].num_unjudged + (recipe.rounds.num - len(rounds)) * num_each


async def test_judge(session: Session, judge: Judge, num_owed: int) -> None:
    """One judgment by a judge that is a model, and what `num_owed` will cost.

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
    session.test_usage, cap = verdict.usage, session.run.recipe.judge.max_cost_usd
    if cap is not None and verdict.usage is None:
        raise RecipeError(f"judge.max_cost_usd = {cap:g} cannot be kept: {judge.name} tells no tokens; leave it out")
    if verdict.refused:
        session.report(Warned(f"the test judgment is no verdict: {verdict.error}"))
    else:
        session.report(Said(f"the test response got {verdict.score:g}"))
    say_estimate(session, read_meter(session, judge), num_owed)


def say_estimate(session: Session, meter: Meter, num_owed: int) -> None:
    """What is owed will cost, and whether the cap allows it."""
    cost = meter.estimate(num_owed)
    prices = "" if meter.prices is None else f", at {_describe_prices(session, meter)}"
    session.report(Said(f"estimate for {cost.summary}{prices}"))
    left = None if meter.max_usd is None else meter.max_usd - (meter.cost.usd or 0.0)
    if left is not None and cost.usd is not None and cost.usd > left:
        session.report(
            Warned(
                f"judging will stop at about {num_owed * max(0.0, left) / cost.usd:,.0f} of them: "
                f"${max(0.0, left):,.2f} of judge.max_cost_usd = {meter.max_usd:g} are left"
            )
        )


def _describe_prices(session: Session, meter: Meter) -> str:
    assert meter.prices is not None
    source = (
        f"OpenAI's prices of {PRICES_AS_OF}" if session.run.recipe.judge.input_usd is None else "the recipe's prices"
    )
    return f"{source} (${meter.prices.input_usd:g} and ${meter.prices.output_usd:g} per million tokens)"


def read_cost(session: Session, judge: Judge) -> Cost | None:
    """What was paid for the run's judgments; None where nothing was."""
    cost = read_meter(session, judge).cost
    return cost if cost.num_judgments else None
