"""`vcot score`: the parser matrix of logs and runs, in the terminal or as JSON."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from vcot.eval.eval_section import EvalSection
from vcot.eval.logged.layouts import Fields
from vcot.eval.matrix_table import render_matrix
from vcot.eval.rules import RULES
from vcot.pipeline.errors import InputError
from vcot.pipeline.files import explain
from vcot.pipeline.records import Split
from vcot.pipeline.report import Found, Said
from vcot.services.cli.terminal import Terminal
from vcot.services.report.exports import write_matrix
from vcot.services.run.scoring import Scoring
from vcot.services.run.scoring import score as score_logs

ALL = "all"


def show(
    files: Sequence[Path],
    benchmark: str | None,
    split: Split,
    path: str | None,
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
    section = _name_benchmark(benchmark, split, path) if benchmark else None
    named = tuple(RULES.built_ins) if ALL in rules else tuple(dict.fromkeys(rules))
    asyncio.run(_show(Scoring(files, section, named, Fields(*fields), is_repeated), tables, as_json=as_json))


def _name_benchmark(benchmark: str, split: Split, path: str | None) -> EvalSection:
    try:
        return EvalSection(benchmark=benchmark, split=split, path=path)
    except ValidationError as error:
        raise InputError(f"--benchmark: {explain(error)}") from None


async def _show(asked: Scoring, tables: Path | None, *, as_json: bool) -> None:
    terminal = Terminal()
    found, benchmark = await score_logs(asked, terminal)
    parts = render_matrix(found, benchmark.columns)
    if as_json:
        terminal(Found(json.dumps(found.model_dump(mode="json"), indent=1)))  # ASCII: a terminal may be behind it
    else:
        for part in parts:
            terminal(Found(part))
    if tables is not None:
        terminal(Said(f"{tables}: {', '.join(write_matrix(found, parts, tables))}"))
