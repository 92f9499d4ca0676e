"""`vcot worker`: takes the training jobs that runs submit, and does them one by one.

Model: a run with train.worker = remote writes RUNS/NAME/training/KEY/job.json and waits for that folder's status.json to say
done or failed (services/jobs/trainer.py). A worker looks for such jobs, oldest first, and does each in a process of its
own, so that a job's memory ends with it. Whatever stopped it, a job goes on where it was: one without an end in its status
is taken again, by whichever worker is there.

Limits: one job at a time; several workers share a folder, each job being claimed by a lock, which must reach all of them
(one machine, or a file system with locks).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

from vcot.pipeline.errors import BusyError, InputError
from vcot.pipeline.files import write_record
from vcot.services.jobs.trainer import job_process
from vcot.training.protocol.job import ENDED, JOB, STATUS, TrainJob, TrainStatus, exclusive, read_record, read_status

Say = Callable[[str], None]
_POLL_S = 1.0


async def work(runs: Path, say: Say) -> NoReturn:
    """Do what is submitted in `runs`, until cancelled."""
    say(f"waiting for jobs in {runs.absolute()}")
    while True:
        if not await work_once(runs, say):
            await asyncio.sleep(_POLL_S)


async def work_once(runs: Path, say: Say) -> bool:
    """Do the first owed job that no other worker has claimed; whether there was one."""
    for directory, job in owed_jobs(runs):
        with ExitStack() as claim:
            try:
                claim.enter_context(exclusive(directory, "claim.lock"))
            except BusyError:
                continue
            if read_status(directory).state not in ENDED:
                await _do(directory, job, say)
                return True
    return False


def owed_jobs(runs: Path) -> Iterator[tuple[Path, TrainJob]]:
    """The submitted jobs that are neither done nor failed, in the order of their submission."""
    for path in sorted(runs.glob(f"*/training/*/{JOB}"), key=lambda path: path.stat().st_mtime_ns):
        try:
            is_owed = read_status(path.parent).state not in ENDED
            job = read_record(path, TrainJob) if is_owed else None
        except InputError as error:
            _fail(path.parent, str(error))
        else:
            if job is not None and job.train.worker == "remote":
                yield path.parent, job


async def _do(directory: Path, job: TrainJob, say: Say) -> None:
    say(f"{directory}: {job.checkpoint_name}")
    async with job_process(directory, job.merged_path(directory)) as process:
        status = await process.wait()
    if status and read_status(directory).state != "failed":  # killed: it could not say so itself
        _fail(directory, f"the trainer ended with {status} (137: out of memory?); see {directory / 'worker.log'}")
    end = read_status(directory)
    say(f"{directory}: {end.state}{f', {end.message}' if end.message else ''}")


def _fail(directory: Path, message: str) -> None:
    write_record(directory / STATUS, TrainStatus(state="failed", message=message))
