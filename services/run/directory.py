"""A run directory: everything that one run asked, was answered, trained and measured.

recipe.toml          the recipe with its overrides
ledger.sqlite        responses, judgments and scores (pipeline/ledger.py)
tasks/<key>.jsonl    the questions, as loaded once from their source
images/              their images, by content
pairs/<key>/         train.parquet, validation.parquet and the data card
judges/<key>.json    report cards of judges (services/run/auditing.py)
shards/              what a command with --engine ray has others ask, and what came of it (services/run/sharding.py)
shards.json          where else shards lie, while some may not be merged (services/run/unmerged.py)
batches/             what was asked and answered through a provider's batches (pipeline/judge_batches.py)
checkpoints/<name>/  merged checkpoints, and the base's manifest
training/<key>/      the worker's job directory (training/protocol/job.py)
report/              the page and its data, under other settings than the recipe's in report/<key>/ (services/run/results.py)
view/                the viewer's index, and what a person said of responses (services/view)
logs/                one file per process
serving.json         where the run's gateway answers, while one runs (services/run/announcement.py)
running.json         what the command that writes to the run is doing, for `vcot status` (services/run/live.py)
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, TextIO

from vcot.pipeline.errors import InputError, RecipeError
from vcot.pipeline.files import PARTIAL, read_text, write_kept
from vcot.pipeline.images import ImageStore
from vcot.pipeline.ledger import Ledger
from vcot.pipeline.locks import try_lock
from vcot.services.recipes.recipe import Recipe, load_recipe, parse_recipe, render_recipe

RECIPE = "recipe.toml"
LEDGER = "ledger.sqlite"
SHARDS = "shards"
"""The folder of what a command has others ask (services/run/sharding.py)."""
_WRITTEN_ALONE = ("images", "tasks", "pairs", "batches", "report", SHARDS)
"""Folders that only the holder of the run's lock writes to."""
Access = Literal["alone", "shared", "read"]
"""How a command works on a run: as its only writer; beside one, with a lock of its own for what it writes, as a server does;
or making nothing in it, so that it never waits and never refuses."""


@dataclass(frozen=True)
class Run:
    """An opened run; its parts are made when first used."""

    directory: Path
    recipe: Recipe
    """What this command goes by."""
    kept: Recipe
    """What recipe.toml says; the same, but for flags that hold for one command."""
    overrides: tuple[str, ...] = ()
    """Those flags, as section.field=value."""
    is_read: bool = False
    """Whether this command makes nothing in the run, and so may work beside one that does."""

    @cached_property
    def images(self) -> ImageStore:
        """The run's image store."""
        return ImageStore(self.directory)

    @cached_property
    def ledger(self) -> Ledger:
        """The run's ledger."""
        return Ledger(self.directory / LEDGER, is_read=self.is_read)

    async def close(self) -> None:
        """Wait for what is being written, and close what was opened."""
        if "ledger" in vars(self):
            await self.ledger.finish()

    @property
    def changes(self) -> tuple[str, ...]:
        """What this command goes by other than recipe.toml, as section.field=value."""
        kept, used = self.kept.model_dump(mode="json"), self.recipe.model_dump(mode="json")
        return tuple(
            f"{section}.{field}={json.dumps(value)}"
            for section, fields in used.items()
            if isinstance(fields, dict)
            for field, value in fields.items()
            if kept[section][field] != value
        )

    def path(self, *parts: str) -> Path:
        """A path in the run, with its parent folder made, unless the run is only read."""
        path = self.directory.joinpath(*parts)
        if not self.is_read:
            path.parent.mkdir(parents=True, exist_ok=True)
        return path


