"""The run's ledger: what was answered, judged and scored, and what is still owed.

One SQLite file. A record is durable before it counts as done (full synchronous commits), so `kill -9` at any moment loses
at most work in flight, and the same command again finds every finished record by its key. An error is kept, so that it
can be read: a later record replaces it, and nothing ever replaces a good record. Whether its key is still owed is the
step's to say: what failed is, what a judge refused is final.

    groups      one row for each request: what its responses share, and the responses, each text once
    asked       what many requests share: checkpoint, prompt and sampling
    responses   where each response is: key -> row of `groups`, position in it
    judgments   one row each, its score and tokens in columns
    replies     what a judge's model answered, where a verdict is made of several answers: one row each
    image_gains how likely the sampled model finds a response with its images and with blank ones: one row each
    option_scores  how likely a checkpoint finds each option of a question: one row for the question

Keys are hashes, and stored as their bytes. Writers that wait at the same time share one transaction. A file of a former
layout (a row of JSON for each record, or judgments without intervals) is brought up to date in one transaction when it is
opened to be written.
"""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from vcot.pipeline.errors import InputError, StageError
from vcot.pipeline.files import explain
from vcot.pipeline.ledger_layout import (
    ADDED,
    FLAT,
    LATER_TABLES,
    NAME_PLACE,
    PUT_RESPONSE,
    TABLES,
    Flat,
    decode_flat,
    decode_key,
    decode_member,
    encode_flat,
    encode_key,
    encode_member,
    is_former,
    list_columns,
    select_tokens,
)
from vcot.pipeline.odds import OptionScores
from vcot.pipeline.records import CheckpointRef, ImageGain, Judgment, Reply, Response, Usage
from vcot.pipeline.stage import batched

LedgerRecord = Response | Judgment | Reply | ImageGain | OptionScores
R = TypeVar("R", Response, Judgment, Reply, ImageGain, OptionScores)

