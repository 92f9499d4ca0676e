"""The viewer's index of a run: what lists, filters and free text need, in a file of its own.

Model: `<run>/view/index.sqlite` has a row for each task (an item), its marks (all that one can filter by, such as
`correct|base|cot 0.4`), and the words of its texts. One process writes it (services/view/indexing.py), any number read. The
ledger stays what the run knows: an item names its responses and judgments by key, and their texts are read there. A row that
is due is looked at (again); the flag is durable, so a stopped index goes on. What is in the file can be made again: one that
was made under another recipe, of another ledger, or by another version, is thrown away.

    notes     what is known of the run as a whole, as JSON by name
    items     a task in its part (`train`, `round-2`, `eval`): what is listed and sorted by
    sheets    its question, and the keys of what was answered, as JSON
    scores    the judge's, each once an item
    marks     which items carry which mark; `names` has their numbers
    texts     the words of question, responses and rationales; a row's number is the item's and a count below it
    columns   what lists and filters read, whole: an array over all items by name (services/view/arrays.py), made of the
              others, so that it is as old as the last time it was made

Limits: words are found whole, without regard to case and accents, and a script without spaces is one word to its next sign.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from vcot.pipeline.records import Outcome, Record, Task

FOLDER = "view"
INDEX = "index.sqlite"
VERSION = 3
SHIFT = 12
"""Bits of a row of `texts` that count the rows of one item."""
INDEX_TABLES = f"""
CREATE TABLE IF NOT EXISTS notes (name TEXT PRIMARY KEY, body TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS items (
    num        INTEGER PRIMARY KEY,
    part       TEXT NOT NULL,
    task       TEXT NOT NULL,
    subject    TEXT NOT NULL,
    question   TEXT NOT NULL,
    due        INTEGER NOT NULL DEFAULT 1,
    is_open    INTEGER NOT NULL DEFAULT 1,
    num_texts  INTEGER NOT NULL DEFAULT 0,
    num_good   INTEGER NOT NULL DEFAULT 0,
    num_lost   INTEGER NOT NULL DEFAULT 0,
    num_judged INTEGER NOT NULL DEFAULT 0,
    best REAL, worst REAL, spread REAL,
    gaps       TEXT NOT NULL DEFAULT '[]',
    UNIQUE (part, task)
);
CREATE INDEX IF NOT EXISTS items_due ON items (num) WHERE due;
CREATE INDEX IF NOT EXISTS items_open ON items (task) WHERE is_open;
CREATE INDEX IF NOT EXISTS items_task ON items (task);
CREATE TABLE IF NOT EXISTS sheets (num INTEGER PRIMARY KEY, task TEXT NOT NULL, asked TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS scores (num INTEGER, score REAL, times INTEGER, PRIMARY KEY (num, score)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS names (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS marks (mark INTEGER, num INTEGER, PRIMARY KEY (mark, num)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS marks_num ON marks (num);
CREATE TABLE IF NOT EXISTS columns (name TEXT PRIMARY KEY, body BLOB NOT NULL);
CREATE VIRTUAL TABLE IF NOT EXISTS texts USING fts5(body, content='', detail=none, tokenize="unicode61 remove_diacritics 2");
PRAGMA user_version = {VERSION};
"""
R = TypeVar("R", bound=Record)


class IndexedAnswer(Record):
    """A response by its keys, and what is known of it without its text."""

    key: str
    judgment: str | None = None
    score: float | None = None
    outcome: Outcome | None = None
    answer: str | None = None
    """The letter that was read, or the words."""
    place: str = ""
    """`chosen` or `rejected`, where it is in a pair."""


class IndexedRequest(Record):
    """One request about an item."""

    checkpoint: str
    """Its name."""
    prompt: str
    temperature: float
    shown: str = "true"
    """Which image: the question's own, a blank one, or another question's."""
    responses: tuple[IndexedAnswer, ...]

    @property
    def setting(self) -> str:
        """Prompt and temperature, as `cot 0.4`."""
        return f"{self.prompt} {self.temperature:g}"


class Sheet(Record):
    """Everything that was asked about an item."""

    asked: tuple[IndexedRequest, ...] = ()


class Part(Record):
    """Tasks that were asked for one purpose."""

    slug: str
    title: str
    num_tasks: int


class Facets(Record):
    """What the items can be filtered by."""

    parts: tuple[Part, ...] = ()
    marks: Mapping[str, int] = {}
    """How many items carry each."""


@dataclass(frozen=True)
class Item:
    """A row of the list."""

    num: int
    part: str
    task: str
    subject: str
    question: str
    num_good: int
    num_lost: int
    num_judged: int
    best: float | None
    worst: float | None


ITEM = "num, part, task, subject, question, num_good, num_lost, num_judged, best, worst"
"""The columns of an `Item`, in order."""


def open_index(path: Path) -> sqlite3.Connection:
    """Open the file to read and write, made where it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")  # what a power cut takes of it is made again
    connection.executescript(INDEX_TABLES)
    return connection


def is_current(path: Path) -> bool:
    """Whether the file is an index of this version."""
    try:
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
        try:
            return bool(connection.execute("PRAGMA user_version").fetchone()[0] == VERSION)
        finally:
            connection.close()
    except sqlite3.DatabaseError:
        return False


class Index:
    """An index as readers see it; each call sees what is there at that moment. Safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        """Of the file at `path`, which its writer may not have made yet: then it is empty."""
        self._path = path
        self._lock = threading.Lock()
        self._open: tuple[int, sqlite3.Connection] | None = None

    def rows(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """What a query gives; nothing where there is no index yet."""
        try:
            with self._lock:
                connection = self._connect()
                return [] if connection is None else connection.execute(query, values).fetchall()
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):  # its writer has only begun
                return []
            raise

    @property
    def version(self) -> tuple[int, int]:
        """Another one as soon as anything in the file has changed."""
        found = self.rows("PRAGMA data_version")
        return (self._open[0], found[0][0]) if self._open and found else (0, 0)

    def _connect(self) -> sqlite3.Connection | None:
        """The file's connection: another one where the file was made anew."""
        try:
            number = self._path.stat().st_ino
        except FileNotFoundError:
            return None
        if self._open is None or self._open[0] != number:
            self._close()
            uri = f"{self._path.absolute().as_uri()}?mode=ro"
            connection = sqlite3.connect(uri, uri=True, check_same_thread=False, isolation_level=None)
            connection.execute("PRAGMA mmap_size = 2000000000")
            self._open = number, connection
        return self._open[1]

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def read(self, name: str, kind: type[R]) -> R | None:
        """A note; None where there is none."""
        body = self.note(name)
        try:
            return None if body is None else kind.model_validate_json(body)
        except ValidationError:  # of another version; its writer is about to replace it
            return None

    def note(self, name: str) -> str | None:
        """A note's text."""
        found = self.rows("SELECT body FROM notes WHERE name = ?", (name,))
        return found[0][0] if found else None

    def progress(self) -> tuple[int, int]:
        """How many items were looked at, and how many there are."""
        found = self.rows("SELECT (SELECT count(*) FROM items WHERE due), (SELECT count(*) FROM items)")
        due, total = found[0] if found else (0, 0)
        return total - due, total

    def find(self, part: str, task: str) -> tuple[Item, Task, Sheet] | None:
        """One item and all that is known of it."""
        query = (
            f"SELECT {ITEM}, sheets.task, asked FROM items JOIN sheets USING (num) WHERE part = ? AND items.task = ?"  # noqa: S608
        )
        found = self.rows(query.replace("num, part, task", "num, part, items.task"), (part, task))
        if not found:
            return None
        *item, body, asked = found[0]
        return Item(*item), Task.model_validate_json(body), Sheet.model_validate_json(asked)


def note(connection: sqlite3.Connection, name: str, body: str) -> None:
    """Keep a note, in place of the one of that name."""
    connection.execute("INSERT OR REPLACE INTO notes (name, body) VALUES (?, ?)", (name, body))


def number_marks(connection: sqlite3.Connection, names: Iterable[str]) -> list[int]:
    """The numbers of marks; new ones are given one."""
    numbers = []
    for name in names:
        connection.execute("INSERT OR IGNORE INTO names (name) VALUES (?)", (name,))
        numbers.append(connection.execute("SELECT id FROM names WHERE name = ?", (name,)).fetchone()[0])
    return numbers
