"""Which run a command works on, by the flags that nearly every command takes; and what other flags are short for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Target:
    """Which run a command works on."""

    run: Annotated[Path | None, Parameter(alias="-r")] = None
    """Run directory (default: runs/RECIPE); all a run makes is in it."""
    recipe: str | None = None
    """A bundled recipe (nano, nano-qwen, paper) or a .toml file; needed only to begin a run."""
    set: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative=(), show_default=False)] = ()
    """Override fields, as section.field=value, for this command; kept where it begins the run. `vcot recipe` lists them."""
    save: Annotated[bool, Parameter(negative=())] = False
    """Keep what flags override in the run's recipe.toml, for the commands that follow."""
    quiet: Annotated[bool, Parameter(alias="-q", negative=())] = False
    """Say nothing but results, warnings and errors."""
    verbose: Annotated[bool, Parameter(alias="-v", negative=())] = False
    """Also show what the run's servers and trainer write to their logs, as they write it."""


DEFAULT = Target()


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Asking:
    """Who asks what a step owes, and where they meet."""

    engine: Literal["here", "ray"] = "here"
    """Who asks what is owed: this process, or one on each node of a Ray cluster (docs/clusters.md)."""
    shards: str | None = None
    """With --engine ray: the URL of storage that all nodes reach, such as s3://BUCKET/RUN (default: the run directory)."""


HERE = Asking()


def run_directory(directory: Path | None, recipe: str | None) -> Path:
    """The run that a command works on: the one named, or runs/RECIPE."""
    return directory or Path("runs") / Path(recipe or "nano").stem


def as_source(source: str | None, path: Path | None) -> tuple[str, ...]:
    """`--source` and `--path` as overrides; a path is absolute, since the run may be used from elsewhere."""
    from vcot.services.recipes.recipe import render_value

    named = [f"tasks.source={render_value(source)}"] if source else []
    named += [f"tasks.path={render_value(str(path.expanduser().absolute()))}"] if path else []
    return tuple(named)


def as_tracker(wandb: bool) -> tuple[str, ...]:
    """`--wandb` as an override."""
    return ('train.report_to=["wandb"]',) if wandb else ()


def as_cap(max_cost: float | None) -> tuple[str, ...]:
    """`--max-cost` as an override."""
    return () if max_cost is None else (f"judge.max_cost_usd={max_cost!r}",)
