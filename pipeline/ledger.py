"""The run's ledger: what was answered, judged and scored, and what is still owed.

One SQLite file. A record is durable before it counts as done (full synchronous commits), so `kill -9` at any moment loses
at most work in flight, and the same command again finds every finished record by its key. An error is kept, so that it
can be read: a later record replaces it, and nothing ever replaces a good record. Whether its key is still owed is the
step's to say: what failed is, what a judge refused is final.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from pipeline.errors import InputError, StageError
from pipeline.files import explain
from pipeline.records import Judgment, Response, Usage

LedgerRecord = Response | Judgment
R = TypeVar("R", Response, Judgment)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS records (
    kind TEXT NOT NULL,
    key  TEXT NOT NULL,
    ok   INTEGER NOT NULL,
    body TEXT NOT NULL,
    PRIMARY KEY (kind, key)
) WITHOUT ROWID
"""
_PUT = """
INSERT INTO records (kind, key, ok, body) VALUES (?, ?, ?, ?)
ON CONFLICT (kind, key) DO UPDATE SET ok = excluded.ok, body = excluded.body WHERE records.ok = 0
"""
_MAX_VARIABLES = 500


class Ledger:
    """Records by kind and key. Safe to use from several threads; one process writes at a time (`open_run`, access alone).

    Its methods raise StageError where the file cannot be read or written, as on a full disk.
    """

    def __init__(self, path: Path, *, is_read: bool = False) -> None:
        """Open or create the file; to be read only, as it is now: no file is made, and what others write is not seen.

        Raises InputError where it is not a ledger.
        """
        self._path = path
        self._lock = threading.Lock()
        self._writes: set[asyncio.Future[None]] = set()
        try:
            self._connection = _connect_to_read(path) if is_read else _connect(path)
        except sqlite3.OperationalError as error:  # the disk's fault or the folder's, not the file's
            raise InputError(
                f"the ledger {path} cannot be opened ({error}); see that its disk has room and that it may be written"
            ) from None
        except sqlite3.DatabaseError as error:
            raise InputError(f"{path} is not a ledger ({error}); restore it or begin a new run directory") from None

    async def write(self, records: Sequence[LedgerRecord]) -> None:
        """`put` in a thread. Whoever waits may be cancelled; what was answered is written all the same."""
        writing = asyncio.ensure_future(asyncio.to_thread(self.put, records))
        self._writes.add(writing)
        writing.add_done_callback(self._writes.discard)
        await asyncio.shield(writing)

    async def finish(self) -> None:
        """Wait for what is being written, then close the file."""
        await asyncio.gather(*self._writes, return_exceptions=True)
        self.close()

    def put(self, records: Sequence[LedgerRecord]) -> None:
        """Store `records` in one transaction: after it returns all of them are on disk, or none."""
        rows = [(type(r).__name__, r.key, int(r.error is None), r.model_dump_json(exclude_none=True)) for r in records]
        with self._using():
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                self._connection.executemany(_PUT, rows)
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def get(self, kind: type[R], keys: Iterable[str]) -> dict[str, R]:
        """The stored records among `keys`, errors included."""
        found: dict[str, R] = {}
        chunk: tuple[str, ...]
        for chunk in _chunks(keys):
            marks = ", ".join("?" * len(chunk))
            query = f"SELECT key, body FROM records WHERE kind = ? AND key IN ({marks})"  # noqa: S608 - only marks
            with self._using():
                rows = self._connection.execute(query, (kind.__name__, *chunk)).fetchall()
            found |= {key: self._read(kind, body) for key, body in rows}
        return found

    def _read(self, kind: type[R], body: str) -> R:
        try:
            return kind.model_validate_json(body)
        except ValidationError as error:
            raise InputError(
                f"the ledger {self._path} holds a {kind.__name__} that cannot be read ({explain(error)}); use the "
                "version of vcot that wrote it"
            ) from None

    def done(self, kind: type[R], keys: Iterable[str]) -> set[str]:
        """Those of `keys` whose record is good."""
        done: set[str] = set()
        chunk: tuple[str, ...]
        for chunk in _chunks(keys):
            marks = ", ".join("?" * len(chunk))
            query = f"SELECT key FROM records WHERE kind = ? AND ok = 1 AND key IN ({marks})"  # noqa: S608 - only marks
            with self._using():
                done |= {key for (key,) in self._connection.execute(query, (kind.__name__, *chunk))}
        return done

    def is_empty(self) -> bool:
        """Whether it holds no record."""
        with self._using():
            return self._connection.execute("SELECT 1 FROM records LIMIT 1").fetchone() is None

    def spent(self, judge: str) -> tuple[int, Usage]:
        """How many of a judge's judgments were billed, and for how many tokens, whatever became of them."""
        query = """
            SELECT count(*), sum(json_extract(body, '$.usage.prompt_tokens')),
                   sum(json_extract(body, '$.usage.completion_tokens'))
            FROM records WHERE kind = 'Judgment' AND json_extract(body, '$.judge') = ?
                           AND json_extract(body, '$.usage') IS NOT NULL
        """
        with self._using():
            ((num_judgments, prompt_tokens, completion_tokens),) = self._connection.execute(query, (judge,)).fetchall()
        return num_judgments, Usage(prompt_tokens=prompt_tokens or 0, completion_tokens=completion_tokens or 0)

    def close(self) -> None:
        """Close the file, after the statement that is under way."""
        with self._lock:
            self._connection.close()

    @contextmanager
    def _using(self) -> Iterator[None]:
        """The connection, for one thread at a time. Raises StageError for what SQLite cannot do."""
        try:
            with self._lock:
                yield
        except sqlite3.Error as error:
            raise StageError(
                f"the ledger {self._path} cannot be used ({error}); see that its disk has room and is sound, and what was "
                "answered before is kept: the same command goes on"
            ) from None


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(_SCHEMA)
    except sqlite3.DatabaseError:
        connection.close()
        raise
    return connection


def _connect_to_read(path: Path) -> sqlite3.Connection:
    """What the file holds at this moment; nothing, where it is not there yet."""
    if path.is_file():
        uri = f"{path.absolute().as_uri()}?mode={_read_mode(path)}"
        connection = sqlite3.connect(uri, uri=True, check_same_thread=False, isolation_level=None)
        try:
            connection.execute("PRAGMA query_only = ON")
            connection.execute("BEGIN")  # one view for all that is read, whatever is written meanwhile
            if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'records'").fetchone():
                return connection
        except sqlite3.DatabaseError:
            connection.close()
            raise
        connection.close()  # whoever makes it has only begun
    connection = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
    connection.execute(_SCHEMA)
    return connection


def _read_mode(path: Path) -> str:
    """A reader takes part in SQLite's locks, by files that go with the last who does; where it may not, it does without."""
    if os.access(path, os.W_OK) and os.access(path.parent, os.W_OK):
        return "rw"
    return "ro" if path.with_name(f"{path.name}-wal").exists() else "ro&immutable=1"


def _chunks(keys: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """`keys` in tuples of at most `_MAX_VARIABLES`, SQLite's bound on the variables of a statement."""
    iterator = iter(keys)
    while True:
        chunk = tuple(islice(iterator, _MAX_VARIABLES))
        if not chunk:
            return
        yield chunk
