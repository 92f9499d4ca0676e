"""Files that later commands depend on: each is replaced in one step, durably, and never by what could not be read again.

Model: `write_record` and `write_kept` read back what they are about to write; a value that JSON or the record's own rules
cannot carry is an error then, with the file as it was, and not at the next start. `write_kept` leaves the file that it
replaces beside it, as NAME.previous, where that one could be read: the message about a damaged file offers it.

Limits: of several who write a file at once, as threads that store one image do, the last one's stays, whole; that it is the
right one takes a lock, or one owner.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from vcot.pipeline.errors import InputError, VcotError
from vcot.pipeline.records import Record

_R = TypeVar("_R", bound=Record)
_PREVIOUS = ".previous"
PARTIAL = "*.partial"
"""What a process that was killed leaves; the next writer of a run takes it away (services/run/directory.py)."""


def replace_file(path: Path, content: str | bytes) -> None:
    """Replace a file in one step: a reader sees the old one or the new one, and it is on disk before this returns.

    Raises OSError, which names the file, with nothing left behind.
    """
    data = content.encode() if isinstance(content, str) else content
    partial = path.with_name(
        f".{path.name}"[:200] + f".{secrets.token_hex(8)}.partial"
    )  # no other writer's, in any process
    try:
        with naming(path), partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have an OSError say where: one of a write to an open file, as on a full disk, names none. Raises it."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A new folder, which takes the place of `folder` when it is whole. For one writer at a time.

    Raises OSError, which names the folder or a file in it, with nothing left behind.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # a killed command's
    try:
        with naming(folder):
            partial.mkdir(parents=True)
            yield partial
        if folder.exists():
            shutil.rmtree(folder)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_text(path: Path) -> str:
    """A user's text file in UTF-8, with or without a byte order mark. Raises InputError for another encoding."""
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not in UTF-8 (byte {error.start}); save it in that encoding") from None


def write_kept(path: Path, text: str, read: Callable[[str], object]) -> None:
    """Replace a file that a person could not make anew, and keep the one that was there.

    `read`, which raises ValueError, must be able to read the text.

    Raises InputError, with the file as it was.
    """
    _check(path, text, read)
    if path.is_file():
        before = path.read_bytes()
        if _is_readable(before, read):
            replace_file(previous_of(path), before)
    replace_file(path, text)


def write_record(path: Path, record: Record) -> None:
    """Replace a JSON file by a record. Raises InputError, with the file as it was, for one that could not be read again."""
    text = render(path, record)
    _check(path, text, type(record).model_validate_json)
    replace_file(path, text)


def write_kept_record(path: Path, record: Record) -> None:
    """Replace a JSON file by a record, and keep the one that was there. Raises InputError as `write_record` does."""
    write_kept(path, render(path, record), type(record).model_validate_json)


def render(path: Path, record: Record) -> str:
    """The text of a record's file. Raises InputError for what UTF-8 cannot say: half a surrogate pair."""
    try:
        return record.model_dump_json(indent=2) + "\n"
    except ValueError as error:
        raise _unreadable(path, error) from None


def read_record(path: Path, kind: type[_R], error: type[VcotError] = InputError, *, remedy: str) -> _R | None:
    """The record in a JSON file; None where there is none. Raises `error`, with the remedy, for a file that holds none."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as fault:
        raise error(f"{path} cannot be read ({fault.strerror}); {remedy}") from None
    try:
        return kind.model_validate_json(data)
    except ValidationError as fault:
        raise error(f"{path} is not a {kind.__name__} ({explain(fault)}); {offer(path, kind, remedy)}") from None


def offer(path: Path, kind: type[Record], remedy: str) -> str:
    """What to do about a damaged file: put the last good one back, where there is one."""
    previous = previous_of(path)
    if not (previous.is_file() and _is_readable(previous.read_bytes(), kind.model_validate_json)):
        return remedy
    return f"its last good copy is {previous}: `cp '{previous}' '{path}'` goes back to that, or {remedy}"


def previous_of(path: Path) -> Path:
    """Where the file is that was replaced last."""
    return path.with_name(f"{path.name}{_PREVIOUS}")


def explain(error: ValidationError) -> str:
    """The first fault of a text that is no record, as a clause: where, and what."""
    fault = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in fault["loc"])
    return f"{where}: {fault['msg']}" if where else str(fault["msg"])


def _check(path: Path, text: str, read: Callable[[str], object]) -> None:
    """Raise InputError for a text that could not be read again."""
    try:
        read(text.encode().decode())
    except ValueError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: ValueError) -> InputError:
    why = explain(error) if isinstance(error, ValidationError) else str(error).splitlines()[0]
    return InputError(f"{path} stays as it is: what was to be written could not be read again ({why})")


def _is_readable(data: bytes, read: Callable[[str], object]) -> bool:
    try:
        read(data.decode())
    except (ValueError, tomllib.TOMLDecodeError, VcotError):
        return False
    return True
