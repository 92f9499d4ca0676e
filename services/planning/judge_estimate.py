"""What judges will be asked, what that costs and how long it takes: a run's own, and one that scores an evaluation. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from vcot.eval.eval_section import EvalSection
from vcot.pipeline.judges import JUDGES, count_requests, list_sections
from vcot.pipeline.judges.cost import estimate_cost, find_prices, guess_prompt_tokens
from vcot.pipeline.sections import JudgeSection
from vcot.services.planning.assumptions import (
    JUDGE_CALL_S,
    JUDGE_TEXT_TOKENS,
    JUDGE_TOKENS_PER_MINUTE,
    JUDGE_VERDICT_TOKENS,
    THOUGHT_TOKENS,
    Span,
)
from vcot.services.planning.workload import cut_tokens

_NOTHING = Span(0, 0, 0)


@dataclass(frozen=True)
class JudgeEstimate:
    """What a judge and its members will be asked, and what that costs."""

    num_requests: int
    input_tokens: Span
    output_tokens: Span
    dollars: Span | None
    """None where a model's price is not known here."""

    def __add__(self, other: JudgeEstimate) -> JudgeEstimate:
        """Of both."""
        return JudgeEstimate(
            self.num_requests + other.num_requests,
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            None if self.dollars is None or other.dollars is None else self.dollars + other.dollars,
        )


def estimate_judge(
    section: JudgeSection, num_tasks: int, num_responses: int, max_tokens: int, num_audited: int
) -> JudgeEstimate:
    """Of judging `num_responses` of at most `max_tokens` to each task, and of a report card on `num_audited` tasks; nothing
    of a judge that is a program.
    """
    total = JudgeEstimate(0, _NOTHING, _NOTHING, _NOTHING)
    for each in list_sections(section):
        num_requests = num_tasks * count_requests(each, num_responses) + count_audit(each, num_audited)
        total += estimate_requests(each, num_requests, max_tokens)
    return total


def estimate_requests(section: JudgeSection, num_requests: int, max_tokens: int) -> JudgeEstimate:
    """So many requests to the section's own model, if it has one."""
    if not num_requests or section.model is None:
        return JudgeEstimate(0, _NOTHING, _NOTHING, _NOTHING)
    shown = 2 if JUDGES.resolve(section.kind).compares else 1
    texts = [JUDGE_TEXT_TOKENS + shown * int(tokens) for tokens in cut_tokens(THOUGHT_TOKENS, max_tokens)]
    read = [
        num
        if section.image == "none"
        else guess_prompt_tokens(section.model, section.image_detail, num_text_tokens=num)
        for num in texts
    ]
    prices = find_prices(section)
    costs = [
        estimate_cost(num_requests, inputs, section.num_samples * outputs, prices)
        for inputs, outputs in zip(read, cut_tokens(JUDGE_VERDICT_TOKENS, section.max_tokens), strict=True)
    ]
    dollars = [cost.usd for cost in costs if cost.usd is not None]
    return JudgeEstimate(
        num_requests,
        Span(*(cost.usage.prompt_tokens for cost in costs)),
        Span(*(cost.usage.completion_tokens for cost in costs)),
        Span(*dollars) if dollars else None,
    )


def count_audit(section: JudgeSection, num_tasks: int) -> int:
    """Requests of a judge's report card on so many tasks beside those that count as judged: about a right and a wrong answer
    to each task once more, and where the judge sees the image, without it, with a blank and with another's. Of one that
    compares, what it says of those two alone counts as nothing else.
    """
    num_ways = (4 if section.image == "own" else 1) + JUDGES.resolve(section.kind).compares
    return num_ways * num_tasks * count_requests(section, 2)


def estimate_grading(section: EvalSection, num_tasks: int, num_responses: int) -> JudgeEstimate | None:
    """Of the judge that scores so many answers to each question of an evaluation, its report card included; None without."""
    judge = section.judge
    if judge is None:
        return None
    num_requests = num_tasks * count_requests(judge, num_responses) + count_audit(
        judge, min(judge.num_audited, num_tasks)
    )
    return estimate_requests(judge, num_requests, section.max_tokens)


def judge_hours(section: JudgeSection, judge: JudgeEstimate) -> Span:
    """By the calls in flight, or by OpenAI's tokens a minute."""
    calls = JUDGE_CALL_S * (judge.num_requests / section.max_concurrency / 3600)
    if section.base_url is not None:
        return calls
    tokens = judge.input_tokens + judge.output_tokens
    by_limit = Span(*(amount / rate / 60 for amount, rate in tokens.each(JUDGE_TOKENS_PER_MINUTE)))
    return Span(*(max(pair) for pair in calls.each(by_limit)))
