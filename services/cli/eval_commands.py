"""`vcot eval --plan`: what the evaluation will take and could see, shown; nothing is asked."""

from __future__ import annotations

from collections.abc import Sequence

from vcot.pipeline.errors import InputError
from vcot.pipeline.report import Report, tell
from vcot.services.checkpoints.model_source import is_bundled
from vcot.services.cli import opening
from vcot.services.cli.target import Target, run_directory
from vcot.services.cli.terminal import Terminal
from vcot.services.planning.eval_plan import Known, plan_evaluation, render_plan
from vcot.services.planning.machine import find_recipe_shape
from vcot.services.recipes.recipe import Recipe, load_recipe
from vcot.services.run.directory import RECIPE
from vcot.services.run.foresight import look_ahead
from vcot.services.run.rounds import list_rounds
from vcot.services.run.session import Session

_BASE_AND_POLICY = 2


def plan(target: Target, names: Sequence[str], *, as_json: bool) -> None:
    """`vcot eval --plan`: of the run where there is one, else of the recipe."""
    if (run_directory(target.run, target.recipe) / RECIPE).is_file():
        opening.execute("eval --plan", target, lambda session: _plan_run(session, names), as_json=as_json)
        return
    if names:
        raise InputError(f"there is no run that could hold {', '.join(names)}; name no checkpoints, or set --run")
    recipe = load_recipe(target.recipe or "nano", target.set)
    _show(recipe, _BASE_AND_POLICY, Known(), Terminal(as_json=as_json, quiet=target.quiet))


async def _plan_run(session: Session, names: Sequence[str]) -> None:
    registry = session.registry
    if names:
        chosen = session.find(names)
    else:
        base = registry.find(session.run.recipe.model.name)
        chosen = [made for made in (base, list_rounds(session)[-1].policy if base else None) if made]
    num_checkpoints = len(chosen) if names else _BASE_AND_POLICY
    refs = [checkpoint.ref for checkpoint in chosen]
    known = look_ahead(session, refs, num_checkpoints - len(chosen)) if chosen else Known()
    _show(session.run.recipe, num_checkpoints, known, session.report)


def _show(recipe: Recipe, num_checkpoints: int, known: Known, report: Report) -> None:
    shape = find_recipe_shape(recipe.model)
    made = plan_evaluation(recipe, num_checkpoints, known, shape, is_nano=is_bundled(recipe.model))
    tell(report, render_plan(made), made)
