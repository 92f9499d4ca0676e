"""Which items a person wants to see, and in which order: a filter, as the address of a page says it, and what it finds."""

from __future__ import annotations

import json
import re
import threading
import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal
from urllib.parse import urlencode

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from vcot.pipeline.errors import InputError
from vcot.pipeline.files import explain
from vcot.pipeline.records import Record
from vcot.services.view.arrays import Mask, Numbers, as_mask, parse_numbers, read_mask, read_numbers, read_scored
from vcot.services.view.index import ITEM, SHIFT, Index, Item

PAGE_SIZE = 50
_MAX_KEPT = 64
"""Arrays of a byte an item, and a few of eight."""
Sort = Literal["order", "best", "worst", "spread", "lost"]
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
        """Those of `text`; an accent may be written as a sign of its own."""
        return _WORD.findall(unicodedata.normalize("NFC", self.text))


def read_filter(query: Mapping[str, str]) -> Filter:
    """The filter that an address says; fields that are empty, or of something else, are left out.

    Raises InputError, naming the field.
    """
    fields = {name: value for name in Filter.model_fields if (value := query.get(name, "")).strip()}
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


class Kept:
    """What was read of the index, kept while the index stays as it is. Safe to use from several threads."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._lock = threading.Lock()
        self._version: object = None
        self._kept: OrderedDict[tuple[object, ...], NDArray[Any]] = OrderedDict()

    def find(self, key: tuple[object, ...], make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """The array of that key; made where there is none."""
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
    kept: Kept
    labelled: Collection[tuple[str, str]] = ()
    """(part, task) of those that a person said something of."""

    def find(self, wanted: Filter) -> Listed:
        """One page of them, and how many there are."""
        numbers = self._list(wanted)
        return Listed(self.read(numbers[PAGE_SIZE * (wanted.page - 1) :][:PAGE_SIZE]), len(numbers))

    def beside(self, wanted: Filter, item: Item) -> tuple[Item | None, Item | None]:
        """Those before and after an item, in the filter's order."""
        numbers = self._list(wanted)
        (places,) = np.nonzero(numbers == item.num)
        if not len(places):
            return None, None
        place = int(places[0])
        before, after = self.read(numbers[max(0, place - 1) : place]), self.read(numbers[place + 1 : place + 2])
        return (before[0] if before else None), (after[0] if after else None)

    def read(self, numbers: Numbers) -> list[Item]:
        """The items of those numbers, in that order."""
        query = f"SELECT {ITEM} FROM items WHERE num IN (SELECT value FROM json_each(?))"  # noqa: S608 - our own names
        rows = self.index.rows(query, [json.dumps(numbers.tolist())])
        by_number = {row[0]: Item(*row) for row in rows}
        return [by_number[number] for number in numbers.tolist() if number in by_number]

    def _list(self, wanted: Filter) -> Numbers:
        """Numbers of all that are let through, in order."""
        numbers = self.kept.find(("order", wanted.sort), lambda: read_numbers(self.index, f"order|{wanted.sort}"))
        for key, make in self._list_masks(wanted):
            mask = self.kept.find(key, make)
            numbers = numbers[numbers < len(mask)]
            numbers = numbers[mask[numbers]]
        if wanted.label:
            numbers = numbers[np.isin(numbers, self._find_labelled(), invert=wanted.label == "no")]
        return numbers[::-1] if wanted.down else numbers

    def _list_masks(self, wanted: Filter) -> Iterator[tuple[tuple[object, ...], Callable[[], Mask]]]:
        """What an item must be among, each with what it is kept under."""
        names = [f"part|{wanted.part}"] if wanted.part else []
        for name in (*names, *(f"mark|{mark}" for mark in _list_marks(wanted))):
            yield (name,), partial(read_mask, self.index, name)
        if wanted.low is not None or wanted.high is not None:
            yield ("scored", wanted.low, wanted.high), partial(read_scored, self.index, wanted.low, wanted.high)
        if wanted.words:
            yield ("words", *wanted.words), partial(self._search, wanted.words)

    def _search(self, words: Sequence[str]) -> Mask:
        """The items in whose texts all of the words occur: the last row of an item's texts has all that it ever had."""
        asked = " ".join(f'"{word}"' for word in words)
        found = self.index.rows("SELECT group_concat(rowid >> ?) FROM texts WHERE texts MATCH ?", (SHIFT, asked))
        return as_mask(parse_numbers(found[0][0] if found else None))

    def _find_labelled(self) -> list[int]:
        given = json.dumps([list(pair) for pair in sorted(self.labelled)])
        query = "SELECT num FROM items WHERE (part, task) IN (SELECT value ->> 0, value ->> 1 FROM json_each(?))"
        return [number for (number,) in self.index.rows(query, [given])]


def _list_marks(wanted: Filter) -> Iterator[str]:
    if wanted.subject:
        yield f"subject|{wanted.subject}"
    if wanted.mark:
        yield wanted.mark
    if wanted.outcome:
        yield f"{wanted.outcome}|{wanted.checkpoint or '*'}|{wanted.setting or '*'}"
