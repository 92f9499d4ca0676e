"""An evaluation's tables as files: Markdown and LaTeX to be read, CSV and Parquet to be computed with. Pure.

Markdown has the tables and sentences of the terminal. LaTeX is the paper's Table 1: a row for each checkpoint, below each
prompt and temperature; the columns are the benchmark's, then the average. It needs the package booktabs. CSV and Parquet
hold every figure of the records in full, a column for each field (`accuracy.low`), shares in [0, 1]. The parser matrix
has a row for each log and a column for each rule. Names that others wrote
are escaped in both of the first.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from vcot.eval.evaluate import Evaluation
from vcot.eval.findings import Difference, EvalResult
from vcot.eval.matrix import Matrix, RuleResult
from vcot.eval.table import LEVEL, OVERALL, describe_family, format_half
from vcot.pipeline.markdown import plain
from vcot.pipeline.records import Interval, Record

Row = dict[str, Any]
_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
        "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\n": " ",
    }
)  # fmt: skip


def list_rows(found: Evaluation) -> dict[str, list[Row]]:
    """Each table's rows by its name; a table that the evaluation does not have is absent."""
    tables = {
        "results": [row for result in found.results for row in _list_columns(result)],
        "differences": [flatten(row) for row in found.differences],
        "breakdown": [flatten(row) for row in found.breakdown],
        "repeats": [_flatten_repeats(row.model_dump()) for row in found.repeats],
        "reliance": [flatten(row) for row in found.reliance],
        "margins": [_flatten(row.model_dump(exclude=None if row.lost else {"lost"})) for row in found.margins],
        "published": [flatten(row) for row in found.published],
    }
    return {name: rows for name, rows in tables.items() if rows} | (list_matrix(found.matrix) if found.matrix else {})


def list_matrix(found: Matrix) -> dict[str, list[Row]]:
    """The parser matrix's tables, as `list_rows`."""
    tables = {
        "matrix": [row for result in found.results for row in _list_columns(result)],
        "matrix-differences": [flatten(row) for row in found.differences],
    }
    return {name: rows for name, rows in tables.items() if rows}


def flatten(record: Record) -> Row:
    """A record's fields, those of a record within it as `outer.inner`, a tuple's as `outer.0`."""
    return _flatten(record.model_dump())


def _flatten(fields: Mapping[str, Any]) -> Row:
    row: Row = {}
    for name, value in fields.items():
        if isinstance(value, (list, tuple)):
            value = {str(number): each for number, each in enumerate(value)}
        if isinstance(value, dict):
            row |= {f"{name}.{inner}": each for inner, each in _flatten(value).items()}
        else:
            row[name] = value
    return row


def _list_columns(result: EvalResult | RuleResult) -> Iterable[Row]:
    """A row for each column of the benchmark's table."""
    fields = result.model_dump()
    accuracy = fields.pop("accuracy")
    return [_flatten({**fields, "column": column, "accuracy": interval}) for column, interval in accuracy.items()]


def _flatten_repeats(fields: dict[str, Any]) -> Row:
    passes = {f"pass_at_{each.pop('k')}": each for each in fields.pop("pass_at")}
    return _flatten(fields | passes)


def write_csv(rows: Sequence[Row]) -> str:
    """The rows as CSV with a header; the columns are those of all rows, and what a row lacks is empty."""
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, _list_fields(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def write_parquet(rows: Sequence[Row]) -> bytes:
    """The rows as a Parquet file."""
    import pyarrow as pa
    from pyarrow import parquet

    out, names = io.BytesIO(), _list_fields(rows)
    parquet.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), out)
    return out.getvalue()


