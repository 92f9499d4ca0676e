"""What an evaluation will take and what it could see, before it is made: `vcot eval --plan`. Pure.

Requests and tokens are counted from the recipe, less what a run has answered already. Hours come from the model of
services/planning/estimate.py. The smallest difference is that of the paired test (eval/statistics.py), from the number of
questions, the responses to each and how alike the checkpoints answer; what an earlier evaluation of the run measured is used
in place of an assumption, and the plan says which it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from rich.console import RenderableType
from rich.table import Table

from vcot.eval.benchmark import find_benchmark
from vcot.eval.eval_section import EvalSection
from vcot.eval.evaluate import check_grader
from vcot.eval.image_reliance import TEXT_ONLY
from vcot.eval.statistics import Noise, plan_effect
from vcot.eval.table import format_range
from vcot.pipeline.errors import InputError
from vcot.pipeline.judges.cost import describe_tokens, describe_usd
from vcot.pipeline.records import PromptName, Record
from vcot.services.planning.assumptions import ACCURACY, ALIKE, CORRELATION, KINDS, NANO_RESPONSES_S, OPTIONS, Span
from vcot.services.planning.estimate import count_options, count_tasks, evaluation_hours, list_evaluation
from vcot.services.planning.judge_estimate import estimate_grading, estimate_requests, judge_hours
from vcot.services.planning.outlook import format_span
from vcot.services.planning.workload import Workload
from vcot.services.recipes.recipe import Recipe
from vcot.training.protocol.shape import Shape


class Likely(Record):
    """A figure with what is possible and what may be."""

    low: float
    likely: float
    high: float


class TimeOn(Record):
    """How long it takes on some hardware, the server's start included."""

    hardware: str
    hours: Likely


class Grading(Record):
    """What the judge that scores the answers will be asked (eval.judge)."""

    model: str
    num_requests: int
    """At most: answers to a question that say the same are judged once. Its report card is in it."""
    num_answered: int
    """Those of them that the run holds a verdict to, or that it need not ask."""
    prompt_tokens: Likely
    """As the next two, of the requests that are owed."""
    completion_tokens: Likely
    hours: Likely
    """By the provider's limits and eval.judge.max_concurrency."""
    usd: Likely | None
    """None where the price of its model is not known."""


class EvalPlan(Record):
    """An evaluation before it is made."""

    benchmark: str
    split: str
    num_questions: int
    num_checkpoints: int
    num_settings: int
    """Prompts times temperatures."""
    num_images: int
    """Kinds of image that each question is asked about."""
    num_responses: int
    """To a question, with one prompt, temperature and image."""
    num_requests: int
    """To the checkpoints."""
    num_option_requests: int
    """Those of them that ask how likely an option is (eval.margins): one for each option and image."""
    are_options_counted: bool
    """Whether the run's own questions were read for that, or a usual number of options is assumed."""
    num_answered: int
    """Those of them that the run holds an answer to: they are not asked again."""
    prompt_tokens: int | None
    """As the next two, of the requests that are owed; image tokens included. None where the model's shape is not known."""
    image_tokens: int | None
    completion_tokens: Likely
    times: tuple[TimeOn, ...]
    num_rounds: int = 1
    """Of several, one is chosen by the validation split, whose requests are not in these figures."""
    grading: Grading | None = None
    """The judge's part, where one scores the answers; checkpoints are served by oneself, and cost what the machine costs."""
    detectable: Likely
    """The smallest true difference of two checkpoints that would be found four times in five, as a share."""
    detectable_corrected: float
    """The likely one where Holm's correction is for all the differences of the table."""
    accuracy: float
    correlation: float
    alike: float
    noise: Literal["assumed", "measured"]
    """Where accuracy and correlation are from; `measured` is in an earlier evaluation of the run."""


class Owed(NamedTuple):
    """Requests of a kind."""

    num: int
    num_owed: int


@dataclass(frozen=True)
class Known:
    """What a run tells about an evaluation before it is made; nothing where there is no run."""

    num_questions: int | None = None
    owed: Mapping[PromptName, int] | None = None
    """Requests that have no answer yet, by prompt."""
    options: Owed | None = None
    """Requests that ask how likely an option is."""
    num_owed_judge: int | None = None
    """Requests to the judge that scores the answers, its report card's included."""
    noise: Noise | None = None


