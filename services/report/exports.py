"""The tables and figures of an evaluation, or of a parser matrix, as files (eval/table_files.py), each figure as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import RenderableType

from vcot.eval.evaluate import Evaluation
from vcot.eval.matrix import Matrix
from vcot.eval.matrix_table import render_matrix
from vcot.eval.table import OVERALL
from vcot.eval.table_files import (
    Row,
    list_matrix,
    list_rows,
    write_csv,
    write_latex,
    write_markdown,
    write_matrix_latex,
    write_parquet,
)
from vcot.pipeline.files import replace_file
from vcot.services.report import figures


def write_exports(
    found: Evaluation, parts: Sequence[RenderableType], columns: Sequence[str], folder: Path
) -> list[str]:
    """Write all of them, each in one step, and return their names; `parts` is what the terminal shows."""
    texts = {"table-1.tex": write_latex(found, columns)}
    texts |= {f"{name}.svg": figures.standalone(svg) for name, svg in _draw(found).items()}
    if found.matrix is not None:
        parts = [*parts, *render_matrix(found.matrix, columns)]
        texts["matrix.tex"] = write_matrix_latex(found.matrix)
    return _write(parts, list_rows(found), texts, folder)


def write_matrix(found: Matrix, parts: Sequence[RenderableType], folder: Path) -> list[str]:
    """The same of a parser matrix by itself."""
    return _write(parts, list_matrix(found), {"matrix.tex": write_matrix_latex(found)}, folder)


def _write(
    parts: Sequence[RenderableType], tables: Mapping[str, Sequence[Row]], texts: Mapping[str, str], folder: Path
) -> list[str]:
    files: dict[str, str | bytes] = {"tables.md": write_markdown(parts), **texts}
    for name, rows in tables.items():
        files |= {f"{name}.csv": write_csv(rows), f"{name}.parquet": write_parquet(rows)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        replace_file(folder / name, content)
    return list(files)


def _draw(found: Evaluation) -> dict[str, str]:
    drawn = {}
    if any(OVERALL in row.accuracy for row in found.results):
        drawn["accuracy"] = figures.draw_accuracy(found.results, found.chance[OVERALL])
    if found.differences:
        drawn["differences"] = figures.draw_differences(found.differences)
    if found.reliance:
        drawn["reliance"] = figures.draw_reliance(found.reliance)
    if found.margins:
        drawn["margins"] = figures.draw_margins(found.margins)
    return drawn
