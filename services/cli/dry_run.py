"""`vcot run --dry-run`: what the run would do, shown; nothing is begun, written or asked."""

from __future__ import annotations

from collections.abc import Sequence

from vcot.pipeline.report import tell
from vcot.services.checkpoints.model_source import is_bundled
from vcot.services.cli.status_command import look, tabulate
from vcot.services.cli.target import Target, run_directory
from vcot.services.cli.terminal import Terminal
from vcot.services.planning.machine import find_recipe_shape
from vcot.services.planning.run_plan import plan_run, render_run_plan
from vcot.services.recipes.recipe import Recipe, load_recipe
from vcot.services.run.directory import RECIPE, open_run


def show_run_plan(target: Target, overrides: Sequence[str], *, as_json: bool) -> None:
    """Of the run where there is one, with what it holds already; else of the recipe."""
    recipe = _find_recipe(target, overrides)
    plan = plan_run(recipe, find_recipe_shape(recipe.model), is_nano=is_bundled(recipe.model))
    status = look(target)
    kept = [f"\n{status.run} holds of this, and does not ask again:", tabulate(status)] if status.stages else []
    tell(Terminal(as_json=as_json, quiet=target.quiet), [*render_run_plan(plan), *kept], plan)


def _find_recipe(target: Target, overrides: Sequence[str]) -> Recipe:
    where = run_directory(target.run, target.recipe)
    if not (where / RECIPE).is_file():
        return load_recipe(target.recipe or "nano", (*overrides, *target.set))
    with open_run(where, target.recipe, (*overrides, *target.set), access="read") as run:
        return run.recipe
