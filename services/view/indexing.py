"""Keeps a run's index up to date while others write to the run: a process of its own, which the viewer starts.

Model: a pass reads one moment of the ledger. What is new there makes its tasks due, together with those that may have
changed without a trace (an error that was replaced); then what is due is looked at, some at a time, each with its marks,
words and keys in one transaction. A pass after which nothing changed costs a look at a few files; after one that took long
the next waits in proportion, so that a run at work keeps the machine.

Limits: one process an index (a lock in its folder); a second one waits for the first to end.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

from vcot.pipeline.errors import InputError, OwedError, VcotError
from vcot.pipeline.locks import try_lock
from vcot.pipeline.records import Task, content_key
from vcot.pipeline.report import ignore
from vcot.pipeline.stage import batched
from vcot.services.checkpoints.registry import BASE_ALIAS
from vcot.services.run.directory import LEDGER, RECIPE, Run, open_run
from vcot.services.run.live import LIVE, find_holder
from vcot.services.run.rounds import list_rounds, make_judge
from vcot.services.run.session import Session
from vcot.services.view.arrays import write_columns
from vcot.services.view.index import (
    INDEX,
    SHIFT,
    VERSION,
    Index,
    Part,
    Sheet,
    is_current,
    note,
    number_marks,
    open_index,
)
from vcot.services.view.items import Evaluated, Look, Sampled, Shelf
from vcot.services.view.overview import write_overview

_EVERY_S = 1.0
_REST = 4
"""Times as long as a pass took, before the next."""
_FRESH_S = 3.0
_REST_OF_COLUMNS = 15
"""Times as long as the columns took, before they are made again within a pass."""
_CHUNK = 64
_SHOWN = 300
"""Characters of a question in a list."""
_SEEN = "seen"
_WATCHED = (
    *(
        RECIPE,
        LIVE,
        LEDGER,
        f"{LEDGER}-wal",
        "checkpoints/registry.json",
        "tasks/*.jsonl",
        "judges/*.json",
    ),
    *("parity/*.json", "report/**/*.json", "training/*/*.json*"),
)


def follow(directory: Path, folder: Path) -> None:
    """Until this process is ended."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        seen = _read_note(folder, _SEEN)
        while True:
            began = time.monotonic()
            seen = _catch_up(directory, folder, seen)
            time.sleep(max(_EVERY_S, _REST * (time.monotonic() - began)))


def index_once(directory: Path, folder: Path) -> None:
    """Make an index that says what the run holds now. Raises InputError where another process keeps it, and has not made it
    whole yet, or has not seen what the last command on the run left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        if try_lock(lock):
            _catch_up(directory, folder, _read_note(folder, _SEEN))
            return
        num_seen, num_items = Index(folder / INDEX).progress()
        if num_seen < num_items or not num_items:
            why = f"a viewer is still reading the run, {num_seen:,} of {num_items:,} tasks so far"
            raise InputError(f"{directory}: {why}; wait until its pages say that it is done")
        is_still = not find_holder(directory) and _read_note(folder, "problem") is None
        if is_still and _read_note(folder, _SEEN) != _look_at_files(directory):
            why = "a viewer has not read yet what the run was given last"
            raise InputError(f"{directory}: {why}; try again in a moment, or end that viewer")


def _catch_up(directory: Path, folder: Path, seen: str | None) -> str:
    """A pass, where anything has changed since the run looked like `seen`; what it looks like now.

    That is kept for whoever comes next, unless something could not be read, which may be mended without a trace.
    """
    state = _look_at_files(directory)
    if state != seen:
        asyncio.run(_follow_once(directory, folder))
        if _read_note(folder, "problem") is None:
            with closing(open_index(folder / INDEX)) as connection:
                note(connection, _SEEN, state)
    return state


def _read_note(folder: Path, name: str) -> str | None:
    return Index(folder / INDEX).note(name) if is_current(folder / INDEX) else None


async def _follow_once(directory: Path, folder: Path) -> None:
    """The overview goes before, where there is none, since a large run's items take minutes."""
    if _read_note(folder, "overview") is None:
        await refresh_overview(directory, folder, with_status=False)
    await bring_up_to_date(directory, folder)
    await refresh_overview(directory, folder)