def plan_evaluation(
    recipe: Recipe, num_checkpoints: int, known: Known, shape: Shape | None, *, is_nano: bool
) -> EvalPlan:
    """The plan of asking the recipe's evaluation split of so many checkpoints.

    Raises InputError where nothing says how many questions there are, or where there is but one, and RecipeError as
    `check_grader` does.
    """
    section, benchmark = recipe.eval, find_benchmark(recipe.eval)
    check_grader(section)
    num_questions = known.num_questions or count_tasks(benchmark.tasks(section, section.split))
    if num_questions is None or num_questions < 2:
        raise InputError(
            f"how many questions {benchmark.name} has is not known before they are read; set eval.num_tasks (2 or more), or "
            "begin the run with `vcot eval`"
        )
    prompts, num_images = benchmark.list_prompts(section), len(section.images)
    per_prompt = num_questions * len(section.temperatures) * section.num_seeds * num_images * num_checkpoints
    options = known.options or Owed(*[num_checkpoints * count_options(section, num_questions)] * 2)
    work = _list_owed(recipe, per_prompt, known.owed, options)
    num_requests = per_prompt * len(prompts) + options.num
    num_settings = len(prompts) * len(section.temperatures)
    num_responses = section.num_samples * section.num_seeds
    cases = _list_noise(known.noise)
    effects = [plan_effect(noise, num_questions, num_responses) for noise in cases]
    num_tests = num_settings * num_checkpoints * (num_checkpoints - 1) // 2
    image = None if shape is None else shape.num_image_tokens(recipe.train.max_image_side)
    share = sum(shown not in TEXT_ONLY for shown in section.images) / num_images
    return EvalPlan(
        benchmark=benchmark.name,
        split=section.split,
        num_questions=num_questions,
        num_checkpoints=num_checkpoints,
        num_settings=num_settings,
        num_images=num_images,
        num_responses=num_responses,
        num_requests=num_requests,
        num_option_requests=options.num,
        are_options_counted=known.options is not None,
        num_answered=num_requests - sum(num for _, num in work),
        prompt_tokens=None if image is None else _count_prompts(work, share * image, with_text=True),
        image_tokens=None if image is None else _count_prompts(work, share * image, with_text=False),
        completion_tokens=_likely(_count_completions(work)),
        num_rounds=recipe.rounds.num,
        times=tuple(_list_times(recipe, shape, work, is_nano=is_nano)),
        grading=_plan_grading(
            section, num_questions, num_settings * num_images * num_responses * num_checkpoints, known.num_owed_judge
        ),
        detectable=Likely(low=min(effects), likely=effects[1], high=max(effects)),
        detectable_corrected=plan_effect(cases[1], num_questions, num_responses, max(1, num_tests)),
        accuracy=cases[1].accuracy,
        correlation=cases[1].correlation,
        alike=cases[1].alike,
        noise="assumed" if known.noise is None else "measured",
    )


def _list_owed(
    recipe: Recipe, per_prompt: int, owed: Mapping[PromptName, int] | None, options: Owed
) -> list[tuple[Workload, int]]:
    """What the checkpoints are still to be asked: by prompt, and how likely options are."""
    *asked, (of_options, _) = list_evaluation(recipe, per_prompt, options.num_owed)
    owed = {each.prompt: num for each, num in asked} if owed is None else owed
    return [*((each, owed.get(each.prompt, 0)) for each, _ in asked), (of_options, options.num_owed)]


def _plan_grading(section: EvalSection, num_questions: int, num_responses: int, num_owed: int | None) -> Grading | None:
    """What the section's judge will be asked about so many answers to each question; None without one that is a model."""
    judge, whole = section.judge, estimate_grading(section, num_questions, num_responses)
    if judge is None or judge.model is None or whole is None:
        return None
    owed = whole if num_owed is None else estimate_requests(judge, num_owed, section.max_tokens)
    return Grading(
        model=judge.model,
        num_requests=whole.num_requests,
        num_answered=max(0, whole.num_requests - owed.num_requests),
        prompt_tokens=_likely(owed.input_tokens),
        completion_tokens=_likely(owed.output_tokens),
        hours=_likely(judge_hours(judge, owed)),
        usd=None if owed.dollars is None else _likely(owed.dollars),
    )


def _list_noise(measured: Noise | None) -> tuple[Noise, Noise, Noise]:
    """Favourable, likely and unfavourable; all the same where it was measured."""
    if measured is not None:
        return measured, measured, measured
    low, likely, high = (Noise(ACCURACY, r, ALIKE) for r in (CORRELATION.low, CORRELATION.likely, CORRELATION.high))
    return low, likely, high


def _count_prompts(work: Sequence[tuple[Workload, int]], image_tokens: float, *, with_text: bool) -> int:
    return round(
        sum(num * each.num_prompts_read * (image_tokens + (each.text_tokens if with_text else 0)) for each, num in work)
    )


def _count_completions(work: Sequence[tuple[Workload, int]]) -> Span:
    total = Span(0, 0, 0)
    for each, num in work:
        total += each.response_tokens * (num * each.n)
    return total


def _list_times(
    recipe: Recipe, shape: Shape | None, work: Sequence[tuple[Workload, int]], *, is_nano: bool
) -> Iterator[TimeOn]:
    """On the kinds of cards of `vcot doctor`; of a bundled model on two CPU cores. Nothing where nothing is owed."""
    num_responses = sum(num * each.n for each, num in work)
    if not num_responses:
        return
    if is_nano:
        rates = (NANO_RESPONSES_S.low, NANO_RESPONSES_S.likely, NANO_RESPONSES_S.high)
        yield TimeOn(hardware="2 CPU cores", hours=_likely(Span(*(num_responses / rate / 3600 for rate in rates))))
    elif shape is not None:
        for kind, num in KINDS:
            found = evaluation_hours(recipe, shape, kind, num, work)
            if found is not None:
                yield TimeOn(hardware=f"{num} x {kind.name}", hours=_likely(found))


