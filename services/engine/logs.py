"""A run's logs stay bounded, however long its servers run: each keeps its last part, and one older part beside it.

Model: vLLM and other child processes hold their logs open for appending, and cannot be asked to open another. So a log that
has grown to MAX_LOG_BYTES is copied to NAME.1 and emptied, as logrotate's `copytruncate` does; what is appended next stands
at its beginning. The gateway looks at the logs of its run every few seconds.

Limits: what is written between the copy and the cut is lost (a few lines); between two looks a log may grow further.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

MAX_LOG_BYTES = 32 * 2**20


async def keep_bounded(folder: Path, poll_s: float = 10.0) -> None:
    """Bound all logs in a folder, until cancelled."""
    while True:
        for path in folder.glob("*.log"):
            await asyncio.to_thread(bound, path)
        await asyncio.sleep(poll_s)


def bound(path: Path, max_bytes: int = MAX_LOG_BYTES) -> None:
    """Set a log aside that is too large; the one that was set aside before is gone."""
    if not path.is_file() or path.stat().st_size <= max_bytes:
        return
    partial = path.with_name(f".{path.name}.partial")
    try:
        with path.open("rb") as log, partial.open("wb") as aside:
            log.seek(max(0, path.stat().st_size - max_bytes))  # a burst, or a log of before there was a bound
            shutil.copyfileobj(log, aside)
        partial.replace(path.with_name(f"{path.name}.1"))
    except OSError:  # a full disk, which emptying the log helps
        partial.unlink(missing_ok=True)
    os.truncate(path, 0)