def _look_at_files(directory: Path) -> str:
    """Size and time of change of what a pass reads, and the program that reads it."""
    paths = sorted(path for pattern in _WATCHED for path in directory.glob(pattern) if path.is_file())
    stats = [(str(path.relative_to(directory)), path.stat()) for path in paths]
    found = [
        (name, stat.st_size, stat.st_mtime_ns) for name, stat in stats if stat.st_size
    ]  # a reader leaves empty ones
    return json.dumps([version("vcot"), *found])


async def bring_up_to_date(directory: Path, folder: Path) -> None:
    """One pass over the items."""

    async def go_through(session: Session, connection: sqlite3.Connection) -> None:
        _Pass(session, connection).do()

    await _work(directory, folder, go_through)


async def refresh_overview(directory: Path, folder: Path, *, with_status: bool = True) -> None:
    """The overview of what the items say, and, with the status, the account of the stages."""
    await _work(directory, folder, partial(write_overview, with_status=with_status))


async def _work(directory: Path, folder: Path, do: Callable[[Session, sqlite3.Connection], Awaitable[None]]) -> None:
    """On one moment of the run. What cannot be read is a note, for whoever looks, until it can."""
    problem = None
    try:
        with open_run(directory, access="read") as run:
            async with Session(run, ignore) as session:
                with closing(_open(folder / INDEX, run)) as connection:
                    await do(session, connection)
    except VcotError as error:
        problem = str(error)
    with closing(open_index(folder / INDEX)) as connection:
        if problem is None:
            connection.execute("DELETE FROM notes WHERE name = 'problem'")
        else:
            note(connection, "problem", problem)


def _open(path: Path, run: Run) -> sqlite3.Connection:
    """The index of the run as its recipe and its ledger are now: made anew where one of them is another."""
    stamp = content_key(recipe=run.recipe, version=VERSION)
    if path.is_file() and is_current(path):
        connection = open_index(path)
        is_same = connection.execute("SELECT body FROM notes WHERE name = 'stamp'").fetchone() == (stamp,)
        place, name = _read_place(connection)
        if is_same and name in (None, _name_place(run, place)):
            return connection
        connection.close()
    for name in (path.name, f"{path.name}-wal", f"{path.name}-shm"):
        path.with_name(name).unlink(missing_ok=True)
    connection = open_index(path)
    note(connection, "stamp", stamp)
    return connection


def _read_place(connection: sqlite3.Connection) -> tuple[tuple[int, int], str | None]:
    """How far the ledger was read, and its name for that place; none where it was not read yet."""
    kept = connection.execute("SELECT body FROM notes WHERE name = 'place'").fetchone()
    first, second, name = json.loads(kept[0]) if kept else (0, 0, None)
    return (first, second), name


def _name_place(run: Run, place: tuple[int, int]) -> str:
    """By what is there, and by the file: the same command may have asked the same anew."""
    path = run.directory / LEDGER
    return f"{path.stat().st_ino if path.is_file() else 0} {run.ledger.name_place(place)}"


@dataclass
class _Pass:
    """One pass over one moment of the run."""

    session: Session
    connection: sqlite3.Connection
    columns_until: float = 0.0

    def do(self) -> None:
        shelves = list(list_shelves(self.session))
        for shelf in shelves:
            self._add_tasks(shelf)
        self._write_columns(shelves)
        self._mark_due()
        for shelf in shelves:
            for _ in self._work_off(shelf):
                if time.monotonic() > self.columns_until:
                    self._write_columns(shelves)
        self._write_columns(shelves)

    def _write_columns(self, shelves: Sequence[Shelf]) -> None:
        """What filters know, and when they want to know more: what is made often must not be most of the work."""
        began = time.monotonic()
        parts = tuple(Part(slug=one.slug, title=one.title, num_tasks=len(one.tasks)) for one in shelves)
        write_columns(self.connection, parts)
        self.columns_until = time.monotonic() + max(_FRESH_S, _REST_OF_COLUMNS * (time.monotonic() - began))

    def _add_tasks(self, shelf: Shelf) -> None:
        """Those that are not in the index yet."""
        count = "SELECT count(*) FROM items WHERE part = ?"
        if self.connection.execute(count, (shelf.slug,)).fetchone() == (len(shelf.tasks),):
            return
        for chunk in batched(shelf.tasks, 2000):
            with _transaction(self.connection):
                for task in chunk:
                    self._add_task(shelf.slug, task)

    def _add_task(self, slug: str, task: Task) -> None:
        added = self.connection.execute(
            "INSERT OR IGNORE INTO items (part, task, subject, question) VALUES (?, ?, ?, ?)",
            (slug, task.id, task.subject or "", task.question[:_SHOWN]),
        )
        if added.rowcount:
            body = (added.lastrowid, task.model_dump_json(), Sheet().model_dump_json())
            self.connection.execute("INSERT INTO sheets VALUES (?, ?, ?)", body)

    def _mark_due(self) -> None:
        """What the ledger has news of, and what it may have changed in place."""
        place, tasks = self.session.run.ledger.read_news(_read_place(self.connection)[0])
        with _transaction(self.connection):
            self.connection.execute("UPDATE items SET due = 1 WHERE is_open")
            self.connection.executemany("UPDATE items SET due = 1 WHERE task = ?", ((task,) for task in tasks))
            note(self.connection, "place", json.dumps([*place, _name_place(self.session.run, place)]))

    def _work_off(self, shelf: Shelf) -> Iterator[None]:
        """Stops after each transaction."""
        query = "SELECT task, num FROM items WHERE due AND part = ?"
        due = dict(self.connection.execute(query, (shelf.slug,)).fetchall())
        tasks = (task for task in shelf.tasks if task.id in due)
        for chunk in batched(tasks, _CHUNK):
            looks = list(shelf.look(chunk))
            with _transaction(self.connection):
                for look in looks:
                    _put(self.connection, due[look.task.id], look)
            yield


