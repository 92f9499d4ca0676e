"""The bench of the trainer runs, and prints what it promises as its last line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.mark.timeout(600)
def test_bench_train_prints_its_figures():
    command = [sys.executable, "-m", "bench.train", "--shape", "tiny", "--rounds", "1", "--steps", "1"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["cached_vs_trl"] > 0
    assert found["shared_prompt_vs_trl"] > 0
    assert set(found["step_s"]) == {"trl", "cached", "shared"}
    assert 0.5 < found["prompt_share"] < 1
