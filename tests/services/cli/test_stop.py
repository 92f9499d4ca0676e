"""A signal at any moment ends a command with one line, and a second one changes nothing."""

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
