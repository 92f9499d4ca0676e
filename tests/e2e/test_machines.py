"""One training over two machines, each a network namespace of its own: as on one, and what happens when one is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.e2e.test_distributed import QUICK_RANK, SAME, read_curve
from vcot.pipeline.files import write_record
from vcot.training.protocol.job import ADAPTER, JOB, STATUS, STEPS, TrainJob, TrainStatus, read_record
from vcot.training.protocol.machines import CALL
from vcot.training.protocol.resume import MARKER, step_of

ADDRESSES = ("10.99.7.1", "10.99.7.2")
# Either command of a machine, saving often, and noticing soon that another machine has left.
COMMAND = """
import sys; from vcot.training.protocol import launch
launch.RANK_MODULE = 'quick_rank'; launch._LEFT_S = 10
if sys.argv[1] == "help":
    from pathlib import Path; from vcot.training.worker import share
    sys.exit(share.main(Path(sys.argv[2]), int(sys.argv[3])))
from vcot.training.worker import jobs; sys.exit(jobs.main(sys.argv[2:]))
"""
HELPER = """
import asyncio, sys; from pathlib import Path
from vcot.services.jobs import submitted, trainer
from vcot.services.engine.lifeline import keeper_command
trainer.keeper_command = lambda command, grace_s: keeper_command(
    [sys.executable, "-c", Path(sys.argv[2]).read_text(), "help", *command[4:]], grace_s)
