"""A file is there whole or not at all; a text is read in UTF-8, or its encoding is named."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.errors import InputError

PARTIAL = "*.partial"
"""What a process that was killed leaves; the next writer of a run takes it away (pipeline/run.py)."""


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file in one step: it is on disk, whole, before this returns, and a reader sees the old one until then.

    Raises OSError, with nothing left behind.
    """
    partial = path.with_name(f".{path.name}"[:200] + f".{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def read_text(path: Path) -> str:
    """A user's text file in UTF-8, with or without a byte order mark. Raises InputError for another encoding."""
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not in UTF-8 (byte {error.start}); save it in that encoding") from None
