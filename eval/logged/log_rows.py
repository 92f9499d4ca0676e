"""The rows of a log file: JSON, JSON lines, CSV, TSV or Parquet, one after another, each with its place.

Model: the file's ending says what it is. A byte order mark, or a first character of two bytes, says UTF-16 or UTF-32; else
the text must be UTF-8. A row that cannot be read is a `Fault` with its place, and the rest is read; a file that cannot be
read at all is an InputError.

Limits: JSON lines, CSV, TSV and Parquet are streamed; a JSON document is read whole.
"""

from __future__ import annotations

import codecs
import csv
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from vcot.pipeline.errors import InputError

_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)
_OTHERWISE = {
    ".xlsx": "save it as CSV or TSV (VLMEvalKit writes TSV with PRED_FORMAT=tsv)",
    ".eval": "convert it with `inspect log convert --to json`",
}
_BATCH = 4096


@dataclass(frozen=True)
class Fault:
    """A row that cannot be read."""

    why: str


Row = tuple[str, Any]
"""Where it stands (`line 3`), and what it holds: a Fault, or a value as JSON has them."""


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file; of a JSON document that is no list, the document alone. Raises InputError, as above."""
    kind = path.suffix.lower()
    if not path.is_file():
        raise InputError(f"{path} is no file and no run directory; check the path")
    if kind not in _KINDS:
        remedy = _OTHERWISE.get(kind, "rename or convert it")
        raise InputError(f"{path} ends in {kind or 'nothing'}, not in {', '.join(_KINDS)}; {remedy}")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty; the tool that wrote it may have been stopped")
    try:
        yield from _KINDS[kind](path)
    except UnicodeError as error:
        raise InputError(
            f"{path} is not in UTF-8 ({error}); convert it, for example with `iconv -f LATIN1 -t UTF-8`"
        ) from None


def _find_encoding(path: Path) -> str:
    with path.open("rb") as file:
        begin = file.read(4)
    bare = {(True, False): "utf-16-le", (False, True): "utf-16-be"}.get(
        (begin[1:2] == b"\0", begin[:1] == b"\0"), "utf-8"
    )
    return next((name for mark, name in _MARKS if begin.startswith(mark)), bare)


def _read_lines(path: Path) -> Iterator[Row]:
    """JSON lines; an empty line is none."""
    with path.open(encoding=_find_encoding(path), newline="\n") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"line {number}", _load(line)


def _load(line: str) -> Any:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        return _load_python(line)


def _load_python(line: str) -> Any:
    """What `_parse` reads, or that it is no JSON."""
    try:
        return _parse(line)
    except (ValueError, RecursionError) as error:
        return Fault("is cut off" if not line.endswith("\n") else f"is no JSON ({error})")


def _parse(text: str) -> Any:
    """As Python reads and writes JSON, with a NaN where a tool computed one; half a character, which no record holds, is a
    question mark. Raises ValueError or RecursionError.
    """
    found = json.loads(text)
    if "\\ud" not in text.lower():
        return found
    return json.loads(json.dumps(found, ensure_ascii=False).encode("utf-8", "replace"))


def _read_document(path: Path) -> Iterator[Row]:
    """A list's members, or the document; a file of several lines of JSON is read as such, whatever its ending."""
    text = path.read_bytes().decode(_find_encoding(path))
    try:
        found = _parse(text)
    except (ValueError, RecursionError) as error:
        if not isinstance(_load(text.partition("\n")[0] + "\n"), dict):
            raise InputError(f"{path} is no JSON ({error}); it may be cut off, so log it again") from None
        yield from _read_lines(path)
        return
    if isinstance(found, list):
        yield from ((f"row {number}", row) for number, row in enumerate(found, 1))
    else:
        yield "the document", found


def _read_table(path: Path, delimiter: str) -> Iterator[Row]:
    """Rows by the names of the header."""
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding=_find_encoding(path), newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header = _read_fields(reader) or []
        if isinstance(header, Fault):
            raise InputError(f"{path}: its header {header.why}; write it anew")
        while (fields := _read_fields(reader)) is not None:
            if isinstance(fields, Fault):
                yield f"line {reader.line_num}", fields
            elif len(fields) == len(header):
                yield f"line {reader.line_num}", dict(zip(header, fields, strict=True))
            elif fields:
                yield f"line {reader.line_num}", Fault(f"has {len(fields)} fields, not {len(header)}")


def _read_fields(reader: Iterator[list[str]]) -> list[str] | Fault | None:
    """Those of the next row; None behind the last. After a row that is misquoted, a reader goes on with the next line."""
    try:
        return next(reader, None)
    except csv.Error as error:
        return Fault(f"is cut off or misquoted ({error})")


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa  # heavy, and of no use to a text file
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read ({' '.join(str(error).split())}); write it anew") from None


_KINDS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_lines,
    ".ndjson": _read_lines,
    ".json": _read_document,
    ".csv": lambda path: _read_table(path, ","),
    ".tsv": lambda path: _read_table(path, "\t"),
    ".parquet": _read_parquet,
}
