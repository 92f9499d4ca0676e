"""Which items a person wants to see, and in which order: a filter, as the address of a page says it, and what it finds."""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal
from urllib.parse import urlencode

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from pipeline.errors import InputError
from pipeline.files import explain
from pipeline.records import Record
from services.view.index import ITEM, SHIFT, Index, Item

PAGE_SIZE = 50
_MAX_KEPT = 64
"""Arrays of a byte an item, and a few of eight."""
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


class Masks:
    """Which items each condition lets through, as arrays by item number, kept while the index stays as it is.

    Safe to use from several threads.
    """

    def __init__(self, index: Index) -> None:
        self._index = index
        self._lock = threading.Lock()
        self._version: object = None
        self._kept: OrderedDict[tuple[str, ...], NDArray[Any]] = OrderedDict()

    def read(self, query: str, values: Sequence[Any] = ()) -> NDArray[np.bool_]:
        """True for each item whose number the query gives."""

        def make() -> NDArray[Any]:
            size = self._index.rows("SELECT coalesce(max(num), 0) + 1 FROM items") or [(1,)]
            mask = np.zeros(size[0][0], dtype=np.bool_)
            mask[self._numbers(query, values)] = True
            return mask

        return self._find((query, *map(str, values)), make)

    def order(self, sort: Sort) -> NDArray[np.int64]:
        """The items that have what is sorted by, the lowest first, and those with the same in the order of the run."""
        column = _COLUMNS[sort]
        query = f"SELECT num FROM items WHERE {column} IS NOT NULL ORDER BY {column}, num"  # noqa: S608 - our own names
        return self._find((query,), lambda: self._numbers(query, ()))

    def _numbers(self, query: str, values: Sequence[Any]) -> NDArray[np.int64]:
        """What a query gives, in its order: as one text, which is read four times as fast as so many rows."""
        found = self._index.rows(f"SELECT group_concat(num) FROM ({query})", values)  # noqa: S608 - our own queries
        return np.fromstring(found[0][0] if found and found[0][0] else "", dtype=np.int64, sep=",")

    def _find(self, key: tuple[str, ...], make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        with self._lock:
            version = self._index.version
            if version != self._version:
                self._kept.clear()
                self._version = version
            if key not in self._kept:
                self._kept[key] = make()
            self._kept.move_to_end(key)
            while len(self._kept) > _MAX_KEPT:
                self._kept.popitem(last=False)
            return self._kept[key]


@dataclass(frozen=True)
class Finder:
    """Finds items."""

    index: Index
    masks: Masks
    labelled: Collection[tuple[str, str]] = ()
    """(part, task) of those that a person said something of."""

    def find(self, wanted: Filter) -> Listed:
        """One page of them, and how many there are."""
        numbers = self._list(wanted)
        return Listed(self._read(numbers[PAGE_SIZE * (wanted.page - 1) :][:PAGE_SIZE]), len(numbers))

    def beside(self, wanted: Filter, item: Item) -> tuple[Item | None, Item | None]:
        """Those before and after an item, in the filter's order."""
        numbers = self._list(wanted)
        (places,) = np.nonzero(numbers == item.num)
        if not len(places):
            return None, None
        place = int(places[0])
        before, after = self._read(numbers[max(0, place - 1) : place]), self._read(numbers[place + 1 : place + 2])
        return (before[0] if before else None), (after[0] if after else None)

    def _read(self, numbers: NDArray[np.int64]) -> list[Item]:
        marks = ", ".join("?" * len(numbers))
        rows = self.index.rows(f"SELECT {ITEM} FROM items WHERE num IN ({marks})", numbers.tolist())  # noqa: S608 - marks
        by_number = {row[0]: Item(*row) for row in rows}
        return [by_number[number] for number in numbers.tolist() if number in by_number]

    def _list(self, wanted: Filter) -> NDArray[np.int64]:
        """Numbers of all that are let through, in order."""
        numbers = self.masks.order(wanted.sort)
        for query, values in _list_queries(wanted):
            mask = self.masks.read(query, values)
            numbers = numbers[numbers < len(mask)]  # some may have come meanwhile
            numbers = numbers[mask[numbers]]
        if wanted.label:
            given = json.dumps([list(pair) for pair in sorted(self.labelled)])
            query = "SELECT num FROM items WHERE (part, task) IN (SELECT value ->> 0, value ->> 1 FROM json_each(?))"
            said = [number for (number,) in self.index.rows(query, [given])]
            numbers = numbers[np.isin(numbers, said, invert=wanted.label == "no")]
        return numbers[::-1] if wanted.down else numbers


def _list_queries(wanted: Filter) -> Iterator[tuple[str, list[Any]]]:
    """What must be true of an item, each as the numbers of those of which it is."""
    if wanted.part:
        yield "SELECT num FROM items WHERE part = ?", [wanted.part]
    for mark in _list_marks(wanted):
        yield "SELECT num FROM marks WHERE mark = (SELECT id FROM names WHERE name = ?)", [mark]
    low, high = wanted.low, wanted.high
    if low is not None and high is not None:
        yield "SELECT DISTINCT num FROM scores WHERE score BETWEEN ? AND ?", [low, high]
    elif low is not None:
        yield "SELECT num FROM items WHERE best >= ?", [low]
    elif high is not None:
        yield "SELECT num FROM items WHERE worst <= ?", [high]
    for word in wanted.words:
        yield "SELECT rowid >> ? AS num FROM texts WHERE texts MATCH ?", [SHIFT, f'"{word.casefold()}"']


def _list_marks(wanted: Filter) -> Iterator[str]:
    if wanted.subject:
        yield f"subject|{wanted.subject}"
    if wanted.mark:
        yield wanted.mark
    if wanted.outcome:
        yield f"{wanted.outcome}|{wanted.checkpoint or '*'}|{wanted.setting or '*'}"