_MAX_VARIABLES = 500
"""Of one statement: fewer than SQLite's bound."""


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
        self._next: _Batch | None = None
        """Gathers until the transaction before it is done."""
        self._committing: asyncio.Future[None] | None = None
        try:
            self._connection = _connect_to_read(path) if is_read else _connect(path)
            is_earlier = is_former(self._connection)
        except sqlite3.OperationalError as error:  # the disk's fault or the folder's, not the file's
            raise InputError(
                f"the ledger {path} cannot be opened ({error}); see that its disk has room and that it may be written"
            ) from None
        except sqlite3.DatabaseError as error:
            raise InputError(f"{path} is not a ledger ({error}); restore it or begin a new run directory") from None
        if is_earlier:
            self._update(is_read=is_read)

    def _update(self, *, is_read: bool) -> None:
        """Bring a file of the former layout up to date. Raises InputError where that may not be, with the file as it was."""
        if is_read:
            self.close()
            raise InputError(
                f"the ledger {self._path} is of an earlier version of vcot; a command that works on the run brings it up "
                "to date, as `vcot sample` does, and asks for nothing again"
            )
        try:
            with self._using(), self._transaction():
                for name in sorted(ADDED.keys() - list_columns(self._connection, "judgments")):
                    self._connection.execute(f"ALTER TABLE judgments ADD COLUMN {name} {ADDED[name]}")
                if list_columns(self._connection, "records"):
                    self._put_former()
        except BaseException:
            self.close()
            raise

    def _put_former(self) -> None:
        query = "SELECT kind, body FROM records ORDER BY json_extract(body, '$.group')"  # a group's one by one
        former = (self._read_former(kind, body) for kind, body in self._connection.execute(query))
        for chunk in batched(former, _MAX_VARIABLES):
            self._put(chunk)
        self._connection.execute("DROP TABLE records")

    def _read_former(self, kind: str, body: str) -> LedgerRecord:
        fields = json.loads(body)
        return self._validate(Response, fields) if kind == "Response" else self._validate(Judgment, fields)

    async def write(self, records: Sequence[LedgerRecord]) -> None:
        """`put` in a thread, in one transaction with what others wait to write. Returns when the records are on disk.

        Whoever waits may be cancelled; what was answered is written all the same.
        """
        if self._next is None:
            self._next = _Batch([], asyncio.get_running_loop().create_future())
            self._committing = asyncio.ensure_future(self._commit(self._next, self._committing))
        batch = self._next
        batch.parts.append(records)
        await asyncio.shield(batch.is_done)
        if (fault := batch.faults.get(id(records))) is not None:
            raise fault

    async def _commit(self, batch: _Batch, before: asyncio.Future[None] | None) -> None:
        """Write what has gathered while the transaction before was under way."""
        if before is not None:
            await asyncio.wait([before])
        self._next = None
        await asyncio.to_thread(batch.put, self)
        batch.is_done.set_result(None)

    async def finish(self) -> None:
        """Wait for what is being written, then close the file."""
        while self._committing is not None and not self._committing.done():
            await asyncio.wait([self._committing])
        self.close()

    def put(self, records: Sequence[LedgerRecord]) -> None:
        """Store `records` in one transaction: after it returns all of them are on disk, or none."""
        with self._using(), self._transaction():
            self._put(records)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def _put(self, records: Iterable[LedgerRecord]) -> None:
        groups: dict[tuple[Any, ...], list[Response]] = {}
        for record in records:
            if isinstance(record, Response):
                groups.setdefault(self._identify(record), []).append(record)
            else:
                self._connection.execute(FLAT[type(record)].put, encode_flat(record))
        for identity, responses in groups.items():
            self._put_group(identity, responses)

    def _identify(self, response: Response) -> tuple[Any, ...]:
        """Which row of `groups` a response belongs in."""
        sampling = response.sampling.model_dump()
        seed = sampling.pop("seed")
        shared = {"checkpoint": response.checkpoint.model_dump(), "prompt": response.prompt, "sampling": sampling}
        body = json.dumps(shared, ensure_ascii=False)
        self._connection.execute("INSERT OR IGNORE INTO asked (body) VALUES (?)", (body,))
        ((asked,),) = self._connection.execute("SELECT id FROM asked WHERE body = ?", (body,))
        return encode_key(response.group), response.task, asked, seed

    def _put_group(self, identity: tuple[Any, ...], responses: Sequence[Response]) -> None:
        find = "SELECT id, members FROM groups WHERE key = ? AND task = ? AND asked = ? AND seed = ?"
        row = self._connection.execute(find, identity).fetchone()
        if row is None:
            added = "INSERT INTO groups (key, task, asked, seed, members) VALUES (?, ?, ?, ?, '[]')"
            row = self._connection.execute(added, identity).lastrowid, "[]"
        number, members = row[0], json.loads(row[1])
        for response in responses:
            key = encode_key(response.key)
            find = "SELECT grp, position, ok FROM responses WHERE key = ?"
            known = self._connection.execute(find, (key,)).fetchone()
            if known is not None and known[2]:
                continue
            position = known[1] if known is not None and known[0] == number else len(members)
            members[position : position + 1] = [encode_member(response)]
            self._connection.execute(PUT_RESPONSE, (key, number, position, response.error is None))
        text = json.dumps(members, ensure_ascii=False, separators=(",", ":"))
        self._connection.execute("UPDATE groups SET members = ? WHERE id = ?", (text, number))

    def get(self, kind: type[R], keys: Iterable[str]) -> dict[str, R]:
        """The stored records among `keys`, errors included."""
        found: dict[str, R] = {}
        for chunk in batched(keys, _MAX_VARIABLES):
            asked = {encode_key(key): key for key in chunk}
            with self._using():
                rows = self._read_responses(asked) if kind is Response else self._read_flat(FLAT[kind], asked)
                found.update((key, self._validate(kind, fields)) for key, fields in rows)
        return found

    def _read_responses(self, keys: Mapping[bytes | str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
        query = f"SELECT key, grp, position FROM responses WHERE key IN ({_marks(keys)})"  # noqa: S608 - only marks
        places = self._connection.execute(query, tuple(keys)).fetchall()
        numbers = {number for _, number, _ in places}
        query = f"""
            SELECT groups.id, groups.key, task, body, seed, members FROM groups JOIN asked ON asked.id = groups.asked
            WHERE groups.id IN ({_marks(numbers)})
        """  # noqa: S608 - only marks
        groups = {}
        for number, group, task, body, seed, members in self._connection.execute(query, tuple(numbers)):
            shared = json.loads(body)
            shared["sampling"]["seed"] = seed
            groups[number] = shared | {"group": decode_key(group), "task": task}, json.loads(members)
        for key, number, position in places:
            shared, members = groups[number]
            yield keys[key], {"key": keys[key], **shared, **decode_member(members[position])}

    def _read_flat(self, flat: Flat, keys: Mapping[bytes | str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
        for row in self._connection.execute(f"{flat.select} WHERE key IN ({_marks(keys)})", tuple(keys)):
            yield keys[row[0]], decode_flat(flat, row)

    def _validate(self, kind: type[R], fields: dict[str, Any]) -> R:
        try:
            return kind.model_validate(fields)
        except ValidationError as error:
            raise InputError(
                f"the ledger {self._path} holds a {kind.__name__} that cannot be read ({explain(error)}); use the "
                "version of vcot that wrote it"
            ) from None

    def done(self, kind: type[R], keys: Iterable[str]) -> set[str]:
        """Those of `keys` whose record is good."""
        done: set[str] = set()
        good = "responses WHERE ok" if kind is Response else f"{FLAT[kind].table} WHERE error IS NULL"
        for chunk in batched(keys, _MAX_VARIABLES):
            asked = {encode_key(key): key for key in chunk}
            query = f"SELECT key FROM {good} AND key IN ({_marks(asked)})"  # noqa: S608 - names, marks
            with self._using():
                done |= {asked[key] for (key,) in self._connection.execute(query, tuple(asked))}
        return done

    def is_empty(self) -> bool:
        """Whether it holds no record."""
        tables = ("responses", *(flat.table for flat in FLAT.values()))
        query = " UNION ALL ".join(f"SELECT 1 FROM {table}" for table in tables) + " LIMIT 1"  # noqa: S608 - only names
        with self._using():
            return self._connection.execute(query).fetchone() is None

    def list_checkpoints(self) -> list[CheckpointRef]:
        """Who was ever asked for responses, each by its weights once."""
        with self._using():
            bodies = [json.loads(body)["checkpoint"] for (body,) in self._connection.execute("SELECT body FROM asked")]
        return list({ref["digest"]: CheckpointRef.model_validate(ref) for ref in bodies}.values())

    def sampled(self) -> Usage:
        """The tokens of all responses, whichever recipe asked for them."""
        query = """
            SELECT json_extract(value, '$.usage.prompt_tokens') AS p, json_extract(value, '$.usage.completion_tokens') AS c
            FROM groups, json_each(groups.members) WHERE json_extract(value, '$.is_first_turn') IS NULL
        """
        return self._sum_tokens(query)[1]

    def spent(self, judge: str) -> tuple[int, Usage]:
        """How many of a judge's requests were billed, and for how many tokens, whatever became of them."""
        return self._sum_tokens(select_tokens("judge", "WHERE judge = :judge"), judge=judge)

    def scored(self) -> Usage:
        """The tokens of what checkpoints were asked about given texts: image gains, and how likely options are."""
        return self._sum_tokens(select_tokens("checkpoint"))[1]

    def _sum_tokens(self, query: str, **values: str) -> tuple[int, Usage]:
        """How many of the rows, of tokens `p` and `c`, have some, and their sums."""
        with self._using():
            found = self._connection.execute(f"SELECT count(p), sum(p), sum(c) FROM ({query})", values)  # noqa: S608
            ((num, prompt_tokens, completion_tokens),) = found.fetchall()
        return num, Usage(prompt_tokens=prompt_tokens or 0, completion_tokens=completion_tokens or 0)

    def read_news(self, since: tuple[int, int]) -> tuple[tuple[int, int], set[str]]:
        """The last rows of groups and judgments, and the tasks of those that came after the rows `since`.

        What replaced an error, or was added to a group, has no row of its own: whoever knows of an error looks again.
        """
        with self._using():
            tables = ("groups", "judgments")
            last = [self._connection.execute(f"SELECT coalesce(max(id), 0) FROM {t}").fetchone()[0] for t in tables]  # noqa: S608
            query = "SELECT task FROM groups WHERE id > ? UNION SELECT task FROM judgments WHERE id > ?"
            tasks = {task for (task,) in self._connection.execute(query, since)}
        return (last[0], last[1]), tasks

    def name_place(self, place: tuple[int, int]) -> str:
        """What is at a place that `read_news` told: something else in another ledger, as where a copy was put back."""
        with self._using():
            return str(self._connection.execute(NAME_PLACE, place).fetchone())

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
            raise StageError(f"the ledger {self._path} cannot be used ({error}); {self._mend(error)}") from None

    def _mend(self, error: sqlite3.Error) -> str:
        if type(error) is not sqlite3.DatabaseError:  # a damaged file is no operation that failed
            return "see that its disk has room and is sound, and what was answered before is kept: the same command goes on"
        return "it is damaged: put a copy in its place, or move it away, and the same command asks everything again"


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.executescript(TABLES)
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
            for name, table in LATER_TABLES.items():
                if not list_columns(connection, name):  # of an earlier version
                    connection.executescript(table.replace("CREATE TABLE", "CREATE TEMP TABLE"))
            connection.execute("PRAGMA query_only = ON")
            connection.execute("BEGIN")  # one view for all that is read, whatever is written meanwhile
            if list_columns(connection, "records") or list_columns(connection, "judgments"):
                return connection
        except sqlite3.DatabaseError:
            connection.close()
            raise
        connection.close()  # whoever makes it has only begun
    connection = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
    connection.executescript(TABLES)
    return connection


def _read_mode(path: Path) -> str:
    """A reader takes part in SQLite's locks, by files that go with the last who does; where it may not, it does without."""
    if os.access(path, os.W_OK) and os.access(path.parent, os.W_OK):
        return "rw"
    return "ro" if path.with_name(f"{path.name}-wal").exists() else "ro&immutable=1"


@dataclass
class _Batch:
    """What is written in one transaction. Mutated by the writers until it begins."""

    parts: list[Sequence[LedgerRecord]]
    is_done: asyncio.Future[None]
    faults: dict[int, Exception] = field(default_factory=dict)
    """By id of the part, why it was not written."""

    def put(self, ledger: Ledger) -> None:
        """Write all parts together; where that fails, each alone, so that one cannot take others with it."""
        try:
            ledger.put([record for part in self.parts for record in part])
        except Exception as error:  # noqa: BLE001 - is raised by whoever waits for it
            if len(self.parts) == 1:
                self.faults[id(self.parts[0])] = error
                return
            for part in self.parts:
                try:
                    ledger.put(part)
                except Exception as own:  # noqa: BLE001 - is raised by whoever waits for it
                    self.faults[id(part)] = own


def _marks(values: Collection[Any]) -> str:
    return ", ".join("?" * len(values))
