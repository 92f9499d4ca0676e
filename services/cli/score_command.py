"""`vcot score`: the parser matrix of logs and runs, in the terminal or as JSON."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from vcot.eval.eval_section import EvalSection
from vcot.eval.logged.layouts import Fields
from vcot.eval.matrix_table import render_matrix
from vcot.eval.rules import RULES
from vcot.pipeline.errors import InputError
from vcot.pipeline.files import explain
from vcot.pipeline.records import Split
from vcot.pipeline.report import Said, tell
from vcot.services.cli.terminal import Terminal
from vcot.services.report.exports import write_matrix
from vcot.services.run.scoring import Scoring
from vcot.services.run.scoring import score as score_logs

ALL = "all"


@dataclass(frozen=True)
class Asked:
    """Which questions the files answer, as the flags say."""

    benchmark: str | None
    split: Split
    path: Path | None
    columns: Sequence[str]
    """Of one's own table, each as field=column."""


def show(
    files: Sequence[Path],
    asked: Asked,
    rules: Sequence[str],
    fields: tuple[str | None, str | None],
    *,
    is_repeated: bool,
    tables: Path | None,
    as_json: bool,
) -> None:
    """Score, and print what was found."""
    if not files:
        raise InputError("name a log file or a run directory, as in vcot score answers.jsonl --benchmark scienceqa")
    section = _name_benchmark(asked) if asked.benchmark else None
    named = tuple(RULES.built_ins) if ALL in rules else tuple(dict.fromkeys(rules))
    asyncio.run(_show(Scoring(files, section, named, Fields(*fields), is_repeated), tables, as_json=as_json))


def _name_benchmark(asked: Asked) -> EvalSection:
    fields = {"benchmark": asked.benchmark, "split": asked.split, "path": asked.path and str(asked.path)}
    if unnamed := [each for each in asked.columns if "=" not in each]:
        raise InputError(f"--columns {unnamed[0]} names no column; write it as question=q")
    columns = {field: name for field, _, name in (each.partition("=") for each in asked.columns)}
    try:
        return EvalSection.model_validate(fields | {"columns": columns or None})
    except ValidationError as error:
        flag = "--columns" if error.errors()[0]["loc"][0] == "columns" else "--benchmark"
        raise InputError(f"{flag}: {explain(error)}") from None


async def _show(asked: Scoring, tables: Path | None, *, as_json: bool) -> None:
    terminal = Terminal(as_json=as_json)
    found, benchmark = await score_logs(asked, terminal)
    parts = render_matrix(found, benchmark.columns)
    tell(terminal, parts, found)
    if tables is not None:
        terminal(Said(f"{tables}: {', '.join(write_matrix(found, parts, tables))}"))
