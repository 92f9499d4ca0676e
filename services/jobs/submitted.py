"""`vcot worker`: takes the training jobs that runs submit, and does them one by one.

Model: a run with train.worker = remote writes RUNS/NAME/training/KEY/job.json and waits for that folder's status.json to say
done or failed (services/jobs/trainer.py). A worker looks for such jobs, oldest first, and does each in a process of its
own, so that a job's memory ends with it. Whatever stopped it, a job goes on where it was: one without an end in its status
is taken again, by whichever worker is there. A job that trains on several machines calls for others
(training/protocol/machines.py); an idle worker answers the oldest call before it takes a job of its own.

Limits: one job at a time; several workers share a folder, each job being claimed by a lock, which must reach all of them
(one machine, or a file system with locks).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from vcot.pipeline.errors import BusyError, InputError
from vcot.pipeline.files import write_record
from vcot.pipeline.locks import is_locked
from vcot.services.jobs.trainer import help_process, job_process
from vcot.training.protocol.job import (
    ENDED,
    JOB,
    STATUS,
    WORKER_LOCK,
    TrainJob,
    TrainStatus,
    exclusive,
    read_record,
    read_status,
)
from vcot.training.protocol.machines import CALL, Call, find_difference, open_call, place_lock

Say = Callable[[str], None]
_POLL_S = 1.0


async def work(runs: Path, say: Say) -> NoReturn:
    """Do what is submitted in `runs`, and help where several machines train, until cancelled."""
    say(f"waiting for jobs in {runs.absolute()}")
    refused: set[str] = set()
    while True:
        if not await help_once(runs, say, refused) and not await work_once(runs, say, refused):
            await asyncio.sleep(_POLL_S)


async def help_once(runs: Path, say: Say, refused: set[str]) -> bool:
    """Take a place in the oldest call that has one, and do its share; whether there was one.

    A call by a machine with other versions is not answered, and said once: `refused` holds what was said, and which jobs
    are left alone.
    """
    for path in _oldest_first(runs.glob(f"*/training/*/{CALL}")):
        if _name_submission(path.parent) in refused:
            continue
        with _going_on(path.parent, say, refused):
            if (call := open_call(path.parent)) is None:
                continue
            if difference := find_difference(call):
                if (message := f"{path.parent}: not helped with, since {difference}") not in refused:
                    refused.add(message)
                    say(message)
                continue
            for place in range(1, call.num_machines):
                with suppress(BusyError), exclusive(path.parent, place_lock(place)):
                    await _help(path.parent, place, call, say)
                    return True
    return False


@contextmanager
def _going_on(directory: Path, say: Say, refused: set[str]) -> Iterator[None]:
    """A job whose directory cannot be used, or is gone, keeps no other from being done: it is left alone, and said to be,
    until it is submitted again.
    """
    submission = _name_submission(directory)
    try:
        yield
    except (InputError, OSError) as error:
        refused.add(submission)
        why = str(error)
        if isinstance(error, OSError):
            why = f"{error.filename} cannot be used ({error.strerror}); see to it, and submit the job again"
        say(f"{directory}: left alone, since {why}")


def _name_submission(directory: Path) -> str:
    """The job as it was submitted last."""
    try:
        return f"{directory} {(directory / JOB).stat().st_mtime_ns}"
    except FileNotFoundError:
        return str(directory)


async def _help(directory: Path, place: int, call: Call, say: Say) -> None:
    say(f"{directory}: machine {place + 1} of {call.num_machines}")
    async with help_process(directory, place) as process:
        status = await process.wait()
    end = f"ended with {status}; see {directory / f'worker-{place}.log'}" if status else "done"
    say(f"{directory}: {end}")


async def work_once(runs: Path, say: Say, refused: set[str]) -> bool:
    """Do the first owed job that no other worker has claimed; whether there was one. `refused` is as in `help_once`.

    Of jobs that want several machines one is done at a time: two would wait for each other's.
    """
    is_shared = False
    for directory, job in owed_jobs(runs):
        if (is_shared and job.train.num_machines > 1) or _name_submission(directory) in refused:
            continue
        with _going_on(directory, say, refused), ExitStack() as claim:
            try:
                claim.enter_context(exclusive(directory, "claim.lock"))
            except BusyError:
                is_shared = is_shared or job.train.num_machines > 1
                continue
            # A trainer may go on for a moment after its worker was killed.
            if read_status(directory).state not in ENDED and not is_locked(directory / WORKER_LOCK):
                await _do(directory, job, say)
                return True
    return False


def owed_jobs(runs: Path) -> Iterator[tuple[Path, TrainJob]]:
    """The submitted jobs that are neither done nor failed, in the order of their submission."""
    for path in _oldest_first(runs.glob(f"*/training/*/{JOB}")):
        try:
            is_owed = read_status(path.parent).state not in ENDED
            job = read_record(path, TrainJob) if is_owed else None
        except InputError as error:
            with suppress(OSError):  # a folder that cannot be written, or is gone
                _fail(path.parent, str(error))
        else:
            if job is not None and job.train.worker == "remote":
                yield path.parent, job


def _oldest_first(paths: Iterable[Path]) -> list[Path]:
    """By the time of writing; what vanishes meanwhile is left out."""
    found = []
    for path in paths:
        with suppress(FileNotFoundError):
            found.append((path.stat().st_mtime_ns, path))
    return [path for _, path in sorted(found)]


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
