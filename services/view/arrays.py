"""The index's columns: what a list is ordered by and what a filter lets through, as arrays over all items.

Model: a column is one value in the index's file, so that a filter that nobody asked for before costs one read of some
kilobytes, however many items there are. Numbers of items are int32; a mask has a bit for each number, from 0.

    order|KEY            numbers of the items that have what is sorted by, the lowest first, equals in the run's order
    part|SLUG            masks of the items of a part, and
    mark|MARK            of those that carry a mark
    scores, scored       all scores in ascending order, float64, and beside each the number of its item
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vcot.services.view.index import Facets, Index, Part, note

Mask = NDArray[np.bool_]
Numbers = NDArray[np.int32]
SORTS: Mapping[str, str] = {
    "order": "num", "best": "best", "worst": "worst", "spread": "spread", "lost": "num_lost",
}  # fmt: skip
"""What a list can be ordered by, and the items' column of it."""


def write_columns(connection: sqlite3.Connection, parts: tuple[Part, ...]) -> None:
    """Make all columns anew of what the items are now, and `facets`, which names them."""
    marks = dict(_list_marks(connection))
    columns = dict(_list_orders(connection)) | dict(_list_scores(connection))
    masks = {f"part|{part.slug}": _find_part(connection, part.slug) for part in parts}
    masks |= {f"mark|{name}": mask for name, mask in marks.items()}
    columns |= {name: np.packbits(mask, bitorder="little") for name, mask in masks.items()}
    facets = Facets(parts=parts, marks={name: int(mask.sum()) for name, mask in marks.items()})
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("DELETE FROM columns")
    bodies = ((name, column.tobytes()) for name, column in columns.items())
    connection.executemany("INSERT INTO columns VALUES (?, ?)", bodies)
    note(connection, "facets", facets.model_dump_json())
    connection.execute("COMMIT")


def _list_orders(connection: sqlite3.Connection) -> Iterator[tuple[str, NDArray[Any]]]:
    for key, column in SORTS.items():
        query = f"SELECT num, {column} FROM items WHERE {column} IS NOT NULL"  # noqa: S608 - our own names
        numbers, values = _read(connection, query)
        yield f"order|{key}", numbers[np.lexsort((numbers, values))]


def _list_scores(connection: sqlite3.Connection) -> Iterator[tuple[str, NDArray[Any]]]:
    numbers, scores = _read(connection, "SELECT num, score FROM scores")
    order = np.argsort(scores, kind="stable")
    yield "scores", scores[order]
    yield "scored", numbers[order]


def _list_marks(connection: sqlite3.Connection) -> Iterator[tuple[str, Mask]]:
    for number, name in connection.execute("SELECT id, name FROM names ORDER BY name").fetchall():
        found = connection.execute("SELECT group_concat(num) FROM marks WHERE mark = ?", (number,)).fetchone()
        if found[0]:
            yield name, as_mask(parse_numbers(found[0]))


def _find_part(connection: sqlite3.Connection, slug: str) -> Mask:
    found = connection.execute("SELECT group_concat(num) FROM items WHERE part = ?", (slug,)).fetchone()
    return as_mask(parse_numbers(found[0]))


def _read(connection: sqlite3.Connection, query: str) -> tuple[Numbers, NDArray[np.float64]]:
    """A query's two columns: numbers of items, and values."""
    rows = connection.execute(query).fetchall()
    numbers, values = zip(*rows, strict=True) if rows else ((), ())
    return np.array(numbers, dtype=np.int32), np.array(values, dtype=np.float64)


def parse_numbers(listed: str | None) -> Numbers:
    """What `group_concat` gives, which is read four times as fast as so many rows."""
    return np.fromstring(listed or "", dtype=np.int32, sep=",")


def as_mask(numbers: Numbers) -> Mask:
    """True for each of those items."""
    mask = np.zeros(int(numbers.max()) + 1 if len(numbers) else 0, dtype=np.bool_)
    mask[numbers] = True
    return mask


def read_numbers(index: Index, name: str) -> Numbers:
    """A column of numbers; empty where there is none of that name."""
    return np.frombuffer(_body(index, name), np.int32)


def read_mask(index: Index, name: str) -> Mask:
    """A mask; empty, which lets nothing through, where there is none of that name."""
    return np.unpackbits(np.frombuffer(_body(index, name), np.uint8), bitorder="little").astype(np.bool_)


def read_scored(index: Index, low: float | None, high: float | None) -> Mask:
    """The items with a score from `low` to `high`."""
    scores = np.frombuffer(_body(index, "scores"), np.float64)
    first = 0 if low is None else int(np.searchsorted(scores, low, "left"))
    last = len(scores) if high is None else int(np.searchsorted(scores, high, "right"))
    return as_mask(read_numbers(index, "scored")[first:last])


def _body(index: Index, name: str) -> bytes:
    found = index.rows("SELECT body FROM columns WHERE name = ?", (name,))
    return bytes(found[0][0]) if found else b""
