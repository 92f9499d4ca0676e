"""Running a training job: the trainer worker is a process of its own, followed through the files of its job directory.

The worker goes on where it was, whatever stopped it; a job that is done is not run again. With train.worker = remote the
process belongs to a `vcot worker` (services/jobs/submitted.py), in another container or on another machine, that sees the
run's directory under the same path; what is said between the two is in those files only.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from pydantic import ValidationError

from vcot.pipeline.errors import InputError, ServerError
from vcot.pipeline.files import write_record
from vcot.pipeline.report import OnSteps
from vcot.services.engine.lifeline import keeper_command
from vcot.services.engine.logs import bound
from vcot.training.protocol.job import (
    ADAPTER,
    ENDED,
    JOB,
    PROGRESS,
    STATUS,
    TrainJob,
    TrainProgress,
    TrainStatus,
    read_status,
)

_POLL_S = 0.25
_STOP_S = 20.0


async def train(
    job: TrainJob, directory: Path, on_steps: OnSteps = lambda *_: None, merge_into: Path | None = None
) -> TrainStatus:
    """Run `job` in its directory and follow it to the end; with `merge_into`, the same process merges, too.

    Raises InputError or ServerError with the worker's sentence.
    """
    if is_done(directory, merge_into):
        return read_status(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_record(directory / JOB, job)
    (directory / STATUS).unlink(missing_ok=True)
    async with job_process(directory, merge_into) as process:
        while process.returncode is None:
            _tell(directory, on_steps)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(process.wait()), _POLL_S)
    _check(process.returncode, directory / "worker.log", directory)
    return read_status(directory)


async def train_remotely(job: TrainJob, directory: Path, on_steps: OnSteps) -> TrainStatus:
    """Have a `vcot worker` train and merge `job`, and follow it to the end; a job that is under way is only followed.

    Raises ServerError with the worker's sentence.
    """
    if not is_done(directory, job.merged_path(directory)):
        directory.mkdir(parents=True, exist_ok=True)
        write_record(directory / JOB, job)
        if read_status(directory).state in ENDED:
            (directory / STATUS).unlink()
    while (status := read_status(directory)).state not in ENDED:
        if (directory / STATUS).is_file():
            _tell(directory, on_steps)
        else:
            on_steps(0, 0, "waiting for a `vcot worker` to take the job")
        await asyncio.sleep(_POLL_S)
    if status.state == "failed":
        raise ServerError(status.message)
    return status


def is_done(directory: Path, merge_into: Path | None) -> bool:
    """Whether the job there is trained and, where that is asked for, merged."""
    trained = (directory / ADAPTER).is_dir() and read_status(directory).state == "done"
    return trained and (merge_into is None or merge_into.is_dir())


def job_process(
    directory: Path, merge_into: Path | None
) -> contextlib.AbstractAsyncContextManager[asyncio.subprocess.Process]:
    """The process that works on a submitted job; it ends with the block, and with this process."""
    arguments: list[Path | str] = [directory, "--merge-into", merge_into] if merge_into else [directory]
    return _worker("vcot.training.worker", arguments, directory / "worker.log")


def help_process(directory: Path, place: int) -> contextlib.AbstractAsyncContextManager[asyncio.subprocess.Process]:
    """The process that does this machine's share of a job that several machines train; it ends as `job_process` does."""
    return _worker("vcot.training.worker.share", [directory, str(place)], directory / f"worker-{place}.log")


async def train_all(jobs: Mapping[Path, TrainJob], log: Path, on_poll: Callable[[], None]) -> None:
    """Do several jobs, by directory, one after another in one process, which spares a start of torch for each. They are no
    `vcot worker`'s, whatever train.worker says.

    `on_poll` is called a few times a second. What became of a job is in its directory; a failed one keeps no other from
    being done. Raises ServerError where the process ended without having done all.
    """
    for directory, job in jobs.items():
        own = job.train.model_copy(update={"worker": "local"})
        directory.mkdir(parents=True, exist_ok=True)
        write_record(directory / JOB, job.model_copy(update={"train": own}))
        (directory / STATUS).unlink(missing_ok=True)
    async with _worker("vcot.training.worker", list(jobs), log) as process:
        while process.returncode is None:
            on_poll()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(process.wait()), _POLL_S)
    on_poll()
    if any(read_status(directory).state not in ENDED for directory in jobs):
        _check(process.returncode, log, None)


async def merge(job: TrainJob, directory: Path, out: Path) -> None:
    """Make the checkpoint of the trained job in `directory` at `out`, with manifest, probe and canary."""
    write_record(directory / JOB, job)  # its merge settings may be others than when it was trained
    log = directory / "merge.log"
    async with _worker("vcot.training.merge", [directory, out], log) as process:
        await process.wait()
    _check(process.returncode, log, None)


@asynccontextmanager
async def _worker(module: str, arguments: Sequence[Path | str], log: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process of the training package with its output in `log`; it ends with this block, and with this process."""
    worker = [sys.executable, "-P", "-m", module, *(str(argument) for argument in arguments)]
    bound(log)
    with log.open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            *keeper_command(worker, _STOP_S),
            stdin=asyncio.subprocess.PIPE,  # its closing is what ends the worker
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        await _stop(process)


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        await asyncio.wait_for(process.wait(), _STOP_S)
    except TimeoutError:
        process.kill()
        await process.wait()


def _check(returncode: int | None, log: Path, directory: Path | None) -> None:
    """Raise what a failed worker said; its last lines where it said nothing."""
    if returncode == 0:
        return
    status = read_status(directory) if directory is not None else None
    lines = log.read_text("utf-8", "replace").splitlines()[-15:]
    if status is not None and status.state == "failed":
        message = status.message
    elif returncode == InputError.exit_code and lines:
        message = lines[-1]
    else:
        message = f"the trainer ended with {returncode}; the last lines of {log}:\n" + "\n".join(lines)
    raise InputError(message) if returncode == InputError.exit_code else ServerError(message)


def read_progress(directory: Path) -> list[TrainProgress]:
    """The loss curves so far; a line that is being written is left for the next look."""
    points: list[TrainProgress] = []
    path = directory / PROGRESS
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with contextlib.suppress(ValidationError):
            points.append(TrainProgress.model_validate_json(line))
    return points


def _tell(directory: Path, on_steps: OnSteps) -> None:
    points = read_progress(directory)
    train = [point for point in points if point.kind == "train"]
    if not train:
        if message := read_status(directory).message:
            on_steps(0, 0, message)
        return
    validation = [point for point in points if point.kind == "validation"]
    note = f"loss {train[-1].loss:.4f}" + (f", validation {validation[-1].loss:.4f}" if validation else "")
    if validation and validation[-1].gap is not None:
        note += f", gap {validation[-1].gap:+.4f}"
    on_steps(train[-1].step, train[-1].num_steps, note)
