"""Real TRL in real processes: an undisturbed run, a run killed in the middle of an epoch, and the merged checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.checkpoints import verify_checkpoint
from training.job import ADAPTER, JOB, PROGRESS, STATUS, STEPS, MergeReport, TrainJob, TrainStatus, read_record
from training.resume import MARKER

pytestmark = pytest.mark.e2e
OVERRIDES = ("train.epochs=4", "train.learning_rate=1e-3")
# The worker itself, saving more often than its ten seconds.
WORKER = "import sys, training.dpo, training.worker as w; training.dpo.MIN_SAVE_INTERVAL_S = 0.2; sys.exit(w.main())"


def start(job: Path, *arguments: str) -> subprocess.Popen[bytes]:
    with (job / "worker.log").open("ab") as log:
        return subprocess.Popen([sys.executable, "-c", WORKER, str(job), *arguments], stdout=log, stderr=log)


def curve(job: Path) -> list[dict[str, object]]:
    points = [json.loads(line) for line in (job / PROGRESS).read_text().splitlines()]
    return [{key: value for key, value in point.items() if key != "elapsed_s"} for point in points]


def wait_until_saved(job: Path, process: subprocess.Popen[bytes], past: int) -> int:
    """Until a checkpoint later than step `past` is complete and a step after it is done; returns its step."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        steps = [int(path.parent.name.split("-")[1]) for path in (job / STEPS).glob(f"*/{MARKER}")]
        done = max((point["step"] for point in curve(job)), default=0) if (job / PROGRESS).is_file() else 0
        if max(steps, default=0) > past and done > max(steps):
            return max(steps)
        time.sleep(0.02)
    raise AssertionError((job / "worker.log").read_text()[-2000:])


@pytest.mark.timeout(300)
def test_killed_worker_ends_with_the_same_adapter(make_job, tmp_path):
    undisturbed = make_job(*OVERRIDES, num_train=46, num_validation=6)
    assert start(undisturbed, "--merge-into", str(tmp_path / "merged")).wait() == 0

    disturbed = make_job(*OVERRIDES, num_train=46, num_validation=6)
    past = 0
    for _ in range(2):
        process = start(disturbed)
        past = wait_until_saved(disturbed, process, past)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not (disturbed / ADAPTER).exists()
    assert start(disturbed).wait() == 0

    weights = [(job / ADAPTER / "adapter_model.safetensors").read_bytes() for job in (undisturbed, disturbed)]
    assert weights[0] == weights[1]
    assert curve(undisturbed) == curve(disturbed)
    assert (disturbed / "worker.log").read_text().count("resuming after step") == 2

    status = read_record(disturbed / STATUS, TrainStatus)
    assert (status.state, status.num_train, status.num_validation, status.num_steps) == ("done", 46, 6, 48)

    job = read_record(undisturbed / JOB, TrainJob)
    manifest = verify_checkpoint(tmp_path / "merged")
    assert manifest.checkpoint.name == job.checkpoint_name
    assert manifest.checkpoint.parent == job.base.digest
    assert manifest.job == job.key
    assert manifest.canary is not None
    report = read_record(undisturbed / "merge.json", MergeReport)
    assert report.max_abs_logprob < 1e-4 < report.differs_from_base
    assert report.retention == pytest.approx(1, abs=1e-3)


@pytest.mark.timeout(120)
def test_second_worker_is_refused_and_a_done_job_returns_at_once(make_job):
    job = make_job(num_train=10, num_validation=4)
    first = start(job)
    while not (job / STATUS).is_file():
        time.sleep(0.05)
    second = start(job)
    assert second.wait() == 2
    assert "another worker" in (job / "worker.log").read_text()
    assert first.wait() == 0
    begin = time.monotonic()
    command = [sys.executable, "-m", "training.worker", str(job)]
    assert subprocess.run(command, check=False).returncode == 0
    assert time.monotonic() - begin < 3
