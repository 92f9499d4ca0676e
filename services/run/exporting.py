"""`vcot export`: a run's tables as files, a file each, written some rows at a time and put in place when it is whole."""

from __future__ import annotations

import csv
import json
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal

import orjson

from vcot.pipeline.errors import InputError
from vcot.services.run.frames import Cells, Rows

Format = Literal["parquet", "jsonl", "csv"]


def write_table(rows: Rows, folder: Path, kind: Format) -> tuple[Path, int]:
    """Write `<folder>/<table>.<kind>`, in place of what was there; the file and how many rows it has.

    Raises InputError where it cannot be written, and what reading the run raises; the file is then as it was.
    """
    path = folder / f"{rows.name}.{kind}"
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")  # not that of another export
    try:
        folder.mkdir(parents=True, exist_ok=True)
        num_rows = _WRITERS[kind](rows, partial)
        partial.replace(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); choose another --out") from None
    finally:
        with suppress(OSError):
            partial.unlink()
    return path, num_rows


def _write_parquet(rows: Rows, path: Path) -> int:
    import pyarrow.parquet as pq

    num_rows = 0
    with pq.ParquetWriter(path, rows.schema) as writer:
        for batch in rows.batches():
            writer.write_batch(batch)
            num_rows += batch.num_rows
    return num_rows


def _write_jsonl(rows: Rows, path: Path) -> int:
    num_rows = 0
    with path.open("wb") as file:
        for row in rows:
            file.write(orjson.dumps(_order(row, rows), option=orjson.OPT_APPEND_NEWLINE))
            num_rows += 1
    return num_rows


def _write_csv(rows: Rows, path: Path) -> int:
    """A list as JSON in its cell; what there is none of is an empty cell."""
    num_rows = 0
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(rows.columns)
        for row in rows:
            values = _order(row, rows).values()
            writer.writerow([json.dumps(v, ensure_ascii=False) if isinstance(v, list | tuple) else v for v in values])
            num_rows += 1
    return num_rows


def _order(row: Cells, rows: Rows) -> Cells:
    """The row's columns, as the table has them."""
    return {name: row.get(name) for name in rows.columns}


_WRITERS: Mapping[Format, Callable[[Rows, Path], int]] = {
    "parquet": _write_parquet, "jsonl": _write_jsonl, "csv": _write_csv,
}  # fmt: skip
