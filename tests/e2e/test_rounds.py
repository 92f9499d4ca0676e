"""`vcot rounds --num 2` on real vLLM and real TRL: killed in the second round, finished, repeated, and held to the seed."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.ledgers import read_responses
from vcot.pipeline.records import Response
from vcot.training.protocol.job import ADAPTER, JOB, PROGRESS, REFERENCE, TrainJob, TrainProgress, read_record

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

COMMAND = [sys.executable, "-m", "vcot.services.cli", "rounds", "--num", "2"]
NUM_TASKS, K, NUM_QUESTIONS = 24, 8, 18
SMALL = [
    "serve.port=0",
    f"tasks.num_tasks={NUM_TASKS}",
    f"sample.k={K}",
    "sample.max_concurrency=1",  # so that the kill finds it sampling
    f"eval.num_tasks={NUM_QUESTIONS}",
    "eval.temperatures=[0.8]",
    "train.learning_rate=1e-3",  # few steps are to move the policy by more than rounding
    "train.num_evaluations=1",
]


def sampled(run: Path) -> tuple[list[Response], list[Response]]:
    """The responses that pairs are made of: the base's, and those of another policy."""
    drawn = [response for response in read_responses(run) if response.sampling.n == K]
    first = [response for response in drawn if response.checkpoint.kind == "base"]
    return first, [response for response in drawn if response not in first]


def read_jobs(run: Path) -> list[tuple[Path, TrainJob]]:
    """The run's training jobs with their directories, in the order in which they were submitted."""
    found = sorted((run / "training").glob(f"*/{JOB}"), key=lambda path: path.stat().st_mtime_ns)
    return [(path.parent, read_record(path, TrainJob)) for path in found]


def read_pairs(job: TrainJob) -> tuple[set[bytes], set[str]]:
    """The images of a job's pairs, and the digests of the weights that sampled them."""
    splits = [pq.read_table(Path(job.pairs_path) / f"{name}.parquet").to_pylist() for name in ("train", "validation")]
    rows = [row for split in splits for row in split]
    return {image["bytes"] for row in rows for image in row["images"]}, {row["policy"] for row in rows}


def start_loss(directory: Path) -> float:
    """The validation loss before the first update."""
    point = TrainProgress.model_validate_json((directory / PROGRESS).read_text().splitlines()[0])
    assert (point.kind, point.step) == ("validation", 0)
    return point.loss


def has_reference(run: Path, digest: str) -> bool:
    return any((run / REFERENCE).glob(f"{digest.removeprefix('sha256:')[:16]}-*"))


def when_changed(directory: Path) -> dict[str, int]:
    """Of a job's files, all that a second training would write anew."""
    return {name: (directory / name).stat().st_mtime_ns for name in (JOB, PROGRESS, ADAPTER, "worker.log")}


def finish(run: Path, *overrides: str) -> str:
    """The command to its end; what it said."""
    settings = ["--set", *overrides] if overrides else []
    done = subprocess.run([*COMMAND, "--run", str(run), *settings], capture_output=True, text=True, check=False)
    sys.stderr.write(done.stderr)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run killed with -9 while its second round was sampled."""
    run = tmp_path_factory.mktemp("rounds") / "run"
    with subprocess.Popen([*COMMAND, "--run", str(run), "--set", *SMALL], stderr=sys.stderr) as process:
        while len(sampled(run)[1]) < 2 * K and process.poll() is None:
            time.sleep(0.05)
        assert process.poll() is None, "the command ended before it could be killed"
        process.send_signal(signal.SIGKILL)
    return run


def test_a_killed_second_round_is_finished_and_the_first_one_is_not_done_again(run):
    [(first, _)] = read_jobs(run)
    kept, before, total = len(sampled(run)[1]), when_changed(first), NUM_TASKS * K
    assert 2 * K <= kept < total
    said = finish(run)
    assert f"{total} requested = 0 ok + {total} cached" in said, "the first round was sampled again"
    assert f"{total} requested = {total - kept} ok + {kept} cached" in said
    assert when_changed(first) == before, "the first round was trained again"
    assert [len(responses) for responses in sampled(run)] == [total, total]


def test_the_second_round_is_the_first_ones_policy_on_fresh_images(run):
    (_, job), (second, later) = read_jobs(run)
    policy = later.base
    assert (job.round, later.round) == (1, 2)
    assert (policy.name, policy.kind, policy.parent) == (job.checkpoint_name, "merged", job.base.digest)
    assert [{r.checkpoint.digest for r in part} for part in sampled(run)] == [{job.base.digest}, {policy.digest}]
    (images, samplers), (later_images, later_samplers) = read_pairs(job), read_pairs(later)
    assert (samplers, later_samplers) == ({job.base.digest}, {policy.digest})
    assert images
    assert later_images
    assert not images & later_images
    assert later.reference is None, "the last policy, unless the recipe says seed"
    assert has_reference(run, policy.digest)
    assert start_loss(second) == pytest.approx(math.log(2), abs=1e-3)


def read_trend(run: Path) -> list[dict]:
    """Of the report that was written last."""
    found = max((run / "report").rglob("results.json"), key=lambda path: path.stat().st_mtime_ns)
    trend: list[dict] = json.loads(found.read_text())["trend"]
    return trend


def test_the_report_shows_the_trend_over_the_rounds(run):
    (_, job), (_, later) = read_jobs(run)
    trend = read_trend(run)
    assert [(row["number"], row["checkpoint"]["name"]) for row in trend] == [
        (0, "base"),
        (1, job.checkpoint_name),
        (2, later.checkpoint_name),
    ]
    assert len({row["checkpoint"]["digest"] for row in trend}) == 3
    assert [row["lesson"]["reference"] for row in trend[1:]] == ["base", job.checkpoint_name]
    assert all(result["num_scored"] == NUM_QUESTIONS for row in trend for result in row["results"])
    assert sum(row["is_chosen"] for row in trend) == 1
    assert f'<th scope="row">{later.checkpoint_name}' in (run / "report" / "index.html").read_text()


def test_the_same_command_again_asks_and_trains_nothing(run):
    jobs = [when_changed(directory) for directory, _ in read_jobs(run)]
    count = len(read_responses(run))
    assert "serve" not in finish(run)
    assert len(read_responses(run)) == count
    assert [when_changed(directory) for directory, _ in read_jobs(run)] == jobs


def test_with_the_seed_as_reference_only_the_second_round_is_trained_anew(run):
    (first, job), _ = read_jobs(run)
    before, num_sampled = when_changed(first), [len(part) for part in sampled(run)]
    finish(run, "rounds.reference=seed")
    assert when_changed(first) == before
    assert [len(part) for part in sampled(run)] == num_sampled
    directory, held = read_jobs(run)[-1]
    assert (held.round, held.base.name, held.reference) == (2, job.checkpoint_name, job.base)
    assert abs(start_loss(directory) - math.log(2)) > 1e-3, "the last policy is not the seed"
    assert read_trend(run)[-1]["lesson"]["reference"] == "base"
    assert len(list((run / "report").rglob("results.json"))) == 2, "beside the first"