def _likely(span: Span) -> Likely:
    return Likely(low=min(span.low, span.high), likely=span.likely, high=max(span.low, span.high))


def describe_plan(plan: EvalPlan) -> str:
    """What it takes and what it could see, in plain sentences."""
    owed = plan.num_requests - plan.num_answered
    kept = f" The run has answered {plan.num_answered:,} of them." if plan.num_answered else ""
    said = f"This evaluation asks {plan.num_requests:,} requests of the checkpoints.{kept}"
    if plan.times:
        first = plan.times[0]
        said += f" The {owed:,} that are owed take about {_say_hours(first.hours)} on {first.hardware}."
    if plan.grading is not None:
        said += f" {_describe_grading(plan.grading)}"
    if plan.num_rounds > 1:
        said += f" The validation split is asked, too, of the base and {plan.num_rounds} policies; that is not counted here."
    if plan.num_checkpoints < 2:
        return f"{said} One checkpoint alone is compared with none."
    seen = format_range([plan.detectable.low, plan.detectable.high])
    return (
        f"{said} A true difference of {seen} points between two checkpoints would be found four times in five at the 5 % "
        f"level; a smaller one would mostly be missed. With Holm's correction for all differences of the table it is "
        f"{100 * plan.detectable_corrected:.1f} points. The correlation of the checkpoints' answers is {plan.noise}: "
        f"{plan.correlation:.2f}. Four times as many questions halve these figures."
    )


def _describe_grading(grading: Grading) -> str:
    owed = grading.num_requests - grading.num_answered
    if not owed:
        return f"The judge {grading.model} has scored all answers."
    price = "a price that is not known here" if grading.usd is None else f"about {_say_usd(grading.usd)}"
    return (
        f"The judge {grading.model} is owed up to {owed:,} requests, its report card's included, for {price}, in "
        f"{_say_hours(grading.hours)}."
    )


def render_plan(plan: EvalPlan) -> list[RenderableType]:
    """The table and the sentences for a terminal."""
    table = Table(
        show_header=False, title=f"What vcot eval will take: {plan.benchmark}, {plan.split}", title_justify="left"
    )
    for name, value in _list_rows(plan):
        table.add_row(name, value)
    return [table, f"\n{describe_plan(plan)}"]


def _list_rows(plan: EvalPlan) -> Iterator[tuple[str, str]]:
    yield "questions", f"{plan.num_questions:,}"
    yield "checkpoints", f"{plan.num_checkpoints}"
    yield "prompts x temperatures", f"{plan.num_settings}"
    yield "kinds of image", f"{plan.num_images}"
    yield "responses to a question", f"{plan.num_responses}"
    yield "requests", f"{plan.num_requests:,}, {plan.num_answered:,} of them answered already"
    if plan.num_option_requests:
        how = "" if plan.are_options_counted else f", if a question has {OPTIONS} options"
        yield "  of them for margins", f"{plan.num_option_requests:,}{how}"
    if plan.prompt_tokens is None or plan.image_tokens is None:
        yield "prompts", "not known: the model's config.json is not here"
    else:
        yield (
            "prompts",
            f"{describe_tokens(plan.prompt_tokens)}, {describe_tokens(plan.image_tokens)} of them of images",
        )
    yield "completions", _say_span(plan.completion_tokens)
    for each in plan.times:
        yield f"time on {each.hardware}", _say_hours(each.hours)
    if plan.grading is not None:
        yield from _list_grading(plan.grading)
    yield "cost", f"that of your own machine{_add_price(plan.grading)}"
    if plan.num_checkpoints > 1:
        yield "detectable difference", f"{format_range([plan.detectable.low, plan.detectable.high])} points"


def _list_grading(grading: Grading) -> Iterator[tuple[str, str]]:
    yield (
        f"requests to {grading.model}",
        f"up to {grading.num_requests:,}, {grading.num_answered:,} of them answered already or not needed",
    )
    yield "  prompts", _say_span(grading.prompt_tokens)
    yield "  verdicts", _say_span(grading.completion_tokens)
    yield "  time by its limits", _say_hours(grading.hours)


def _add_price(grading: Grading | None) -> str:
    """What is paid beside one's own machine."""
    if grading is None or grading.num_answered == grading.num_requests:
        return ""
    if grading.usd is None:
        return f"; the price of {grading.model} is not known (eval.judge.input_usd, output_usd)"
    return f", and {_say_usd(grading.usd)} for {grading.model}"


def _say_usd(usd: Likely) -> str:
    low, likely, high = (describe_usd(value).removeprefix(", ") for value in (usd.low, usd.likely, usd.high))
    return f"{likely} ({low} to {high})"


def _say_span(span: Likely) -> str:
    return f"{describe_tokens(span.likely)} ({describe_tokens(span.low)} to {describe_tokens(span.high)})"


def _say_hours(hours: Likely) -> str:
    if hours.high < 1:
        return f"{format_span(Span(60 * hours.low, 60 * hours.likely, 60 * hours.high))} minutes"
    return f"{format_span(Span(hours.low, hours.likely, hours.high))} hours"
