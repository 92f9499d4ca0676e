"""Where a run keeps what its evaluations found: a folder for each setting, so that none overwrites or hides another.

report/          under the run's own recipe, of the checkpoints that it makes
report/<key>/    under other settings (a flag of one command, or the recipe as it was before --save), or of checkpoints
                 that were named

Each holds results.json, prior.json and index.html as far as they were made, and settings.json, which says what they are of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from vcot.pipeline.files import write_record
from vcot.pipeline.records import Record, content_key
from vcot.services.checkpoints.registry import Checkpoint
from vcot.services.recipes.recipe import Recipe
from vcot.services.run.directory import Run
from vcot.training.protocol.job import read_record

RESULTS = "results.json"
PRIOR = "prior.json"
PAGE = "index.html"
_SETTINGS = "settings.json"
_OF_A_JUDGE = {
    "base_url", "api_key_env", "max_concurrency", "max_cost_usd", "input_usd", "output_usd", "batch", "min_auc",
    "num_audited",
}  # fmt: skip
_NOT_DECIDING: Mapping[str, Any] = {
    "serve": True,
    "sweep": True,
    "tasks": {"path", "allow_overlap"},
    "sample": {"max_concurrency"},
    "judge": _OF_A_JUDGE,
    "train": {"report_to", "worker"},
    "eval": {"path": True, "max_concurrency": True, "judge": _OF_A_JUDGE},
}
"""How work is done, not what comes of it."""


class Settings(Record):
    """`settings.json`: what the results beside it are of."""

    key: str
    changes: tuple[str, ...] = ()
    """Where they differ from the run's recipe, as section.field=value."""
    checkpoints: tuple[str, ...] = ()
    """The digests of those that were named."""


def find_folder(run: Run, named: Sequence[Checkpoint] = ()) -> Path:
    """Where the results of this command's settings, of the checkpoints that it `named`, are kept."""
    settings, folder = _settings(run, named), run.directory / "report"
    is_own = not named and _decide(run.recipe) == _decide(run.kept)
    return folder if is_own else folder / settings.key


def claim_folder(run: Run, named: Sequence[Checkpoint] = ()) -> Path:
    """The same, made; results that lie there from before the run's recipe was changed get a folder of their own."""
    settings, folder = _settings(run, named), find_folder(run, named)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _SETTINGS
    if path.is_file() and (before := read_record(path, Settings)).key != settings.key:
        aside = folder / before.key
        aside.mkdir(exist_ok=True)
        for name in (RESULTS, PRIOR, PAGE, _SETTINGS):
            with suppress(FileNotFoundError):
                (folder / name).replace(aside / name)
    write_record(path, settings)
    return folder


def find_sweep_folder(run: Run) -> Path:
    """Where what a search under these settings found is kept."""
    used, kept = (
        recipe.model_dump(mode="json", include={"sweep"}) | _decide(recipe) for recipe in (run.recipe, run.kept)
    )
    folder = run.directory / "report"
    return folder if used == kept else folder / content_key(settings=used)[:12]


def describe_settings(run: Run) -> str:
    """Which settings results are shown under."""
    if _decide(run.recipe) == _decide(run.kept):
        return f"those of {run.directory / 'recipe.toml'}"
    return f"{', '.join(run.changes)}; all else as in {run.directory / 'recipe.toml'}"


def _settings(run: Run, named: Sequence[Checkpoint]) -> Settings:
    digests = tuple(checkpoint.ref.digest for checkpoint in named)
    key = content_key(settings=_decide(run.recipe), checkpoints=digests)[:12]
    return Settings(key=key, changes=run.changes, checkpoints=digests)


def _decide(recipe: Recipe) -> dict[str, Any]:
    """What the figures depend on; a setting at its default is left out, so that one that is added later moves no results."""
    return recipe.model_dump(mode="json", exclude=_NOT_DECIDING, exclude_defaults=True)
