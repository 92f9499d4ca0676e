"""What a run would do, before it is begun: its steps, how much each asks, and what that takes. Pure.

Counted as `vcot doctor` counts (services/planning/estimate.py), and put into the order in which the steps come; what the
evaluation could see is `vcot eval --plan`'s.
"""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table

from vcot.eval.benchmark import find_benchmark
from vcot.pipeline.judges import list_sections
from vcot.pipeline.judges.cost import describe_tokens, describe_usd
from vcot.pipeline.pairs import needs_gains
from vcot.pipeline.records import Record, Split
from vcot.services.planning.assumptions import CANDIDATE_SHARE, NANO_RESPONSES_S, Span
from vcot.services.planning.estimate import (
    Counts,
    count_options,
    count_tasks,
    count_work,
    estimate_run_grading,
    estimate_run_judge,
    list_evaluation,
)
from vcot.services.planning.judge_estimate import JudgeEstimate
from vcot.services.planning.outlook import format_span, render_costs
from vcot.services.planning.workload import Workload
from vcot.services.recipes.recipe import Recipe
from vcot.training.protocol.shape import Shape


class PlannedStep(Record):
    """A step of a run that is not made yet."""

    step: str
    what: str
    num_requests: int | None = None
    """To a model, over all rounds and at most; None where none is asked, or the data set's size is not known here."""
    num_tokens: float | None = None
    """That are likely to be generated for it."""
    usd: float | None = None
    """What that is likely to cost, where the price is known; one's own machine is not counted."""


class RunPlan(Record):
    """A run that is not made yet."""

    recipe: str
    steps: tuple[PlannedStep, ...]
    outlook: tuple[str, ...]
    """How long it takes on which cards, and what disk, in lines; what is not known is said."""


def plan_run(recipe: Recipe, shape: Shape | None, *, is_nano: bool) -> RunPlan:
    """The plan of a recipe's run, of all its rounds."""
    counts = count_work(recipe)
    outlook = tuple(_look_out(recipe, shape, counts, is_nano=is_nano))
    return RunPlan(recipe=recipe.name, steps=tuple(_list_steps(recipe, counts)), outlook=outlook)


def _list_steps(recipe: Recipe, counts: Counts | None) -> Iterator[PlannedStep]:
    train, pairs = recipe.train, recipe.pairs
    yield _plan_sampling(recipe)
    yield _plan_judge("judge", _name_judge(recipe), estimate_run_judge(recipe, counts) if counts else None)
    if needs_gains(pairs):
        num = round(counts.num_tasks + 2 * counts.num_responses * CANDIDATE_SHARE.likely) if counts else None
        yield PlannedStep(step="gain", what="what the image adds to responses", num_requests=num)
    likely = f", about {counts.num_pairs.likely:,.0f} pairs" if counts else ""
    yield PlannedStep(step="pair", what=f"by {pairs.policy}{likely}")
    yield PlannedStep(step="train", what=f"{train.method}, {train.epochs:g} epochs, LoRA r={train.lora_r}")
    yield PlannedStep(step="merge", what=f"{recipe.merge.serve_as}; served and compared before it is registered")
    yield from _plan_evaluation(recipe, counts)
    yield PlannedStep(step="swap", what="the policy goes live, verified")
    yield PlannedStep(step="report", what="the table and the page")


def _plan_sampling(recipe: Recipe) -> PlannedStep:
    section, num = recipe.sample, count_tasks(recipe.tasks)
    tasks = "all" if num is None else f"{num:,}"
    rounds = f", {recipe.rounds.num} rounds" if recipe.rounds.num > 1 else ""
    what = f"{tasks} {recipe.tasks.source} tasks x {section.k} responses at temperature {section.temperature:g}{rounds}"
    if num is None:
        return PlannedStep(step="sample", what=what)
    asked = Workload(section.prompt, section.k, section.max_concurrency, section.max_tokens)
    num_requests = num * recipe.rounds.num
    tokens = num_requests * section.k * asked.response_tokens.likely
    return PlannedStep(step="sample", what=what, num_requests=num_requests, num_tokens=tokens)


