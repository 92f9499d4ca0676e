"""Locks on files, which end with the process that holds them, however it ends."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO


def try_lock(file: IO[str], kind: int = fcntl.LOCK_EX) -> bool:
    """Take the lock of an open file (fcntl.LOCK_EX or LOCK_SH), which goes with the file; whether it was free."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_locked(path: Path, kind: int = fcntl.LOCK_SH) -> bool:
    """Whether somebody holds the file's lock: alone (LOCK_SH), or alone or with others (LOCK_EX).

    Makes no file. Several may look at once with LOCK_SH; who looks with LOCK_EX is taken for a holder at that moment.
    """
    try:
        with path.open() as file:
            return not try_lock(file, kind)
    except FileNotFoundError:
        return False
