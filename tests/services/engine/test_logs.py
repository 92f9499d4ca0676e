"""Logs that others hold open stay bounded, and keep their last lines."""

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

from vcot.services.engine.logs import MAX_LOG_BYTES, bound, keep_bounded

WRITER = """
import sys, time
for number in range(2000):
    sys.stdout.write(f"line {number:05}\\n")
    sys.stdout.flush()
    if number % 100 == 0:
        time.sleep(0.02)
"""


def test_a_small_log_stays_as_it_is(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text("a" * 100)
    bound(log, 100)
    bound(tmp_path / "absent.log", 100)
    assert [path.name for path in tmp_path.iterdir()] == ["a.log"]


def test_a_log_that_was_never_bounded_keeps_its_end(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text("old\n" * 1000 + "new\n")
    bound(log, 100)
    assert log.read_text() == ""
    aside = (tmp_path / "a.log.1").read_text()
    assert len(aside) == 100
    assert aside.endswith("old\nnew\n")


def test_what_a_process_appends_stays_bounded(tmp_path: Path) -> None:
    log, largest = tmp_path / "child.log", 0
    with log.open("ab") as output:
        child = subprocess.Popen([sys.executable, "-c", WRITER], stdout=output)
    while child.poll() is None:
        time.sleep(0.005)
        bound(log, 4000)
        largest = max(largest, sum(path.stat().st_size for path in tmp_path.iterdir()))
    assert largest < 12_000, "of 22,000 bytes"
    last = (tmp_path / "child.log.1").read_text() + log.read_text()
    assert last.endswith("line 01999\n")
    assert "\0" not in last, "a writer that does not append leaves a hole"


async def test_the_gateway_looks_after_each_log_of_its_run(tmp_path: Path) -> None:
    logs = [tmp_path / name for name in ("gateway.log", "vllm.log", "vllm-1.log")]
    for log in logs:
        log.touch()
        os.truncate(log, MAX_LOG_BYTES + 1)
    looking = asyncio.create_task(keep_bounded(tmp_path, 0.01))
    async with asyncio.timeout(60):
        while any(log.stat().st_size for log in logs):  # noqa: ASYNC110 - what another task does to files
            await asyncio.sleep(0.01)
    looking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await looking
