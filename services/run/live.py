"""What the command that writes to a run is doing, in a file beside its lock, for whoever looks from elsewhere.

The command's listener is wrapped: each event goes on to it, and progress replaces the file at most once a second. It is for
looking only: no step reads it, and a disk that cannot take it stops nothing.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vcot.pipeline.errors import InputError, VcotError
from vcot.pipeline.files import PARTIAL, read_record, write_record
from vcot.pipeline.records import Record, StageCount
from vcot.pipeline.report import Accounted, Began, Ended, Event, Progress, Report, Waiting

LIVE = "running.json"
_EVERY_S = 1.0
_WINDOW_S = 60.0
"""Over how long the rate is measured."""


class Live(Record):
    """`running.json`: a command that writes to the run, or the last one that did. Times are in seconds since 1970."""

    command: str
    pid: int
    began_at: float
    updated_at: float
    stage: str = ""
    what: str = ""
    """What the stage works on."""
    waiting: str = ""
    """What it waits for, where it does."""
    unit: str = ""
    """Of `done` and `total`, as `responses`."""
    done: int = 0
    total: int = 0
    """0 while it is not known."""
    note: str = ""
    per_s: float | None = None
    """Units a second, over the last minute."""
    accounts: tuple[StageCount, ...] = ()
    """Of the stages that this command ended; what earlier commands did is `cached` in them."""
    end: str | None = None
    """How the command ended: `done`, or its sentence; None while it runs, and after `kill -9`."""

    @property
    def left_s(self) -> float | None:
        """Seconds until `total` at this rate; None where that cannot be told."""
        return (self.total - self.done) / self.per_s if self.per_s and self.total and self.end is None else None


class _Recorder:
    """Mutated by the events of one command."""

    def __init__(self, path: Path, command: str, listener: Report, clock: Callable[[], float]) -> None:
        self._path, self._listener, self._clock = path, listener, clock
        self._live = Live(command=command, pid=os.getpid(), began_at=clock(), updated_at=clock())
        self._seen: deque[tuple[float, int]] = deque()
        self._written_at = float("-inf")

    def __call__(self, event: Event) -> None:
        self._listener(event)
        match event:
            case Began(stage, what, is_aside):
                if not is_aside:
                    self._change(stage=stage, what=what, waiting="", **_NO_PROGRESS)
            case Progress(unit, done, total, note):
                self._change(unit=unit, done=done, total=total, note=note, per_s=self._measure(done))
            case Waiting(text):
                self._change(waiting=text)
            case Ended():
                self._seen.clear()
                self._change(waiting="", per_s=None)
            case Accounted(count):
                self._change(accounts=(*self._live.accounts, count))
            case _:
                return
        if self._clock() - self._written_at >= _EVERY_S or not isinstance(event, Progress):
            self.write()

    def _change(self, **fields: object) -> None:
        self._live = self._live.model_copy(update={**fields, "updated_at": self._clock()})

    def _measure(self, done: int) -> float | None:
        """Units a second; what was there when the work began is no rate."""
        now = self._clock()
        if self._seen and done < self._seen[-1][1]:
            self._seen.clear()
        self._seen.append((now, done))
        while self._seen[0][0] < now - _WINDOW_S and len(self._seen) > 2:
            self._seen.popleft()
        (since, before), span = self._seen[0], now - self._seen[0][0]
        return (done - before) / (now - since) if span > 0 else None

    def end(self, how: str) -> None:
        self._change(end=how, waiting="")
        self.write()

    def write(self) -> None:
        """Replace the file, where the disk allows."""
        self._written_at = self._clock()
        with suppress(OSError, InputError):
            write_record(self._path, self._live)


_NO_PROGRESS = {"unit": "", "done": 0, "total": 0, "note": "", "per_s": None}


@contextmanager
def recording(
    directory: Path, command: str, listener: Report, *, clock: Callable[[], float] = time.time
) -> Iterator[Report]:
    """A listener that also keeps the run's `running.json`; at the end it says how the command ended."""
    for partial in directory.glob(f".{LIVE}{PARTIAL}"):  # a killed command's
        partial.unlink(missing_ok=True)
    recorder = _Recorder(directory / LIVE, command, listener, clock)
    recorder.write()
    try:
        yield recorder
    except VcotError as error:
        recorder.end(str(error))
        raise
    except BaseException as error:
        recorder.end(f"stopped ({type(error).__name__})")
        raise
    recorder.end("done")


def read_live(directory: Path) -> Live | None:
    """The file; None where no command wrote one. Raises InputError where it is damaged."""
    return read_record(directory / LIVE, Live, remedy="the next command on the run writes it anew")


def find_holder(directory: Path, locks: Path = Path("/proc/locks")) -> int | None:
    """The process that holds the run's lock: 0 where none does, None where the system does not tell.

    Read from Linux's list of locks: to try the lock would turn away a command that begins at that moment.
    """
    try:
        number, listed = (directory / "lock").stat().st_ino, locks.read_text("ascii", "replace")
    except FileNotFoundError:
        return 0 if locks.exists() else None
    except OSError:
        return None
    for line in listed.splitlines():
        fields = line.split()
        if "->" not in fields and "FLOCK" in fields and fields[5].rpartition(":")[2] == str(number):
            return int(fields[4])
    return 0


def say_span(seconds: float) -> str:
    """`12 s`, `4 min` or `2.5 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