def list_shelves(session: Session) -> Iterator[Shelf]:
    """The run's tasks by what they were asked for, as far as it holds them."""
    rounds = []
    try:
        rounds = list_rounds(session)
        judge = make_judge(session)
        for current in rounds:
            alone = session.run.recipe.rounds.num == 1
            slug, title = ("train", "Training") if alone else (f"round-{current.number}", f"Round {current.number}")
            if current.tasks:
                yield Sampled(current, judge, slug, title)
        questions = session.questions(session.run.recipe.eval.split)
    except OwedError:  # not that far yet
        return
    checkpoints = [checkpoint.ref for checkpoint in session.registry.list()]
    base = session.registry.find(BASE_ALIAS)
    checkpoints.sort(key=lambda ref: base is None or ref != base.ref)
    if questions.tasks and checkpoints:
        title = f"Evaluation ({questions.benchmark.name}, {questions.split})"
        yield Evaluated(questions, checkpoints, session.run.ledger, title=title)


def _put(connection: sqlite3.Connection, num: int, look: Look) -> None:
    """A row as it was found; its words are added once."""
    (before,) = connection.execute("SELECT num_texts FROM items WHERE num = ?", (num,)).fetchone()
    num_texts = min(len(look.texts) + 1, (1 << SHIFT) - 1)
    if num_texts > before:
        told = "\n".join((look.task.question, *look.task.choices, *look.texts))
        connection.execute("INSERT INTO texts (rowid, body) VALUES (?, ?)", ((num << SHIFT) + num_texts, told))
    best, worst = (max(look.scores), min(look.scores)) if look.scores else (None, None)
    spread = None if best is None or worst is None else best - worst
    connection.execute(
        "UPDATE items SET due = 0, is_open = ?, num_texts = ?, num_good = ?, num_lost = ?, num_judged = ?, best = ?, "
        "worst = ?, spread = ?, gaps = ? WHERE num = ?",
        (
            *(look.is_open, max(before, num_texts), look.num_good, look.num_lost, len(look.scores)),
            *(best, worst, spread, json.dumps(look.gaps), num),
        ),
    )
    asked = Sheet(asked=tuple(look.asked)).model_dump_json(exclude_defaults=True)
    connection.execute("UPDATE sheets SET asked = ? WHERE num = ?", (asked, num))
    connection.execute("DELETE FROM scores WHERE num = ?", (num,))
    times = ((num, score, number) for score, number in Counter(look.scores).items())
    connection.executemany("INSERT INTO scores VALUES (?, ?, ?)", times)
    connection.execute("DELETE FROM marks WHERE num = ?", (num,))
    names = look.marks | ({f"subject|{look.task.subject}"} if look.task.subject else set())
    marks = ((mark, num) for mark in number_marks(connection, names))
    connection.executemany("INSERT INTO marks VALUES (?, ?)", marks)


class _transaction:  # noqa: N801 - read as a statement
    """All of a block, or nothing."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def __enter__(self) -> None:
        self._connection.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._connection.execute("COMMIT" if kind is None else "ROLLBACK")


if __name__ == "__main__":
    follow(Path(sys.argv[1]), Path(sys.argv[2]))
