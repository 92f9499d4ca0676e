"""Whether a run is served, and where: what its gateway says in the run's directory, and the locks that say whether it holds.

Model: a gateway holds `serving.lock` for as long as it lives, and `serving.json` says where it answers while it takes
requests. Where a command started it, that command holds `serving.owners`, shared, so that what belongs to a command that
was killed is no gateway any more, even before it knows.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import ValidationError

from vcot.pipeline.errors import MachineError
from vcot.pipeline.files import write_record
from vcot.pipeline.locks import is_locked, try_lock
from vcot.pipeline.records import Record
from vcot.services.run.directory import Run

_SERVING = "serving.json"
_LOCK = "serving.lock"
_OWNERS = "serving.owners"
_LOOK_S = 0.5
_ENDING_S = 20.0
"""How long a gateway that ends is waited for."""


class Serving(Record):
    """`serving.json`."""

    url: str
    pid: int
    owned: bool = False
    """Whether a command started it, and takes it with it; that command holds `serving.owners`, shared, for as long."""


@contextmanager
def only_gateway(run: Run) -> Iterator[None]:
    """Hold the run's serving lock, which ends with this process however it ends.

    Waits for a gateway that ends: it holds the lock, and announces itself no more.
    """
    with run.path(_LOCK).open("w") as lock:
        began = time.monotonic()
        while not try_lock(lock):
            serving = read_serving(run)
            if time.monotonic() - began > (_LOOK_S if serving else _ENDING_S):
                where = f" at {serving.url} by process {serving.pid}" if serving else ""
                raise MachineError(f"run {run.directory} is served already{where}; use that one, or stop it")
            time.sleep(_LOOK_S / 10)
        yield


def find_gateway(run: Run) -> str | None:
    """The URL of the gateway that serves the run already, if one does."""
    serving = read_serving(run)
    return serving.url if serving is not None and is_served(run) else None


def is_served(run: Run) -> bool:
    """Whether a gateway of this run is up, or on its way; several may look at once."""
    return is_locked(run.directory / _LOCK)


@contextmanager
def announced(run: Run, url: str, owned: bool) -> Iterator[None]:
    """Say in the run where its gateway answers, while it does."""
    path = run.path(_SERVING)
    write_record(path, Serving(url=url, pid=os.getpid(), owned=owned))
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def read_serving(run: Run) -> Serving | None:
    """What is announced; None for a gateway whose command has ended, even if it does not know yet that it ends."""
    try:
        serving = Serving.model_validate_json(run.path(_SERVING).read_bytes())
    except (OSError, ValidationError):
        return None
    if serving.owned and not is_locked(run.path(_OWNERS), fcntl.LOCK_EX):
        return None
    return serving


@contextmanager
def owning(run: Run) -> Iterator[None]:
    """Let the run's gateway be ours, until this block or this process ends, however it ends."""
    with run.path(_OWNERS).open("w") as owners:
        fcntl.flock(owners, fcntl.LOCK_SH)
        yield
