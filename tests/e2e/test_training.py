"""Real TRL in real processes: an undisturbed run, one killed in the middle of an epoch, and the merged checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from vcot.pipeline.identity import verify_checkpoint
from vcot.training.protocol.job import (
    ADAPTER,
    JOB,
    MERGE_REPORT,
    PROGRESS,
    STATUS,
    STEPS,
    MergeReport,
    TrainJob,
    TrainStatus,
    read_record,
)
from vcot.training.protocol.resume import MARKER

pytestmark = pytest.mark.e2e
OVERRIDES = ("train.epochs=4", "train.learning_rate=1e-3")
METHODS = ("train.method=dpo", "train.method=mdpo")
# The worker itself, saving more often than its ten seconds.
WORKER = (
    "import sys; from vcot.training.dpo import fit; from vcot.training.worker import jobs; "
    "fit.MIN_SAVE_INTERVAL_S = 0.2; sys.exit(jobs.main())"
)


def start(job: Path, *arguments: str) -> subprocess.Popen[bytes]:
    with (job / "worker.log").open("ab") as log:
        return subprocess.Popen([sys.executable, "-c", WORKER, str(job), *arguments], stdout=log, stderr=log)


def curve(job: Path) -> list[dict[str, Any]]:
    points = [json.loads(line) for line in (job / PROGRESS).read_text().splitlines()]
    return [{key: value for key, value in point.items() if key != "elapsed_s"} for point in points]


def run_worker(job: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vcot.training.worker", str(job)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def wait_until_saved(job: Path, process: subprocess.Popen[bytes]) -> None:
    """Until a checkpoint is complete and a step after it is done: the middle of an epoch of 12 steps."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        saved = [int(path.parent.name.split("-")[1]) for path in (job / STEPS).glob(f"*/{MARKER}")]
        if saved and max(point["step"] for point in curve(job)) > max(saved):
            return
        time.sleep(0.02)
    raise AssertionError((job / "worker.log").read_text()[-2000:])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("method", [pytest.param(METHODS[0], marks=pytest.mark.slow), *METHODS[1:]])
def test_killed_worker_ends_with_the_same_adapter(make_job, tmp_path, method):
    undisturbed = make_job(method, *OVERRIDES, num_train=46, num_validation=6)
    first = start(undisturbed, "--merge-into", str(tmp_path / "merged"))
    while not (undisturbed / STATUS).is_file():
        time.sleep(0.05)
    second = run_worker(undisturbed)
    assert (second.returncode, "another worker holds" in second.stderr) == (2, True)
    assert first.wait() == 0
    begin = time.monotonic()
    assert run_worker(undisturbed).returncode == 0
    assert time.monotonic() - begin < 3, "a job that is done returns at once"

    disturbed = make_job(method, *OVERRIDES, num_train=46, num_validation=6)
    process = start(disturbed)
    wait_until_saved(disturbed, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (disturbed / ADAPTER).exists()
    assert start(disturbed).wait() == 0
    assert "resuming after step" in (disturbed / "worker.log").read_text()

    weights = [(job / ADAPTER / "adapter_model.safetensors").read_bytes() for job in (undisturbed, disturbed)]
    assert weights[0] == weights[1]
    assert curve(undisturbed) == curve(disturbed)
    status = read_record(disturbed / STATUS, TrainStatus)
    assert (status.state, status.num_train, status.num_validation, status.num_steps) == ("done", 46, 6, 48)

    job = read_record(undisturbed / JOB, TrainJob)
    manifest = verify_checkpoint(tmp_path / "merged")
    assert (manifest.job, manifest.checkpoint.name, manifest.checkpoint.parent) == (
        job.key,
        job.checkpoint_name,
        job.base.digest,
    )
    assert manifest.canary is not None
    report = read_record(tmp_path / "merged" / MERGE_REPORT, MergeReport)
    assert report.max_abs_logprob < 1e-4 < report.differs_from_base
    assert report.retention.kept == pytest.approx(1, abs=1e-3)
