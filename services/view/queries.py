"""Which items a person wants to see, and in which order: a filter, as the address of a page says it, and as SQL."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal
from urllib.parse import urlencode

from pydantic import Field, ValidationError

from pipeline.errors import InputError
from pipeline.files import explain
from pipeline.records import Record
from services.view.index import ITEM, SHIFT, Index, Item

PAGE = 50
Sort = Literal["order", "best", "worst", "spread", "lost"]
_COLUMNS: Mapping[Sort, str] = {
    "order": "num", "best": "best", "worst": "worst", "spread": "spread", "lost": "num_lost",
}  # fmt: skip
_WORD = re.compile(r"[^\W_]+")
"""As the index takes texts apart."""


class Filter(Record):
    """What is looked for; what is empty lets everything through."""

    part: str = ""
    subject: str = ""
    outcome: str = ""
    """`correct`, `incorrect`, `no_answer` or `failed`; `lost` or `gained` against the base."""
    checkpoint: str = ""
    setting: str = ""
    """Prompt and temperature: with `checkpoint`, whose outcome is meant."""
    mark: str = ""
    """Why something is missing, or whether there is a pair, as `kind|reason`."""
    low: float | None = None
    """With `high`: a response scores from this to that."""
    high: float | None = None
    text: str = ""
    """Words that all occur in question, options, responses or rationales."""
    label: Literal["", "yes", "no"] = ""
    sort: Sort = "order"
    down: bool = False
    """The highest first."""
    page: Annotated[int, Field(ge=1)] = 1

    @property
    def query(self) -> str:
        """As an address says it, without the page."""
        fields = self.model_dump(exclude={"page"}, exclude_defaults=True)
        return urlencode({name: "1" if value is True else value for name, value in fields.items()})

    @property
    def words(self) -> list[str]:
        """Those of `text`."""
        return _WORD.findall(self.text)


def read_filter(query: Mapping[str, str]) -> Filter:
    """The filter that an address says; fields that are empty, or of something else, are left out.

    Raises InputError, naming the field.
    """
    fields = {name: value for name in Filter.model_fields if (value := query.get(name, "").strip())}
    try:
        wanted = Filter.model_validate(fields)
    except ValidationError as error:
        raise InputError(f"this filter cannot be read ({explain(error)}); change that field") from None
    if wanted.text and not wanted.words:
        raise InputError(f"there is no word in {wanted.text!r}; texts are searched for words")
    return wanted


@dataclass(frozen=True)
class Listed:
    """One page of what was found."""

    items: list[Item]
    total: int


class Finder:
    """Finds items. `labelled` are the (part, task) of those that a person said something of."""

    def __init__(self, index: Index, labelled: Collection[tuple[str, str]] = ()) -> None:
        self._index = index
        self._labelled = json.dumps([list(pair) for pair in sorted(labelled)])

    def count(self, wanted: Filter) -> int:
        """How many there are."""
        where, values = self._where(wanted)
        found = self._index.rows(f"SELECT count(*) FROM items WHERE {where}", values)  # noqa: S608 - our own names
        return int(found[0][0]) if found else 0

    def page(self, wanted: Filter) -> list[Item]:
        """One page of them."""
        where, values = self._where(wanted)
        query = f"SELECT {ITEM} FROM items WHERE {where} ORDER BY {_order(wanted)} LIMIT ? OFFSET ?"  # noqa: S608
        return [Item(*row) for row in self._index.rows(query, [*values, PAGE, PAGE * (wanted.page - 1)])]

    def beside(self, wanted: Filter, item: Item) -> tuple[Item | None, Item | None]:
        """Those before and after an item, in the filter's order."""
        return self._next(wanted, item, is_back=True), self._next(wanted, item, is_back=False)

    def _next(self, wanted: Filter, item: Item, *, is_back: bool) -> Item | None:
        where, values = self._where(wanted)
        column, is_down = _COLUMNS[wanted.sort], wanted.down != is_back
        sign = "<" if is_down else ">"
        if column == "num":
            beyond, place = f"num {sign} ?", [item.num]
        else:
            ((value,),) = self._index.rows(f"SELECT {column} FROM items WHERE num = ?", (item.num,)) or [(None,)]  # noqa: S608
            if value is None:  # they come last, by number
                return None
            beyond, place = f"({column}, num) {sign} (?, ?)", [value, item.num]
        order = f"{column} {'DESC' if is_down else 'ASC'}, num {'DESC' if is_down else 'ASC'}"
        query = f"SELECT {ITEM} FROM items WHERE {where} AND {beyond} ORDER BY {order} LIMIT 1"  # noqa: S608
        found = self._index.rows(query, [*values, *place])
        return Item(*found[0]) if found else None

    def _where(self, wanted: Filter) -> tuple[str, list[Any]]:
        clauses: list[str] = []
        values: list[Any] = []
        for clause, given in self._clauses(wanted):
            clauses.append(clause)
            values += given
        return " AND ".join(clauses) or "1", values

    def _clauses(self, wanted: Filter) -> Iterator[tuple[str, list[Any]]]:
        if wanted.part:
            yield "part = ?", [wanted.part]
        for mark in _list_marks(wanted):
            yield "num IN (SELECT num FROM marks WHERE mark = (SELECT id FROM names WHERE name = ?))", [mark]
        yield from _score_clauses(wanted)
        if wanted.sort not in ("order", "lost"):
            yield f"{_COLUMNS[wanted.sort]} IS NOT NULL", []
        for word in wanted.words:
            yield "num IN (SELECT rowid >> ? FROM texts WHERE texts MATCH ?)", [SHIFT, f'"{word}"']
        if wanted.label:
            is_in = "IN" if wanted.label == "yes" else "NOT IN"
            given = "SELECT value ->> 0, value ->> 1 FROM json_each(?)"
            yield f"(part, task) {is_in} ({given})", [self._labelled]


def _order(wanted: Filter) -> str:
    direction = "DESC" if wanted.down else "ASC"
    column = _COLUMNS[wanted.sort]
    return f"num {direction}" if column == "num" else f"{column} {direction}, num {direction}"


def _list_marks(wanted: Filter) -> Iterator[str]:
    if wanted.subject:
        yield f"subject|{wanted.subject}"
    if wanted.mark:
        yield wanted.mark
    if wanted.outcome:
        yield f"{wanted.outcome}|{wanted.checkpoint or '*'}|{wanted.setting or '*'}"


def _score_clauses(wanted: Filter) -> Iterator[tuple[str, list[Any]]]:
    """A response within the bounds. Best and worst alone decide about one bound; of two they spare a look at each score."""
    if wanted.low is not None:
        yield "best >= ?", [wanted.low]
    if wanted.high is not None:
        yield "worst <= ?", [wanted.high]
    if wanted.low is not None and wanted.high is not None:
        query = "SELECT 1 FROM scores WHERE scores.num = items.num AND score BETWEEN ? AND ?"
        yield f"EXISTS ({query})", [wanted.low, wanted.high]
