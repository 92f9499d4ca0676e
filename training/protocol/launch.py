"""One training over several processes, of one machine or of several, started by `accelerate launch`: DDP, FSDP or DeepSpeed.

Model: the worker stays one process, which holds the job, looks at the pairs and merges; only the training in between is
done by the ranks (training/worker/rank.py), which are gone when it goes on. What depends on a clock, or is written to the
job's directory, is for the first rank to decide or to do. A rank that dies takes the others with it (accelerate's agent
sees to that, and across machines training/protocol/machines.py), and the same command resumes from the last complete
checkpoint.

Limits: DeepSpeed on one machine only. What is shipped runs without GPUs, too (gloo).
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from functools import partial
from importlib import resources
from pathlib import Path

from vcot.pipeline.errors import InputError, MachineError, ServerError
from vcot.training.protocol.job import JOB, TrainJob, digest_losses, read_record, read_status, tell
from vcot.training.protocol.machines import Call, await_start, calling, find_interface, is_held
from vcot.training.protocol.trackers import check_account
from vcot.training.protocol.train_sections import TrainSection

RANK_MODULE = "vcot.training.worker.rank"
_BUNDLED = ("ddp", "fsdp", "zero2", "zero3")
_LEFT_S = 60.0
"""How long the ranks of a machine may go on after another has left: those of a machine that helps end after the first's."""
_STOP_S = 15.0
_POLL_S = 0.5


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
    if num_gpus and recipe.processes_per_machine > num_gpus:
        each = f" on {recipe.num_machines} machines" if recipe.num_machines > 1 else ""
        raise MachineError(
            f"train.num_processes = {recipe.num_processes}{each}, but this machine has {num_gpus} GPU(s); lower it, and "
            "raise train.gradient_accumulation by as much"
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
        if recipe.num_machines > 1:
            raise InputError(
                f"train.accelerate_config = {recipe.accelerate_config!r} asks for DeepSpeed, which vcot starts on one "
                "machine only; take fsdp or ddp for several"
            )
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
    left = None
    if recipe.num_machines == 1:
        status = _run(recipe, job_directory, 0, None)
    else:
        say = partial(tell, job_directory, "preparing")
        with calling(recipe, job_directory, say) as call:
            say(f"starting {recipe.num_processes} training processes on {recipe.num_machines} machines")
            status = _run(recipe, job_directory, 0, call)
            left = next((n for n in range(1, call.num_machines) if not is_held(job_directory, n)), None)
    if status == 0:
        return
    told = read_status(job_directory)
    if told.state == "failed":
        raise InputError(told.message) if told.exit_code == InputError.exit_code else ServerError(told.message)
    log = "worker.log" if left is None else f"machine {left + 1} of {recipe.num_machines} left first; worker-{left}.log"
    raise ServerError(
        f"one of the {recipe.num_processes} training processes ended before its time, and the others were stopped; "
        f"{log} names it, and the same command resumes from the last checkpoint"
    )


def help_train(job_directory: Path, place: int) -> int:
    """Do the share of the machine that has this place, from 1, once all are there; the exit status of its ranks.

    Stays until the first machine has ended, so that none seems to be lost at a good end.
    """
    call = await_start(job_directory)
    if call is None:
        return 0
    status = _run(read_record(job_directory / JOB, TrainJob).train, job_directory, place, call)
    while status == 0 and is_held(job_directory, 0):
        time.sleep(_POLL_S)
    return status


def _run(recipe: TrainSection, job_directory: Path, place: int, call: Call | None) -> int:
    """This machine's ranks, to the end; where another machine has left, they are stopped."""
    command = [sys.executable, "-P", "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += [
        "--config_file",
        str(find_config(recipe.accelerate_config)),
        "--num_processes",
        str(recipe.num_processes),
    ]
    if call is None:
        interface = "lo"  # the ranks of one machine need not be heard elsewhere
        command += ["--main_process_port", "0"]
    else:
        interface = find_interface(str(call.address))
        command += ["--num_machines", str(call.num_machines), "--machine_rank", str(place), "--same_network"]
        command += ["--main_process_ip", str(call.address), "--main_process_port", str(call.port)]
    command += ["--module", RANK_MODULE, str(job_directory)]
    # Safe path: they import nothing from the folder that they are started in.
    own = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface, "PYTHONSAFEPATH": "1"}
    process = subprocess.Popen(command, env=own | dict(os.environ))
    others = [n for n in range(call.num_machines if call else 0) if n != place]
    since: float | None = None
    while True:
        try:
            return process.wait(_POLL_S)
        except subprocess.TimeoutExpired:
            gone = not all(is_held(job_directory, n) for n in others)
            since = (since or time.monotonic()) if gone else None
            if since is not None and time.monotonic() - since > _LEFT_S:
                return _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> int:
    process.terminate()  # accelerate's agent ends the ranks
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return process.returncode or 1
