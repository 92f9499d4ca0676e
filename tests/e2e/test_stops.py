"""SIGTERM in the middle of each step: one line, exit code 143, nothing left behind; the same command goes on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.compose.engine import until
from vcot.services.cli.stop import SAID

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1200)]
ROOT = Path(__file__).parents[2]
SETTINGS = ("serve.port=0", "tasks.num_tasks=48", "eval.num_tasks=36", "sweep.learning_rate=[1e-4, 3e-4]")
STEPS = {
    "sample": r"\d+/384 responses",
    "judge": r"by verifier",
    "pair": r"by best_worst",
    "train": r"reference log-probs of|steps, about",
    "merge": r"merge ",
    "parity": r"parity ",
    "probe": r"probe |responses, about",
    "eval": r"\d+/144 responses",
    "sweep": r"steps, about|reference log-probs of|sweep ",
}
"""What each step says when it is under way, in the order in which one needs another."""


def start(command, run, output=subprocess.PIPE):
    line = [sys.executable, "-m", "vcot.services.cli", command, "--run", str(run), "--recipe", "nano"]
    line += [part for setting in SETTINGS for part in ("--set", setting)]
    environment = os.environ | {"NO_COLOR": "1", "COLUMNS": "300", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(line, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True)


def list_processes(run):
    """Of this machine, those that were told of the run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [path.parent.name] if str(run).encode() in path.read_bytes() else []
        except OSError:
            continue
    return found


def stop_when(process, pattern):
    """What it said until then and afterwards; whether it was stopped before its end."""
    said = ""
    for line in process.stdout:
        said += line
        if re.search(pattern, line):
            process.send_signal(signal.SIGTERM)
            break
    return said + process.communicate(timeout=120)[0]


@pytest.fixture
def run(tmp_path):
    """A run that is served, so that no step waits for a server of its own."""
    served = start("serve", tmp_path / "run", subprocess.DEVNULL)
    until((tmp_path / "run" / "serving.json").is_file, 120)
    yield tmp_path / "run"
    served.send_signal(signal.SIGINT)
    served.communicate(timeout=60)
    assert served.returncode == 0


def test_each_step_stops_in_order_and_goes_on(run):
    servers = set(list_processes(run))
    for command, pattern in STEPS.items():
        process = start(command, run)
        said = stop_when(process, pattern)
        assert process.returncode in (143, 0), f"{command}: {said}"
        assert process.returncode == 0 or said.rstrip().endswith(f"vcot: {SAID}"), f"{command}: {said}"
        assert "Traceback" not in said, f"{command}: {said}"
        until(lambda: servers.issuperset(list_processes(run)), 30)
        again = start(command, run)
        done = again.communicate(timeout=300)[0]
        assert again.returncode == 0, f"{command}: {done}"
        if command in ("sample", "eval") and process.returncode:
            cached = [int(number) for number in re.findall(r"ok \+ (\d+) cached", done)]
            assert any(cached), f"{command} asked for everything again: {done}"
