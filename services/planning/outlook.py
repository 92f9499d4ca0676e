"""What `vcot doctor` says beside its findings: on which cards a recipe fits, and what it takes. Lines, to be copied."""

from __future__ import annotations

from collections.abc import Iterator

from vcot.pipeline.judges import list_sections
from vcot.pipeline.sections import JudgeSection
from vcot.services.planning.assumptions import KINDS, SIZES, THOUGHT_TOKENS, Span
from vcot.services.planning.capacity import Cards, make_plan
from vcot.services.planning.estimate import (
    RunEstimate,
    count_work,
    estimate_disk,
    estimate_run,
    estimate_run_grading,
    estimate_run_judge,
)
from vcot.services.planning.judge_estimate import JudgeEstimate, judge_hours
from vcot.services.recipes.recipe import Recipe
from vcot.training.protocol.shape import Shape

NUMS = (1, 2, 4, 8)


def render_fits(recipe: Recipe, shape: Shape) -> Iterator[str]:
    """For each size and number of cards, the flags that make the recipe fit, or why it does not."""
    yield f"What fits: {recipe.model.source}, {shape.num_parameters / 1e9:.1f} billion parameters, on empty cards"
    for size, usable_gib in SIZES.items():
        for num in NUMS:
            plan = make_plan(recipe, shape, Cards(num, usable_gib, usable_gib))
            verdict = (
                f"fits {f'with {plan.flags}' if plan.flags else 'as it is'}" if plan.fit.fits else f"no: {plan.fault}"
            )
            yield f"  {num} x {size} GB  {verdict}"


def render_costs(recipe: Recipe, shape: Shape) -> Iterator[str]:
    """Hours by stage for each kind of card, then tokens, dollars and disk; nothing where a data set's size is not known."""
    counts = count_work(recipe)
    if counts is None:
        return
    yield "What the run will take, an estimate: likely hours, and in all from what is possible to what may be"
    runs = {
        f"{num} x {kind.name}": run
        for kind, num in KINDS
        if (run := estimate_run(recipe, shape, kind, num)) is not None
    }
    stages = next(iter(runs.values())).stages
    yield f"  {'cards':<20}" + "".join(f"{stage.name:>10}" for stage in stages) + "   in all"
    for cards, run in runs.items():
        yield f"  {cards:<20}{_hours(run)}"
    yield from _render_judge("judge", recipe.judge, estimate_run_judge(recipe, counts))
    if recipe.eval.judge is not None and (grading := estimate_run_grading(recipe, counts)) is not None:
        yield from _render_judge("eval.judge", recipe.eval.judge, grading)
    disk = estimate_disk(recipe, shape, counts)
    parts = ", ".join(f"{what} {gib:.1f}" for what, gib in disk.items())
    yield f"  disk: {sum(disk.values()):.0f} GiB ({parts})"
    yield (
        f"  assumed, among others: a response with a thought has {THOUGHT_TOKENS.likely:.0f} tokens "
        f"({THOUGHT_TOKENS.low:.0f} to {THOUGHT_TOKENS.high:.0f}); services/planning/assumptions.py has each with its source"
    )


def _hours(run: RunEstimate) -> str:
    if not run.plan.fit.fits:
        return "   does not fit"
    return "".join(f"{stage.hours.likely:>10.1f}" for stage in run.stages) + f"   {format_span(run.hours)}"


def _render_judge(name: str, section: JudgeSection, judge: JudgeEstimate) -> Iterator[str]:
    if not judge.input_tokens.likely:
        return
    dollars = f"${format_span(judge.dollars)}" if judge.dollars is not None else "at a price that is not known here"
    hours = judge_hours(section, judge)
    models = dict.fromkeys(each.model for each in list_sections(section) if each.model)
    tokens = f"{format_millions(judge.input_tokens)} million tokens in and {format_millions(judge.output_tokens)} out"
    yield (
        f"  {name}: up to {judge.num_requests:,} requests to {' and '.join(models)}, {tokens}: {dollars}, "
        f"{format_span(hours)} hours by the provider's limits and {name}.max_concurrency = {section.max_concurrency}"
    )


def format_span(span: Span) -> str:
    """`14 (7 to 67)`, in ascending order."""
    return f"{_round(span.likely)} ({_round(min(span.low, span.high))} to {_round(max(span.low, span.high))})"


def format_millions(span: Span) -> str:
    """The same in millions."""
    return format_span(span * 1e-6)


def _round(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"
