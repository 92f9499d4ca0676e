"""Two real processes on the CPU (gloo), started by accelerate: the same training as one, and what happens when one dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from safetensors.torch import load_file

from vcot.training.protocol.job import ADAPTER, PROGRESS, STATUS, STEPS, TrainProgress, TrainStatus, read_record
from vcot.training.protocol.resume import MARKER

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]
SAME = ("train.lora_dropout=0", "train.epochs=2", "train.learning_rate=1e-3", "train.num_evaluations=3")
WITH_DEEPSPEED = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not among the pins")
SPREADS = ("ddp", "fsdp", *(pytest.param(name, marks=WITH_DEEPSPEED) for name in ("zero2", "zero3")))
# The ranks, saving more often than every ten seconds.
QUICK_RANK = """
import sys; from pathlib import Path
import vcot.training.dpo.fit; vcot.training.dpo.fit.MIN_SAVE_INTERVAL_S = 0.2
from vcot.training.worker.rank import main
if __name__ == "__main__": sys.exit(main(Path(sys.argv[1])))
"""
WORKER = (
    "import sys; from vcot.training.protocol import launch; from vcot.training.worker import jobs; "
    "launch.RANK_MODULE = 'quick_rank'; sys.exit(jobs.main())"
)


def run(job: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vcot.training.worker", str(job)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def read_curve(job: Path) -> list[TrainProgress]:
    return [TrainProgress.model_validate_json(line) for line in (job / PROGRESS).read_text().splitlines()]


@pytest.mark.parametrize("spread", SPREADS)
def test_two_processes_train_as_one_with_the_same_global_batch(spread, make_job):
    """TRL logs the mean over the ranks: with one rank's own loss the curves would differ."""
    one = make_job(*SAME, "train.batch_size=4", num_train=24, num_validation=8)
    parts = ("train.batch_size=2", "train.num_processes=2", f"train.accelerate_config={spread}")
    two = make_job(*SAME, *parts, num_train=24, num_validation=8)
    run(one)
    run(two)
    curves = read_curve(one), read_curve(two)
    assert [(p.kind, p.step, p.num_steps) for p in curves[0]] == [(p.kind, p.step, p.num_steps) for p in curves[1]]
    for name in ("loss", "reward_margin", "reward_accuracy"):
        since = 2 if name == "reward_accuracy" else 0  # until the first update every margin is zero but for rounding
        found = [[getattr(point, name) for point in curve if point.step >= since] for curve in curves]
        assert found[1] == pytest.approx(found[0], abs=1e-5), name
    assert curves[0][-1].loss < curves[0][0].loss - 1e-3, "nothing was learned that could differ"
    adapters = [load_file(job / ADAPTER / "adapter_model.safetensors") for job in (one, two)]
    assert adapters[0].keys() == adapters[1].keys()
    difference = max((adapters[0][name] - adapters[1][name]).abs().max().item() for name in adapters[0])
    assert difference < 1e-4, "Adam divides rounding by rounding, and no more"
    assert read_record(two / STATUS, TrainStatus).num_steps == 12


def test_pairs_that_fill_up_the_ranks_last_batch_count_once(make_job):
    """Nine validation pairs in global batches of four: the last is one pair and three repeats of the first."""
    settings = ("train.lora_dropout=0", "train.epochs=1", "train.learning_rate=1e-2")
    one = make_job(*settings, "train.batch_size=4", num_train=8, num_validation=9)
    two = make_job(*settings, "train.batch_size=2", "train.num_processes=2", num_train=8, num_validation=9)
    run(one)
    run(two)
    alone, shared = (read_curve(job)[-1] for job in (one, two))
    assert alone.kind == shared.kind == "validation"
    assert shared.reward_margin == pytest.approx(alone.reward_margin, abs=1e-4)
    assert shared.reward_accuracy == alone.reward_accuracy == pytest.approx(7 / 9)


def start(job: Path, modules: Path) -> subprocess.Popen[bytes]:
    (modules / "quick_rank.py").write_text(QUICK_RANK)
    path = os.pathsep.join([str(modules), os.environ.get("PYTHONPATH", "")])
    with (job / "worker.log").open("ab") as log:
        command = [sys.executable, "-c", WORKER, str(job)]
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"PYTHONPATH": path})


def find_ranks(job: Path) -> list[int]:
    """Pids of the job's ranks, the second one last."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().split(b"\0")
            environment = (process / "environ").read_bytes()
        except OSError:
            continue
        if (
            b"quick_rank" in command
            and str(job).encode() in command
            and b"accelerate.commands" not in b" ".join(command)
        ):
            rank = next(part for part in environment.split(b"\0") if part.startswith(b"RANK="))
            found[rank] = int(process.name)
    return [found[rank] for rank in sorted(found)]


def wait_until_saved(job: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline and process.poll() is None:
        if list((job / STEPS).glob(f"*/{MARKER}")):
            return
        time.sleep(0.02)
    raise AssertionError((job / "worker.log").read_text()[-3000:])


@pytest.mark.parametrize("spread", SPREADS)
def test_a_killed_rank_ends_the_job_with_a_sentence_and_the_same_command_resumes(spread, make_job, tmp_path):
    settings = ("train.epochs=8", "train.learning_rate=1e-3", "train.batch_size=2", "train.num_processes=2")
    settings += (f"train.accelerate_config={spread}",)
    undisturbed, disturbed = (make_job(*settings, num_train=24, num_validation=4) for _ in range(2))
    assert start(undisturbed, tmp_path).wait() == 0
    process = start(disturbed, tmp_path)
    wait_until_saved(disturbed, process)
    ranks = find_ranks(disturbed)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    assert process.wait() == 1
    status = read_record(disturbed / STATUS, TrainStatus)
    assert (status.state, status.exit_code) == ("failed", 1)
    assert "one of the 2 training processes ended before its time" in status.message
    assert not find_ranks(disturbed), "the other rank lives on"
    assert start(disturbed, tmp_path).wait() == 0
    assert "resuming after step" in (disturbed / "worker.log").read_text()
    weights = [(job / ADAPTER / "adapter_model.safetensors").read_bytes() for job in (undisturbed, disturbed)]
    assert weights[0] == weights[1], "dropout of each rank goes on where it was"
