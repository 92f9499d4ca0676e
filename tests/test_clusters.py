"""The files that make a cluster (docs/clusters), as far as they can be tried without one."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from vcot.services.recipes.recipe import load_recipe

FOLDER = Path(__file__).parent.parent / "docs" / "clusters"
SPY = """#!/bin/bash
echo "$(basename "$0") $*" >> "$CALLS"
"""
SCONTROL = """#!/bin/bash
printf 'a1\\na2\\na3\\n'
"""
SRUN = """#!/bin/bash
echo "srun $*" >> "$CALLS"
trap 'echo "srun ended" >> "$CALLS"; exit' TERM
while :; do sleep 0.05; done
"""
VCOT = """#!/bin/bash
trap 'echo "vcot was told" >> "$CALLS"; exit 7' TERM
echo "vcot $*" >> "$CALLS"
if [ "$VCOT_ENDS" = 1 ]; then
    until [ "$(grep -c "^srun --" "$CALLS")" = 2 ]; do sleep 0.05; done
    exit 0
fi
while :; do sleep 0.05; done
"""


@pytest.fixture
def job(tmp_path):
    """Starts the SLURM script among programs that say what they were asked; and reads that."""
    for name, text in {"scontrol": SCONTROL, "srun": SRUN, "vcot": VCOT, "sleep": SPY}.items():
        (tmp_path / name).write_text(text.replace("sleep 0.05", "/bin/sleep 0.05"))
        (tmp_path / name).chmod(0o755)
    calls = tmp_path / "calls"

    def start(**environment):
        slurm = {"SLURM_NNODES": "3", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_NODELIST": "a[1-3]", "CALLS": str(calls)}
        path = f"{tmp_path}:{os.environ['PATH']}"
        with calls.open("a") as said:
            script = ["bash", str(FOLDER / "slurm.sh")]
            return subprocess.Popen(script, env={"PATH": path, **slurm, **environment}, stderr=said)

    return start, lambda: calls.read_text().splitlines()


def test_a_slurm_job_makes_the_cluster_runs_and_ends_both(job):
    start, calls = job
    done = start(RUN="/shared/r", VCOT_ENDS="1")
    assert done.wait(30) == 0, calls()
    head, other, run = (next(call for call in calls() if mark in call) for mark in ("--head", "--address", "vcot run"))
    assert "--nodelist=a1 ray start --head --port=6379 --block" in head
    assert "--nodes=2 --ntasks=2 --exclude=a1 ray start --address=a1:6379 --block" in other
    assert run == "vcot run --run /shared/r --recipe paper --set serve.ray_address=a1:6379 serve.replicas=24"


def test_slurms_warning_is_passed_on_and_the_runs_status_is_the_jobs(job):
    start, calls = job
    started = start(RUN="/shared/r")
    while not any("vcot run" in call for call in calls()):
        assert started.poll() is None, calls()
    started.terminate()
    assert started.wait(30) == 7
    assert "vcot was told" in calls()


def test_a_slurm_job_without_a_run_says_what_is_missing(job):
    start, calls = job
    assert start().wait(30) != 0
    assert "set RUN to a folder that all nodes share" in calls()[0]


def test_rays_launcher_takes_its_file():
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(yaml.safe_load((FOLDER / "ray.yaml").read_text())))


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.name)
def test_what_each_has_vcot_do_is_a_run_with_settings_that_there_are(path):
    text = path.read_text().replace("\\\n", " ")
    if path.suffix == ".yaml" and (job := yaml.safe_load(text)).get("kind"):
        text = job["spec"]["entrypoint"]
    commands = re.findall(r"vcot run (--run \S+ --recipe .*--set [^'&\n]*)", text)
    assert commands
    for command in commands:
        words = shlex.split(re.sub(r"\$\(\(.*?\)\)|\$\{?\w+\}?", "7", command.replace('"', "")))
        recipe = load_recipe("paper", words[words.index("--set") + 1 :])
        assert recipe.serve.ray_address
        assert recipe.serve.replicas >= 7