@contextmanager
def open_run(
    directory: Path,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    *,
    save: bool = False,
    access: Access = "shared",
) -> Iterator[Run]:
    """Open a run, or begin one with `recipe`. Overrides hold for this command, and are kept where it begins the run.

    A command that only reads begins none, and may go by a recipe alone, as to steer a gateway elsewhere.

    With `save` they are kept in the recipe of a run that was begun, too. An InputError inside the block puts that recipe
    back as it was: what turned out to be bad input is not kept. Of a run that it would have begun nothing is left, unless
    something was answered.

    Raises RecipeError before anything is written: for a wrong field, for a new run without a recipe, and for a run that was
    begun with another one. Raises InputError where the run is to be written `alone` and another command writes to it.
    """
    plan, is_new = _plan(directory, recipe, overrides, save, access), not directory.exists()
    with _alone(directory) if access == "alone" else nullcontext():
        if access == "alone":
            plan = _plan(directory, recipe, overrides, save, access)  # the one who wrote meanwhile may have changed it
        if access == "read":
            yield plan.run
            return
        if plan.text != plan.before:
            _write_recipe(directory / RECIPE, plan.text)
        try:
            yield plan.run
        except InputError:
            if plan.before is None and not _holds_answers(directory):
                (directory / RECIPE).unlink(missing_ok=True)
                if is_new:
                    shutil.rmtree(directory, ignore_errors=True)
            elif plan.before is not None and plan.text != plan.before:
                _write_recipe(directory / RECIPE, plan.before)
            raise


@dataclass(frozen=True)
class _Plan:
    """A run as it is opened, and what its recipe.toml is to be."""

    run: Run
    before: str | None
    text: str


def _plan(directory: Path, recipe: str | None, overrides: Sequence[str], save: bool, access: Access) -> _Plan:
    """Nothing is written yet. Raises RecipeError."""
    stored = directory / RECIPE
    before = read_text(stored) if stored.is_file() else None
    if access == "read" and save:
        raise InputError(
            f"this command only reads {directory}; give --save to one that works on the run, as `vcot eval`"
        )
    is_kept = before is None or save
    resolved = _resolve(directory, before, recipe, overrides)
    kept = resolved if is_kept else _resolve(directory, before, recipe, ())
    text = before if before is not None and not (save and overrides) else render_recipe(kept)
    changed = () if is_kept else tuple(overrides)
    return _Plan(Run(directory, resolved, kept, changed, is_read=access == "read"), before, text)


def _holds_answers(directory: Path) -> bool:
    """Whether something was paid for in the run, in time or in money."""
    path = directory / LEDGER
    if not path.is_file():
        return False
    ledger = Ledger(path)
    try:
        return not ledger.is_empty()
    finally:
        ledger.close()


def _resolve(directory: Path, before: str | None, recipe: str | None, overrides: Sequence[str]) -> Recipe:
    """The run's recipe with the overrides; nothing is written yet."""
    if before is None:
        if recipe is None:
            raise RecipeError(
                f"{directory} is not a run yet; begin it with `vcot run`, or name a recipe (--recipe nano)"
            )
        return load_recipe(recipe, overrides)
    resolved = parse_recipe(before, overrides, where=str(directory / RECIPE))
    if recipe is not None and (begun := load_recipe(recipe).name) != resolved.name:
        raise RecipeError(f"run {directory} was begun with recipe {resolved.name}, not {begun}; use another directory")
    return resolved


def _write_recipe(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_kept(path, text, parse_recipe)
    except OSError as error:
        raise InputError(f"run directory {path.parent} cannot be written ({error.strerror}); choose another") from None


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Hold the run for one writer; a second one is told so. The lock goes with the process, however it ends."""
    with _open_lock(directory) as file:
        if not try_lock(file):
            raise InputError(f"another vcot command is writing to {directory}; wait for it, or stop it")
        for folder in _WRITTEN_ALONE:
            for partial in (directory / folder).glob(PARTIAL):  # a killed command's
                if partial.is_dir():
                    shutil.rmtree(partial, ignore_errors=True)
                else:
                    partial.unlink(missing_ok=True)
        yield


def _open_lock(directory: Path) -> TextIO:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return (directory / "lock").open("w")
    except OSError as error:
        raise InputError(f"run directory {directory} cannot be written ({error.strerror}); choose another") from None
