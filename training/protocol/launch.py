"""One training over several processes of this machine, started by `accelerate launch`: DDP, FSDP or DeepSpeed.

Model: the worker stays one process, which holds the job, looks at the pairs and merges; only the training in between is
done by the ranks (training/worker/rank.py), which are gone when it goes on. What depends on a clock, or is written to the
job's directory, is for the first rank to decide or to do. A rank that dies takes the others with it (accelerate's agent
sees to that), and the same command resumes from the last complete checkpoint.

Limits: one machine. What is shipped runs without GPUs, too (gloo).
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path

from vcot.pipeline.errors import InputError, MachineError, ServerError
from vcot.training.protocol.job import digest_losses, read_status
from vcot.training.protocol.trackers import check_account
from vcot.training.protocol.train_sections import TrainSection

RANK_MODULE = "vcot.training.worker.rank"
_BUNDLED = ("ddp", "fsdp", "zero2", "zero3")
_OF_RANKS = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "PYTHONSAFEPATH": "1"}
"""The ranks of one machine need not be heard elsewhere, and import nothing from the folder that they are started in."""


def is_distributed(recipe: TrainSection) -> bool:
    """Whether the training is for processes of their own; one GPU can want them, too, for a DeepSpeed config."""
    return recipe.num_processes > 1 or recipe.accelerate_config != "ddp"


def find_config(name: str) -> Path:
    """The accelerate config file of a bundled name, or at a path. Raises InputError."""
    bundled = Path(str(resources.files("vcot.training").joinpath("accelerate", f"{name}.yaml")))
    found = next((path for path in (bundled, Path(name).expanduser()) if path.is_file()), None)
    if found is None:
        names = ", ".join(sorted(path.stem for path in bundled.parent.glob("*.yaml")))
        raise InputError(f"train.accelerate_config = {name!r} is neither one of {names} nor a file; name one of them")
    return found


def check_machine(recipe: TrainSection, num_gpus: int) -> None:
    """Raise MachineError where the processes that the recipe asks for would not run, or not as it says."""
    if num_gpus and recipe.num_processes > num_gpus:
        raise MachineError(
            f"train.num_processes = {recipe.num_processes}, but this machine has {num_gpus} GPU(s); lower it, and raise "
            "train.gradient_accumulation by as much"
        )
    if not num_gpus and recipe.accelerate_config not in _BUNDLED:
        raise MachineError(
            f"train.accelerate_config = {recipe.accelerate_config!r} needs GPUs: if it asks for FSDP, accelerate would "
            "silently do DDP without them; use fsdp here"
        )


def check_installed(recipe: TrainSection) -> None:
    """See that what the recipe names is here: losses of one's own, the accelerate config, the packages that it, 4-bit
    weights and trackers need, and a key for wandb.

    Raises InputError or MachineError. Free of torch, so that it can be said before anything is sampled.
    """
    digest_losses(recipe)
    if "DEEPSPEED" in find_config(recipe.accelerate_config).read_text("utf-8"):
        _require("deepspeed", f"train.accelerate_config = {recipe.accelerate_config!r}")
    if recipe.base_weights == "nf4":
        _require("bitsandbytes", "train.base_weights = nf4")
    for tracker in recipe.report_to:
        _require(tracker, "train.report_to")
    if "wandb" in recipe.report_to:
        check_account()


def _require(package: str, wanted_by: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise MachineError(
            f"{wanted_by} needs the package {package}, which is not installed; install it, or leave it out"
        )


def launch(recipe: TrainSection, job_directory: Path) -> None:
    """Train the job in its ranks, to the end. Raises InputError or ServerError with their sentence."""
    command = [sys.executable, "-P", "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", str(find_config(recipe.accelerate_config)), "--main_process_port", "0"]
    command += ["--num_processes", str(recipe.num_processes), "--module", RANK_MODULE, str(job_directory)]
    status = subprocess.run(command, env=_OF_RANKS | dict(os.environ), check=False).returncode
    if status == 0:
        return
    told = read_status(job_directory)
    if told.state == "failed":
        raise InputError(told.message) if told.exit_code == InputError.exit_code else ServerError(told.message)
    raise ServerError(
        f"one of the {recipe.num_processes} training processes ended before its time, and the others were stopped; "
        "worker.log names it, and the same command resumes from the last checkpoint"
    )