asyncio.run(submitted.work(Path(sys.argv[1]), lambda message: print(message, flush=True)))
"""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Machine:
    """A namespace with an address, and what was started in it."""

    def __init__(self, name: str, address: str, modules: Path) -> None:
        self.name, self.address, self._modules = name, address, modules
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, log: Path, *arguments: str) -> subprocess.Popen[bytes]:
        path = os.pathsep.join([str(self._modules), os.environ.get("PYTHONPATH", "")])
        own = {"PYTHONPATH": path, "RES_OPTIONS": "timeout:1 attempts:1"}  # nobody answers here who is asked for a name
        command = ["ip", "netns", "exec", self.name, sys.executable, *arguments]
        with log.open("ab") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, env=os.environ | own
            )
        self._started.append(process)
        return process

    def pids(self) -> list[int]:
        found = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True).stdout
        return [int(pid) for pid in found.split()]

    def end(self) -> None:
        for pid in self.pids():
            os.kill(pid, signal.SIGKILL)
        for process in self._started:
            process.wait()


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[tuple[Machine, Machine]]:
    (tmp_path / "quick_rank.py").write_text(QUICK_RANK)
    names = [f"vcot{os.getpid()}{letter}" for letter in "ab"]
    made = tuple(Machine(name, address, tmp_path) for name, address in zip(names, ADDRESSES, strict=True))
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "eth7", "netns", names[0], "type", "veth", "peer", "name", "eth7", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth7")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "eth7", "up")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces can be made here ({error})")
    try:
        yield made[0], made[1]
    finally:
        for machine in made:
            machine.end()
            ip("netns", "del", machine.name)


def submit(runs: Path, name: str, job: Path) -> Path:
    directory = runs / name / "training" / "key"
    directory.mkdir(parents=True)
    write_record(directory / JOB, read_record(job / JOB, TrainJob))
    return directory


def train(machine: Machine, job: Path) -> subprocess.Popen[bytes]:
    return machine.start(job / "worker.log", "-c", COMMAND, "train", str(job))


def assist(machine: Machine, runs: Path, tmp_path: Path) -> subprocess.Popen[bytes]:
    (tmp_path / "command.py").write_text(COMMAND)
    return machine.start(tmp_path / "helper.log", "-c", HELPER, str(runs), str(tmp_path / "command.py"))


def logs(job: Path, tmp_path: Path) -> str:
    files = [*job.glob("*.log"), tmp_path / "helper.log"]
    return "\n".join(f"== {file.name}\n{file.read_text()[-3000:]}" for file in files if file.exists())


TWO = ("train.num_processes=2", "train.num_machines=2", f"train.address={ADDRESSES[0]}")
pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1200)]


def test_two_machines_train_as_one(make_job, machines, tmp_path):
    """The helper waits before there is a job, and waits again afterwards."""
    first, second = machines
    one = make_job(*SAME, "train.batch_size=4", num_train=24, num_validation=8)
    assert subprocess.run([sys.executable, "-m", "vcot.training.worker", str(one)], check=False).returncode == 0
    helping = assist(second, tmp_path / "runs", tmp_path)
    parts = (*SAME, *TWO, "train.batch_size=2", "train.accelerate_config=fsdp")
    two = submit(tmp_path / "runs", "run", make_job(*parts, num_train=24, num_validation=8))
    assert train(first, two).wait() == 0, logs(two, tmp_path)
    curves = read_curve(one), read_curve(two)
    assert [(p.kind, p.step, p.num_steps) for p in curves[0]] == [(p.kind, p.step, p.num_steps) for p in curves[1]]
    assert [p.loss for p in curves[1]] == pytest.approx([p.loss for p in curves[0]], abs=1e-5)
    adapters = [load_file(job / ADAPTER / "adapter_model.safetensors") for job in (one, two)]
    assert max((adapters[0][name] - adapters[1][name]).abs().max().item() for name in adapters[0]) < 1e-4
    wait_until(lambda: "key: done" in (tmp_path / "helper.log").read_text(), two, tmp_path)
    assert helping.poll() is None
    assert not (two / CALL).exists()


def wait_until(true, job: Path, tmp_path: Path) -> None:
    deadline = time.monotonic() + 240  # on a busy machine it may be a minute until two have met
    while not true():
        assert time.monotonic() < deadline, logs(job, tmp_path)
        time.sleep(0.05)


def wait_until_saved_after(step: int, job: Path, tmp_path: Path) -> int:
    """Wait for a complete checkpoint of a later step; which one that is."""

    def latest() -> int:
        return max((step_of(marker.parent) for marker in (job / STEPS).glob(f"*/{MARKER}")), default=-1)

    wait_until(lambda: latest() > step, job, tmp_path)
    return latest()


def lose_power(machine: Machine) -> None:
    """The network falls silent, with no connection closed, before the processes are gone."""
    ip("-n", machine.name, "link", "set", "eth7", "down")
    machine.end()


def test_a_machine_that_loses_its_power_ends_the_job_for_the_other_and_the_same_command_resumes(
    make_job, machines, tmp_path
):
    settings = ("train.epochs=20", "train.learning_rate=1e-3", "train.batch_size=2", *TWO)
    undisturbed, disturbed = (
        submit(tmp_path / "runs", name, make_job(*settings, num_train=24, num_validation=4)) for name in ("a", "b")
    )
    first, second = machines
    helping = assist(second, tmp_path / "runs", tmp_path)
    assert train(first, undisturbed).wait() == 0, logs(undisturbed, tmp_path)

    training = train(first, disturbed)
    step = wait_until_saved_after(-1, disturbed, tmp_path)
    lose_power(second)
    assert training.wait(90) == 1, logs(disturbed, tmp_path)
    status = read_record(disturbed / STATUS, TrainStatus)
    assert status.state == "failed"
    assert "machine 2 of 2 left first; worker-1.log names it" in status.message
    assert not first.pids(), "a rank lives on"
    ip("-n", second.name, "link", "set", "eth7", "up")
    helping = assist(second, tmp_path / "runs", tmp_path)

    train(first, disturbed)
    wait_until_saved_after(step, disturbed, tmp_path)
    lose_power(first)
    wait_until(lambda: "ended with" in (tmp_path / "helper.log").read_text(), disturbed, tmp_path)
    ip("-n", first.name, "link", "set", "eth7", "up")

    assert train(first, disturbed).wait() == 0, logs(disturbed, tmp_path)
    assert helping.poll() is None, "it waits for the next call"
    for log in ("worker.log", "worker-1.log"):
        assert (disturbed / log).read_text().count("resuming after step") == 2
    weights = [(job / ADAPTER / "adapter_model.safetensors").read_bytes() for job in (undisturbed, disturbed)]
    assert weights[0] == weights[1]
