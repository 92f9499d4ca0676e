"""How a command begins, with whatever streams it is given, and ends: at a signal with one line, at a second with no more."""

import os
import signal
import subprocess
import sys
import time

import pytest

from vcot.services.cli.stop import SAID

WAITING = """
import sys, time
from vcot.services.cli import opening, outcome
def wait(*_):
    print("working", flush=True)
    time.sleep(60)
opening.execute = wait
sys.argv = ["vcot", "pair"]
outcome.main()
"""
IMPORTING = """
import builtins, sys, time
from vcot.services.cli import start
real = builtins.__import__
def slow(name, *rest):
    if name == "cyclopts":
        print("importing", flush=True)
        time.sleep(60)
    return real(name, *rest)
builtins.__import__ = slow
start.main()
"""


@pytest.mark.parametrize("code", [IMPORTING, WAITING], ids=["importing", "working"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("num_signals", [1, 2])
def test_a_signal_ends_a_command_with_a_line(code, number, num_signals):
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    assert process.stdout.readline().strip() in ("importing", "working")
    for _ in range(num_signals):
        process.send_signal(number)
        time.sleep(0.02)
    _, said = process.communicate(timeout=20)
    assert said == f"vcot: {SAID}\n"
    assert process.returncode in (128 + number, -number)  # a shell shows both alike


STREAMS = """
import os, subprocess, sys
from vcot.services.cli import start
start.open_streams()
with open("ledger", "w") as ledger:
    os.write(1, b"lost")
    print("lost", file=sys.stderr)
    subprocess.run(["sh", "-c", "echo lost; echo lost >&2; cat"], check=True)
"""


def test_what_is_written_to_a_closed_stream_lands_in_no_file_of_the_run(tmp_path):
    command = 'exec "$0" -c "$1" <&- >&- 2>&-'
    done = subprocess.run(["bash", "-c", command, sys.executable, STREAMS], cwd=tmp_path, timeout=60, check=False)
    assert (done.returncode, (tmp_path / "ledger").read_text()) == (0, "")


def test_a_command_that_prints_to_a_closed_stream_ends_well():
    code = "from vcot.services.cli.start import main; main()"
    done = subprocess.run(
        ["bash", "-c", 'exec "$0" -c "$1" recipe >&-', sys.executable, code],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
