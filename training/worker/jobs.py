"""The trainer worker: one process that does one job after another, and goes on where it was after any end.

    python -m vcot.training.worker JOB_DIR [--merge-into OUT_DIR]
    python -m vcot.training.worker JOB_DIR JOB_DIR ...

reads `job.json`, looks at every row, trains, and puts `adapter/` into place; with `--merge-into` it then merges, which
spares a second start of Python with torch in it, as do several jobs, the points of a sweep. The same command again resumes
from the last complete checkpoint, and returns at once where all is done. A job that fails does not keep the later ones
from being done. Where the recipe wants several processes, the worker starts them for the training itself
(training/protocol/launch.py) and does the rest alone. Libraries with torch in them are imported late, so that neither
`--help` nor a finished job pays for them.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from vcot.pipeline.errors import CheckpointError, RecipeError, VcotError
from vcot.pipeline.identity import compute_digest
from vcot.pipeline.records import CheckpointRef
from vcot.training.merge.merging import find_merged, merge_job
from vcot.training.protocol.job import (
    ADAPTER,
    JOB,
    REFERENCE,
    TrainJob,
    digest_losses,
    exclusive,
    read_record,
    read_status,
    tell,
    tell_fault,
)
from vcot.training.protocol.launch import check_installed, check_machine, is_distributed, launch

if TYPE_CHECKING:
    from vcot.training.dpo.preflight import Pairs
    from vcot.training.model.template import Processor

_log = logging.getLogger(__name__)


def work(job_directory: Path, merge_into: Path | None = None) -> None:
    """Do the job in `job_directory` as far as it is not done.

    Raises InputError for what the user can mend, ServerError for a check that failed; `status.json` says the same.
    """
    job = read_record(job_directory / JOB, TrainJob)
    if _is_done(job, job_directory, merge_into):
        return
    with exclusive(job_directory):
        try:
            if not (job_directory / ADAPTER).is_dir():
                _train(job, job_directory)
            if merge_into is not None:
                tell(job_directory, "running", "merging")
                merge_job(job, job_directory, merge_into)
        except Exception as error:
            tell_fault(job_directory, error)
            raise
        tell(job_directory, "done")


def _is_done(job: TrainJob, job_directory: Path, merge_into: Path | None) -> bool:
    if not (job_directory / ADAPTER).is_dir() or read_status(job_directory).state != "done":
        return False
    return merge_into is None or find_merged(job, merge_into) is not None


@cache
def _digest(directory: Path) -> str:
    """A checkpoint's digest, computed once for all jobs of this process."""
    return compute_digest(directory)


def _check_weights(directory: Path, ref: CheckpointRef) -> None:
    """Raise CheckpointError unless the directory holds these weights."""
    if (digest := _digest(directory)) != ref.digest:
        raise CheckpointError(
            f"{ref.name} in {directory} has digest {digest[:19]}, the job was made for {ref.digest[:19]}; submit the job "
            "again"
        )


def _check_losses(job: TrainJob) -> None:
    """Raise RecipeError unless each loss of one's own is still what the job was submitted with."""
    changed = [name for name, digest in digest_losses(job.train).items() if job.loss_sources.get(name) != digest]
    if changed:
        raise RecipeError(
            f"the file of loss {changed[0]} is not the one that the job was submitted with; give the command again, which "
            "submits a job with this one"
        )


def _train(job: TrainJob, job_directory: Path) -> None:
    tell(job_directory, "preparing", "checking the base's weights")
    base = Path(job.base_path)
    _check_weights(base, job.base)
    if job.reference is not None:
        _check_weights(Path(str(job.reference_weights)), job.reference)
    check_installed(job.train)
    _check_losses(job)
    tell(job_directory, "preparing", "loading the libraries")
    from vcot.training.dpo.preflight import available_gib, check_job, open_pairs
    from vcot.training.model.loading import load_processor, num_gpus, quiet_libraries

    quiet_libraries()
    tell(job_directory, "preparing", "looking at every pair")
    processor, _ = load_processor(base)
    pairs = open_pairs(job, job_directory, processor, lambda message: tell(job_directory, "preparing", message))
    estimate = check_job(job, job_directory, pairs.found, available_gib(job.train))
    _log.info("%d + %d pairs; %s", len(pairs.train), len(pairs.validation), estimate.summary)
    if is_distributed(job.train):
        check_machine(job.train, num_gpus())
        tell(job_directory, "preparing", f"starting {job.train.num_processes} training processes")
        launch(job.train, job_directory)
    else:
        fit(job, job_directory, processor, pairs)


def fit(job: TrainJob, job_directory: Path, processor: Processor, pairs: Pairs) -> None:
    """Train the checked pairs to the end, alone or as one of several ranks, each of which calls this."""
    from vcot.training.dpo.fit import build_trainer, count_steps, measure, run_training
    from vcot.training.dpo.reference import attach_reference
    from vcot.training.model.loading import free_memory
    from vcot.training.model.model_card import write_adapter_card
    from vcot.training.protocol.trackers import tracking

    trainer, *reference = [
        build_trainer(
            Path(weights), pairs.train, pairs.validation, processor, job.train, job_directory, job.checkpoint_name
        )
        for weights in (job.base_path, job.reference_weights)
        if weights is not None
    ]
    is_first = trainer.is_world_process_zero()
    attach_reference(
        trainer,
        job.train,
        Path(job.reference_path or job_directory / REFERENCE),
        (job.reference or job.base).digest,
        lambda done, total: (
            tell(job_directory, "preparing", f"reference log-probs of {done} of {total} pairs") if is_first else None
        ),
        *reference,
    )
    reference.clear()  # its weights are of no more use
    free_memory()
    adapted = measure(trainer)
    slower = "" if trainer.shares_prompts else f"each prompt passes twice: {trainer.sharing_fault}"
    _log.info(slower or "prompts are shared")
    if is_first:
        tell(
            job_directory,
            "running",
            slower,
            num_train=len(pairs.train),
            num_validation=len(pairs.validation),
            num_steps=count_steps(len(pairs.train), job.train),
            num_adapted_modules=adapted.num_modules,
            num_trainable_parameters=adapted.num_parameters,
        )
    with tracking(job, job_directory) if is_first else nullcontext():
        run_training(trainer, job.train, job_directory, from_reference=job.reference is None)
    if is_first:
        write_adapter_card(job, job_directory / ADAPTER)  # in place of PEFT's, which says nothing


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code: 0 done, 2 for input that the user can mend, 1 for anything else."""
    parser = argparse.ArgumentParser(prog="vcot.training.worker", description="Train jobs, resuming where they were.")
    parser.add_argument("jobs", type=Path, nargs="+", metavar="JOB", help="a job's directory")
    parser.add_argument("--merge-into", type=Path, help="merge the one job's adapter into this directory afterwards")
    options = parser.parse_args(arguments)
    if options.merge_into and len(options.jobs) > 1:
        parser.error("--merge-into is for one job")
    set_up_process()
    return max(_do(job, options.merge_into) for job in options.jobs)


def _do(job: Path, merge_into: Path | None) -> int:
    try:
        work(job, merge_into)
    except VcotError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except Exception:  # noqa: BLE001 - the one place that turns a crash into an exit code, with its traceback in the log
        _log.exception("the worker stopped")
        return 1
    return 0


def set_up_process() -> None:
    """What every process of a training does first: it logs to standard output, and keeps the libraries quiet."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", stream=sys.stdout)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