def _name_judge(recipe: Recipe) -> str:
    models = dict.fromkeys(each.model for each in list_sections(recipe.judge) if each.model)
    return f"by {recipe.judge.kind}{', ' + ' and '.join(models) if models else ', a program'}"


def _plan_judge(step: str, what: str, asked: JudgeEstimate | None) -> PlannedStep:
    if asked is None or not asked.num_requests:
        return PlannedStep(step=step, what=what)
    usd = asked.dollars.likely if asked.dollars else None
    tokens = asked.output_tokens.likely
    return PlannedStep(step=step, what=what, num_requests=asked.num_requests, num_tokens=tokens, usd=usd)


def _plan_evaluation(recipe: Recipe, counts: Counts | None) -> Iterator[PlannedStep]:
    section, num_rounds = recipe.eval, recipe.rounds.num
    if num_rounds > 1:
        yield _plan_asking(recipe, "choose", f"base and {num_rounds} policies", "validation", 1 + num_rounds)
    yield _plan_asking(recipe, "eval", "base and policy", section.split, 2)
    if section.judge is not None:
        yield _plan_judge("grade", f"by {section.judge.kind}", estimate_run_grading(recipe, counts) if counts else None)


def _plan_asking(recipe: Recipe, step: str, who: str, split: Split, num_checkpoints: int) -> PlannedStep:
    section, benchmark = recipe.eval, find_benchmark(recipe.eval)
    num = count_tasks(benchmark.tasks(section, split))
    prompts, temperatures = (
        ", ".join(benchmark.list_prompts(section)),
        ", ".join(f"{t:g}" for t in section.temperatures),
    )
    questions = "all" if num is None else f"{num:,}"
    what = f"{who}, {questions} {benchmark.name} questions of {split}: {prompts} at {temperatures}"
    if num is None:
        return PlannedStep(step=step, what=what)
    times = num_checkpoints * len(section.temperatures) * section.num_seeds * len(section.images)
    num_options = num_checkpoints * count_options(section, num) if split == section.split else 0
    work = list_evaluation(recipe, num * times, num_options)
    tokens = sum(asked * each.n * each.response_tokens.likely for each, asked in work)
    return PlannedStep(step=step, what=what, num_requests=sum(asked for _, asked in work), num_tokens=tokens)


def _look_out(recipe: Recipe, shape: Shape | None, counts: Counts | None, *, is_nano: bool) -> Iterator[str]:
    """Time, and what cannot be said."""
    if counts is None:
        yield "How many questions there are is known when they are read, or with tasks.num_tasks and eval.num_tasks."
    elif is_nano:
        num, rates = counts.num_responses + counts.num_eval_responses, NANO_RESPONSES_S
        minutes = Span(*(num / rate / 60 for rate in (rates.low, rates.likely, rates.high)))
        yield f"{num:,} responses take {format_span(minutes)} minutes on two CPU cores, beside starting vLLM and training."
    elif shape is None:
        yield f"How long it takes is not known: config.json of {recipe.model.source} is not here."
    else:
        yield from render_costs(recipe, shape)


def render_run_plan(plan: RunPlan) -> list[RenderableType]:
    """The table and the lines for a terminal."""
    table = Table(title=f"What vcot run would do: recipe {plan.recipe}", title_justify="left")
    for name in ("step", "what"):
        table.add_column(name, overflow="fold")
    for name in ("requests", "to be generated", "cost"):
        table.add_column(name, justify="right")
    for step in plan.steps:
        num = "" if step.num_requests is None else f"{step.num_requests:,}"
        tokens = "" if step.num_tokens is None else describe_tokens(step.num_tokens)
        table.add_row(step.step, step.what, num, tokens, describe_usd(step.usd).removeprefix(", "))
    return [table, "\n".join(("", *plan.outlook))]
