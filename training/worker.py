"""The trainer worker: one process that does one job, and goes on where it was after any end.

    python -m training.worker JOB_DIR [--merge-into OUT_DIR]

reads `job.json`, looks at every row, trains, and puts `adapter/` into place; with `--merge-into` it then merges, which
spares a second start of Python with torch in it. The same command again resumes from the last complete checkpoint, and
returns at once where all is done. Libraries with torch in them are imported late, so that neither `--help` nor a
finished job pays for them.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from pipeline.checkpoints import compute_digest
from pipeline.errors import CheckpointError, DataError, VcotError
from training.job import (
    ADAPTER,
    JOB,
    PREFLIGHT,
    REFERENCE,
    STATUS,
    Preflight,
    TrainJob,
    TrainStatus,
    exclusive,
    read_record,
    read_status,
    write_record,
)
from training.merge import find_merged, merge_job

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
                _tell(job_directory, "running", "merging")
                merge_job(job, job_directory, merge_into)
        except VcotError as error:
            _tell(job_directory, "failed", str(error))
            raise
        except Exception as error:
            _tell(job_directory, "failed", f"training stopped ({type(error).__name__}: {error}); see worker.log")
            raise
        _tell(job_directory, "done")


def _is_done(job: TrainJob, job_directory: Path, merge_into: Path | None) -> bool:
    if not (job_directory / ADAPTER).is_dir() or read_status(job_directory).state != "done":
        return False
    return merge_into is None or find_merged(job, merge_into) is not None


def _tell(job_directory: Path, state: str, message: str = "", **numbers: int) -> None:
    """Replace the status, keeping the numbers that were found before."""
    before = read_status(job_directory).model_dump()
    status = TrainStatus.model_validate({**before, "state": state, "message": message, **numbers})
    write_record(job_directory / STATUS, status)


def _train(job: TrainJob, job_directory: Path) -> None:
    _tell(job_directory, "preparing", "checking the base's weights")
    base = Path(job.base_path)
    if (digest := compute_digest(base)) != job.base.digest:
        raise CheckpointError(
            f"base {base} has digest {digest[:19]}, the job was made for {job.base.digest[:19]}; submit the job again"
        )
    _tell(job_directory, "preparing", "loading the libraries")
    from training.dpo import build_trainer, count_steps, measure, run_training
    from training.models import load_processor, quiet_libraries
    from training.pairs import check_pairs, load_pairs
    from training.reference import attach_reference

    quiet_libraries()
    _tell(job_directory, "preparing", "looking at every pair")
    processor, _ = load_processor(base)
    limits = {"max_length": job.train.max_length, "max_image_side": job.train.max_image_side}
    train, found = check_pairs(load_pairs(Path(job.pairs_path) / "train.parquet"), processor, **limits)
    validation, held_out = check_pairs(load_pairs(Path(job.pairs_path) / "validation.parquet"), processor, **limits)
    write_record(job_directory / PREFLIGHT, Preflight(train=found, validation=held_out))
    if not len(train):
        reason = f", the first because of {found.refused[0][1]}" if found.refused else ""
        raise DataError(f"none of {found.num_rows} pairs in {job.pairs_path} can be trained{reason}; see {PREFLIGHT}")
    _log.info("%d + %d pairs, %d to %d tokens", len(train), len(validation), found.min_length, found.max_length)
    trainer = build_trainer(base, train, validation, processor, job.train, job_directory, job.checkpoint_name)
    attach_reference(
        trainer,
        job.train,
        Path(job.reference_path or job_directory / REFERENCE),
        digest,
        lambda done, total: _tell(job_directory, "preparing", f"reference log-probs of {done} of {total} pairs"),
    )
    adapted = measure(trainer)
    slower = "" if trainer.shares_prompts else f"each prompt passes twice: {trainer.sharing_fault}"
    _log.info(slower or "prompts are shared")
    _tell(
        job_directory,
        "running",
        slower,
        num_train=len(train),
        num_validation=len(validation),
        num_steps=count_steps(len(train), job.train, trainer.accelerator.num_processes),
        num_adapted_modules=adapted.num_modules,
        num_trainable_parameters=adapted.num_parameters,
    )
    run_training(trainer, job.train, job_directory)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code: 0 done, 2 for input that the user can mend, 1 for anything else."""
    parser = argparse.ArgumentParser(prog="training.worker", description="Train one job, resuming where it was.")
    parser.add_argument("job", type=Path, help="the job's directory")
    parser.add_argument("--merge-into", type=Path, help="merge the adapter into this checkpoint directory afterwards")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", stream=sys.stdout)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        work(options.job, options.merge_into)
    except VcotError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except Exception:  # noqa: BLE001 - the one place that turns a crash into an exit code, with its traceback in the log
        _log.exception("the worker stopped")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