def _list_fields(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def write_markdown(parts: Iterable[RenderableType]) -> str:
    """What a terminal shows, in Markdown: tables with title and caption, and sentences."""
    return "\n\n".join(_write_table(part) if isinstance(part, Table) else _read(part) for part in parts) + "\n"


def _write_table(table: Table) -> str:
    columns = [[_read(column.header), *map(_read, column.cells)] for column in table.columns]
    header, *rows = zip(*columns, strict=True)
    marks = ["---:" if column.justify == "right" else "---" for column in table.columns]
    lines = [f"| {' | '.join(cells)} |" for cells in (header, marks, *rows)]
    return "\n\n".join(filter(None, (f"**{_read(table.title or '')}**", "\n".join(lines), _read(table.caption or ""))))


def _read(part: RenderableType) -> str:
    words = (part.plain if isinstance(part, Text) else str(part or "")).split()
    return " ".join(map(plain, words))  # each by itself: `plain` cuts what is long


def write_latex(found: Evaluation, columns: Sequence[str]) -> str:
    """Table 1 in the paper's layout, in %, with half of the 95 % interval; a dagger marks a clear difference."""
    names = (*columns, OVERALL)
    lines = [
        r"% \usepackage{booktabs}",
        rf"\begin{{tabular}}{{l{'r' * len(names)}}}",
        r"\toprule",
        rf"Checkpoint & {' & '.join(_escape(name) for name in names)} \\",
    ]
    for prompt, temperature in dict.fromkeys((row.prompt, row.temperature) for row in found.results):
        lines += [
            r"\midrule",
            rf"\multicolumn{{{1 + len(names)}}}{{l}}{{\emph{{{_escape(prompt)}, temperature {temperature:g}}}}} \\",
        ]
        rows = [row for row in found.results if (row.prompt, row.temperature) == (prompt, temperature)]
        lines += [_write_row(row, names, found.differences) for row in rows]
    chance = [f"{100 * found.chance[name]:.1f}" if name in found.chance else "--" for name in names]
    lines += [r"\midrule", rf"Chance & {' & '.join(chance)} \\", r"\bottomrule", r"\end{tabular}"]
    if found.differences:
        lines.append(f"% dagger: the average differs from that of {found.differences[0].base.name}, p < {LEVEL:g}.")
        lines.append(f"% {describe_family(found.differences)}")
    return "\n".join(lines) + "\n"


def write_matrix_latex(found: Matrix) -> str:
    """The parser matrix with a column for each rule: accuracy in %, half of the 95 % interval, and how much was not read."""
    rules = list(dict.fromkeys(row.rule for row in found.results))
    lines = [
        r"% \usepackage{booktabs}; in brackets: the share, in %, in which the rule read no answer",
        rf"\begin{{tabular}}{{l{'r' * len(rules)}}}",
        r"\toprule",
        rf"Answers & {' & '.join(map(_escape, rules))} \\",
        r"\midrule",
    ]
    for log in dict.fromkeys(row.log for row in found.results):
        cells = [_write_read(row) for row in found.results if row.log == log]
        lines.append(rf"{_escape(log)} & {' & '.join(cells)} \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _write_read(row: RuleResult) -> str:
    return f"{_write_cell(row.accuracy.get(OVERALL), is_marked=False)} ({100 * row.no_answer:.1f})"


def _write_row(row: EvalResult, names: Sequence[str], differences: Sequence[Difference]) -> str:
    is_clear = any(
        d.policy == row.checkpoint and (d.prompt, d.temperature) == (row.prompt, row.temperature) and d.p_holm < LEVEL
        for d in differences
        if d.base == differences[0].base
    )
    cells = [_write_cell(row.accuracy.get(name), is_marked=is_clear and name == OVERALL) for name in names]
    return rf"{_escape(row.checkpoint.name)} & {' & '.join(cells)} \\"


def _write_cell(interval: Interval | None, *, is_marked: bool) -> str:
    if interval is None:
        return "--"
    mark = r"^\dagger" if is_marked else ""
    return rf"${100 * interval.value:.1f}{mark}\,{{\scriptstyle\pm {format_half(interval)}}}$"


def _escape(text: str) -> str:
    return text.translate(_LATEX)
