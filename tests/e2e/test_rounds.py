"""Two rounds as a user runs them: real vLLM and TRL, killed while the second samples, finished by the same command."""

import json
import re
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

SIZES = [
    "serve.port=0",
    "tasks.num_tasks=40",
    "eval.num_tasks=18",
    "eval.temperatures=[0.4]",
    'eval.images=["true","blank"]',
    "train.epochs=1",
    "train.num_evaluations=1",
    "rounds.reference=seed",
]
COMMAND = [sys.executable, "-m", "services.cli", "rounds", "--num", "2"]


def sampled_by_policies(run):
    """How many responses the second round's starting policy gave to the thought prompt."""
    if not (run / "ledger.sqlite").is_file():
        return 0
    with sqlite3.connect(run / "ledger.sqlite") as connection:
        query = "SELECT count(*) FROM records WHERE kind = 'Response' AND ok = 1 AND body LIKE ? AND body LIKE ?"
        try:
            return connection.execute(query, ('%"name":"dpo-%', "%thought_specific%")).fetchone()[0]
        except sqlite3.OperationalError:  # not made yet
            return 0


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that was killed with -9 while its second round sampled."""
    run = tmp_path_factory.mktemp("rounds") / "run"
    slow = ["sample.max_concurrency=1"]  # so that the kill finds it sampling
    arguments = [*COMMAND, "--run", str(run), "--set", *SIZES, *slow]
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=sys.stderr) as process:
        while sampled_by_policies(run) < 16 and process.poll() is None:
            time.sleep(0.05)
        assert process.poll() is None, "the rounds ended before they could be killed"
        process.send_signal(signal.SIGKILL)
    return run


def test_the_same_command_goes_on_with_the_round_that_was_killed(run):
    kept = sampled_by_policies(run)
    done = subprocess.run([*COMMAND, "--run", str(run)], capture_output=True, text=True, check=False)
    sys.stderr.write(done.stderr)
    assert done.returncode == 0, done.stderr
    assert re.search(r"320 requested = 0 ok \+ 320 cached", done.stderr)
    assert re.search(rf"320 requested = {320 - kept} ok \+ {kept} cached", done.stderr)
    results = json.loads((run / "report" / "results.json").read_text())
    base, first, second = results["trend"]
    assert [row["checkpoint"]["parent"] for row in (first, second)] == [
        row["checkpoint"]["digest"] for row in (base, first)
    ]
    assert second["checkpoint"]["name"].startswith("dpo-r2-")
    assert (first["lesson"]["reference"], second["lesson"]["reference"]) == ("base", "base")
    assert sum(row["is_chosen"] for row in results["trend"]) == 1
    assert {row["shown"] for row in results["reliance"]} == {"blank"}
    assert len({row["checkpoint"]["digest"] for row in results["results"]}) == 2
