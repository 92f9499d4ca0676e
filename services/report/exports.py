"""The tables and figures of an evaluation as files in a folder: what eval/table_files.py writes, and each figure as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import RenderableType

from eval.evaluate import Evaluation
from eval.table import OVERALL
from eval.table_files import list_rows, write_csv, write_latex, write_markdown, write_parquet
from pipeline.files import replace_file
from services.report import figures


def write_exports(
    found: Evaluation, parts: Sequence[RenderableType], columns: Sequence[str], folder: Path
) -> list[str]:
    """Write all of them, each in one step, and return their names; `parts` is what the terminal shows."""
    texts: dict[str, str | bytes] = {"tables.md": write_markdown(parts), "table-1.tex": write_latex(found, columns)}
    for name, rows in list_rows(found).items():
        texts |= {f"{name}.csv": write_csv(rows), f"{name}.parquet": write_parquet(rows)}
    texts |= {f"{name}.svg": figures.standalone(svg) for name, svg in _draw(found).items()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        replace_file(folder / name, text)
    return list(texts)


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
