"""Answers that others gave for a run (services/run/sharding.py) and no command merged, because it was killed.

Whichever command writes to the run next merges them first, whoever it has ask: nothing that was paid for is asked again. A
run notes storage elsewhere (`--shards`) before anything is asked there, and forgets it once all is merged.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from pathlib import Path

from vcot.pipeline.errors import StageError, VcotError
from vcot.pipeline.files import read_record, write_record
from vcot.pipeline.records import Record, content_key
from vcot.pipeline.report import Report, Said
from vcot.services.run.directory import SHARDS, Run
from vcot.services.run.sharding import read_answered
from vcot.services.run.shared_storage import Storage

_NOTE = "shards.json"


class Elsewhere(Record):
    """Where shards of a run may lie, besides its directory."""

    folders: dict[str, str]
    """By the URL of the storage."""


def find_storage(run: Run, url: str | None) -> Storage:
    """Where the shards of a run lie: one folder for a run, in the run itself where no URL is given."""
    directory = str(run.directory.absolute())
    return Storage(url or directory, SHARDS if url is None else f"{SHARDS}/{content_key(run=directory)[:12]}")


def note_storage(run: Run, storage: Storage) -> None:
    """Something is about to be asked there."""
    if _is_elsewhere(run, storage):
        _write_note(run, _read_note(run) | {storage.url: storage.folder})


def leave_storage(run: Run, storage: Storage, names: Iterable[str]) -> None:
    """All that was answered there is merged: clear the shards of these names, and forget the storage."""
    for name in names:
        storage.clear(name)
    if _is_elsewhere(run, storage):
        _write_note(run, {url: folder for url, folder in _read_note(run).items() if url != storage.url})


async def merge_left(run: Run, report: Report) -> None:
    """Merge what was answered for commands that were killed, and take away what was to be asked for them.

    Raises StageError or MachineError where that cannot be read.
    """
    for storage in _list_places(run):
        try:
            await _merge(run, storage, report)
        except (FileNotFoundError, VcotError) as error:
            if not _is_elsewhere(run, storage):
                raise
            raise StageError(
                f"an earlier command had others ask, and what they answered is not merged yet: {error}; to do without it, "
                f"delete {run.directory / _NOTE}"
            ) from error


async def _merge(run: Run, storage: Storage, report: Report) -> None:
    asked, answered = await asyncio.to_thread(storage.list_shards)
    if answered:
        report(Said(f"{len(answered)} shards were done for an earlier command: merged"))
    for name in answered:
        await run.ledger.write((await asyncio.to_thread(read_answered, storage, name)).records)
    await asyncio.to_thread(leave_storage, run, storage, {*asked, *answered})


def _list_places(run: Run) -> Iterator[Storage]:
    if (run.directory / SHARDS).is_dir():
        yield find_storage(run, None)
    for url, folder in _read_note(run).items():
        yield Storage(url, folder)


def _is_elsewhere(run: Run, storage: Storage) -> bool:
    return storage != find_storage(run, None)


def _read_note(run: Run) -> dict[str, str]:
    noted = read_record(_note(run), Elsewhere, remedy="delete it where no command was given --shards")
    return dict(noted.folders) if noted else {}


def _write_note(run: Run, folders: dict[str, str]) -> None:
    if folders:
        write_record(_note(run), Elsewhere(folders=folders))
    else:
        _note(run).unlink(missing_ok=True)


def _note(run: Run) -> Path:
    return run.directory / _NOTE
