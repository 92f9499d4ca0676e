"""What is found out before any training time is spent: which pairs can be trained whole, and what memory that will take.

Looking at every pair takes minutes at the paper's size, so its outcome is kept, in `preflight/` beside the job
directories, under what determines it: rows, processor, template and limits. A job that resumes, the points of a sweep
and the ranks of one training read it there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset

from vcot.pipeline.errors import DataError, MachineError
from vcot.pipeline.files import write_record
from vcot.pipeline.records import Record, content_key
from vcot.training.dpo.rows import check_pairs, keep_rows, load_pairs
from vcot.training.model.loading import device
from vcot.training.model.template import Processor
from vcot.training.protocol.gpus import list_gpus
from vcot.training.protocol.job import PREFLIGHT, PairSummary, Preflight, TrainJob, read_record
from vcot.training.protocol.launch import is_distributed
from vcot.training.protocol.memory import GIB, MemoryEstimate, estimate_memory
from vcot.training.protocol.shape import read_shape
from vcot.training.protocol.train_sections import TrainSection

CHECKED = "preflight"
OnMessage = Callable[[str], None]
_RULES = 3
"""The version of what a row is refused for; another one looks at every row again."""
_TELL_EVERY_S = 1.0


class CheckedPairs(Record):
    """What was found in both splits."""

    train: PairSummary
    validation: PairSummary


@dataclass(frozen=True)
class Pairs:
    """Rows that can be trained whole, with TRL's columns, and what was found."""

    train: Dataset
    validation: Dataset
    found: CheckedPairs


def open_pairs(job: TrainJob, job_directory: Path, processor: Processor, on_message: OnMessage) -> Pairs:
    """The job's pairs that can be trained whole; each one is looked at where that has not been done.

    Raises DataError where there is none.
    """
    train, validation = (load_pairs(Path(job.pairs_path) / f"{name}.parquet") for name in ("train", "validation"))
    path = job_directory.parent / CHECKED / f"{_key(job, processor)}.json"
    if not path.is_file():
        ticker = _Ticker(len(train) + len(validation), on_message)
        check = partial(
            check_pairs,
            max_length=job.train.max_length,
            max_image_side=job.train.max_image_side,
            needs_image=job.train.method == "mdpo",
        )
        summaries = [check(rows, processor, ticker.tick)[1] for rows in (train, validation)]
        path.parent.mkdir(exist_ok=True)
        write_record(path, CheckedPairs(train=summaries[0], validation=summaries[1]))
    found = read_record(path, CheckedPairs)
    return Pairs(keep_rows(train, found.train), keep_rows(validation, found.validation), found)


def _key(job: TrainJob, processor: Processor) -> str:
    return content_key(
        rules=_RULES,
        pairs=job.pairs_digest,
        base=job.base.digest,
        template=processor.chat_template,
        max_length=job.train.max_length,
        max_image_side=job.train.max_image_side,
        needs_image=job.train.method == "mdpo",
    )


@dataclass
class _Ticker:
    """Says how far the look at every pair is, about once a second."""

    total: int
    on_message: OnMessage
    _done: int = 0
    _told_s: float = field(default_factory=time.monotonic)

    def tick(self) -> None:
        self._done += 1
        if time.monotonic() - self._told_s >= _TELL_EVERY_S:
            self._told_s = time.monotonic()
            self.on_message(f"looking at every pair: {self._done:,} of {self.total:,}")


def check_job(job: TrainJob, job_directory: Path, found: CheckedPairs, available: float) -> MemoryEstimate:
    """Keep what was found as the job's `preflight.json`, with an estimate of the memory; returns the estimate.

    Raises DataError where no pair can be trained, MachineError where what every step takes is more than the `available` GiB.
    """
    estimate = estimate_memory(
        read_shape(Path(job.base_path) / "config.json"),
        job.train,
        max(found.train.max_length, found.validation.max_length),
    )
    write_record(
        job_directory / PREFLIGHT,
        Preflight(train=found.train, validation=found.validation, memory=estimate, available_gib=available),
    )
    if not found.train.num_kept:
        reason = f", the first because of {found.train.refused[0][1]}" if found.train.refused else ""
        raise DataError(
            f"none of {found.train.num_rows} pairs in {job.pairs_path} can be trained{reason}; see {PREFLIGHT}"
        )
    if estimate.judge(available) == "too_large":
        raise MachineError(
            f"each training process needs at least {estimate.least:.1f} GiB, and {available:.1f} GiB are free "
            f"({estimate.summary}); `vcot doctor` says with which settings it fits"
        )
    return estimate


def available_gib(recipe: TrainSection) -> float:
    """What is free on the fullest GPU that would train, or in the machine where there is none."""
    if device().type != "cuda":
        return _free_memory()
    gpus = list_gpus().seen[: recipe.processes_per_machine] if is_distributed(recipe) else ()
    if gpus:  # asked of the driver: this process would leave a context of its own on each of them
        return min(gpu.free_gib for gpu in gpus)
    return float(torch.cuda.mem_get_info()[0]) / GIB


def _free_memory() -> float:
    """What the kernel can give without swapping."""
    lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024 / GIB
