"""The commands that are no step of a run, under Tools: their names and help, as in services/cli/names.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from vcot.services.cli.flags import FileFormat, Flag, Json, Tables
from vcot.services.cli.target import DEFAULT, Target


def doctor(target: Target = DEFAULT, *, json: Json = False) -> None:
    """Say what this machine can run, and what is missing for a recipe."""
    from vcot.services.cli import machine_commands

    if not machine_commands.doctor(target, as_json=json):
        sys.exit(2)


def recipe(name: str = "nano", *, set: tuple[str, ...] = ()) -> None:  # noqa: A002 - the flag's name
    """Print a recipe with every field's documentation.

    Parameters
    ----------
    name
        A bundled recipe or a .toml file.
    set
        Overrides, as section.field=value.

    """
    from vcot.services.recipes.recipe import load_recipe, render_recipe

    sys.stdout.write(render_recipe(load_recipe(name, set)))


def export(run: Path | None = None, *, out: Path, kind: FileFormat = "parquet") -> None:
    """Write a run's tasks, all its responses with scores and rationales, judgments, pairs and evaluations as files.

    Parameters
    ----------
    run
        Run directory (default: runs/nano); it is only read.
    out
        The folder for the files; those of an earlier export are replaced.
    kind
        Of the files: parquet, jsonl or csv.

    """
    from vcot.services.cli import export_command, opening

    opening.execute("export", Target(run=run), lambda session: export_command.export(session, out, kind))


def probe(*checkpoints: str, target: Target = DEFAULT, json: Json = False) -> None:
    """Ask about drawings of unusual things, such as a green stop sign: whether a model says what it sees or what it expects.

    Parameters
    ----------
    checkpoints
        Names of registered checkpoints (default: the base and the recipe's policy, if it is trained).

    """
    from vcot.services.cli import commands, opening

    opening.execute("probe", target, lambda session: commands.probe(session, checkpoints), as_json=json)


def score(
    *files: Path,
    benchmark: str | None = None,
    split: Literal["train", "validation", "test"] = "test",
    path: Path | None = None,
    columns: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative=())] = (),
    rules: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative=())] = ("vcot",),
    id: str | None = None,  # noqa: A002 - the flag's name
    text: str | None = None,
    repeated: Flag = False,
    tables: Tables = None,
    json: Json = False,
) -> None:
    """Score what other tools logged, or a run holds, under the rules of several harnesses, and compare the files.

    Parameters
    ----------
    files
        Logs (JSON, JSON lines, CSV, TSV, Parquet), or run directories.
    benchmark
        What the logs answer: scienceqa, aokvqa or one of your own; a run has its own.
    split
        The benchmark's split.
    path
        The data set's official on-disk layout; without it, the hub's copy is read.
    columns
        For --benchmark table: which column of your file holds what, as question=q choices= answer=a.
    rules
        How options are read: all, or some of vcot, scienceqa, llava, lmms_eval, vlmevalkit, inspect, or one of your own;
        answers in words are scored by the benchmark's own rule.
    id
        The field with the question's id, where it has no usual name; a dot goes into nested ones.
    text
        The field with the response.
    repeated
        Rows with the same id are several responses to the question; else the first of them counts.

    """
    from vcot.services.cli import score_command

    place = None if path is None else path.expanduser().absolute()
    asked = score_command.Asked(benchmark, split, place, columns)
    score_command.show(files, asked, rules, (id, text), is_repeated=repeated, tables=tables, as_json=json)
