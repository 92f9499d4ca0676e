"""A run directory: everything that one run asked, was answered, trained and measured.

recipe.toml          the recipe with its overrides
ledger.sqlite        responses, judgments and scores (pipeline/ledger.py)
tasks/<key>.jsonl    the questions, as loaded once from their source
images/              their images, by content
pairs/<key>/         train.parquet, validation.parquet and the data card
checkpoints/<name>/  merged checkpoints, and the base's manifest
training/<key>/      the worker's job directory (training/job.py)
report/              the page and its data
logs/                one file per process
serving.json         where the run's gateway answers, while one runs
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pipeline.errors import InputError, RecipeError
from pipeline.files import write_kept
from pipeline.images import ImageStore
from pipeline.ledger import Ledger
from pipeline.recipe import Recipe, load_recipe, parse_recipe, render_recipe

RECIPE = "recipe.toml"


@dataclass(frozen=True)
class Run:
    """An opened run; its parts are made when first used."""

    directory: Path
    recipe: Recipe

    @cached_property
    def images(self) -> ImageStore:
        """The run's image store."""
        return ImageStore(self.directory)

    @cached_property
    def ledger(self) -> Ledger:
        """The run's ledger."""
        return Ledger(self.directory / "ledger.sqlite")

    def path(self, *parts: str) -> Path:
        """A path in the run, with its parent folder made."""
        path = self.directory.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


@contextmanager
def open_run(directory: Path, recipe: str | None = None, overrides: Sequence[str] = ()) -> Iterator[Run]:
    """Open a run, or begin one with `recipe`. Overrides are kept in the run's own recipe.

    An InputError inside the block puts the recipe back as it was: what turned out to be bad input is not kept. Of a run that
    it would have begun nothing is left, unless something was answered.

    Raises RecipeError before anything is written: for a wrong field, for a new run without a recipe, and for a run that was
    begun with another one.
    """
    stored, is_new = directory / RECIPE, not directory.exists()
    before = stored.read_text("utf-8") if stored.is_file() else None
    resolved = _resolve(directory, before, recipe, overrides)
    text = render_recipe(resolved)
    if text != before:
        _write_recipe(stored, text)
    try:
        yield Run(directory, resolved)
    except InputError:
        if before is None and not _holds_answers(directory):
            stored.unlink(missing_ok=True)
            if is_new:
                shutil.rmtree(directory, ignore_errors=True)
        elif before is not None and text != before:
            _write_recipe(stored, before)
        raise


def _holds_answers(directory: Path) -> bool:
    """Whether something was paid for in the run, in time or in money."""
    path = directory / "ledger.sqlite"
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
def exclusive(run: Run) -> Iterator[None]:
    """Hold the run for one writer; a second one is told so. The lock goes with the process, however it ends."""
    with run.path("lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another vcot command is writing to {run.directory}; wait for it, or stop it") from None
        for folder in ("images", "tasks"):
            for partial in (run.directory / folder).glob("*.partial"):  # a killed command's
                partial.unlink(missing_ok=True)
        yield
