"""`--verbose`: what a run's servers and trainer write to their logs, shown as they write it.

A thread of its own reads, since a command's steps wait for servers and trainings in ways of their own. Only what is
written while the command goes on is shown; the files keep all.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_PLACES = ("logs/*.log", "training/*/*.log")
"""Within a run directory."""


@contextmanager
def showing_logs(directory: Path, show: Callable[[str, str], None], poll_s: float = 0.5) -> Iterator[None]:
    """Give `show` the name of each log and each line that is added to it, until the block ends and all of it is shown."""
    logs = {path: _Log(_size_of(path)) for path in _list_logs(directory)}
    is_over = threading.Event()

    def follow() -> None:
        is_last = False
        while not is_last:
            is_last = is_over.wait(poll_s)
            for path in _list_logs(directory):
                for line in logs.setdefault(path, _Log()).read(path):
                    show(path.stem, line)

    thread = threading.Thread(target=follow, name="vcot-logs", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _list_logs(directory: Path) -> list[Path]:
    return sorted(path for place in _PLACES for path in directory.glob(place))


def _size_of(path: Path) -> int:
    """In bytes; 0 of a log that is gone."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


@dataclass
class _Log:
    """How far a log is read, in bytes, and the line that it has begun there."""

    position: int = 0
    begun: bytes = b""

    def read(self, path: Path) -> list[str]:
        """The lines that were ended since; of one that was drawn over and over, as a progress bar is, its last state."""
        size = _size_of(path)
        if size < self.position:  # it was set aside, and begun anew (services/engine/logs.py)
            self.position, self.begun = 0, b""
        if size == self.position:
            return []
        with path.open("rb") as file:
            file.seek(self.position)
            added = file.read()
        self.position += len(added)
        *ended, self.begun = (self.begun + added).split(b"\n")
        lines = (line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace") for line in ended)
        return [line for line in lines if line.strip()]
