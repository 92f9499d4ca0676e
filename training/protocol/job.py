"""A training job: what the worker is told, and what it tells back. Free of torch, so that any process can read it.

A job directory holds

    job.json          the TrainJob
    preflight.json    the Preflight: which rows are trained, which are refused and why
    progress.jsonl    one TrainProgress per logged step or evaluation, appended by the worker
    status.json       the TrainStatus, replaced in one step
    steps/            TRL's own checkpoints, for resuming
    reference/        the cached reference log-probs, where the job names no other place for them
    adapter/          the trained adapter, renamed into place when complete
    worker.lock       held by the one worker that does the job
    rank.lock         held by the first of the processes that train, where the worker has started several
    claim.lock        held by the `vcot worker` that took it, where one did
    call.json         the Call for other machines, while a job that wants several trains (machines.py)
    machine-N.lock    held by the Nth of the machines that take part
    worker-N.log      its output
    worker.log        the worker's output (whoever starts the worker directs it there)

A checkpoint that is made of it holds merge.json, its MergeReport, beside the weights.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import ConfigDict, Field

from vcot.pipeline import files
from vcot.pipeline.errors import BusyError, InputError, VcotError
from vcot.pipeline.files import write_record
from vcot.pipeline.locks import try_lock
from vcot.pipeline.open_lists import LOSSES, TRL_LOSSES
from vcot.pipeline.records import CheckpointRef, Record, content_key
from vcot.training.protocol.memory import MemoryEstimate
from vcot.training.protocol.train_sections import Dtype, MergeSection, TrainSection

JOB, PREFLIGHT, PROGRESS, STATUS = "job.json", "preflight.json", "progress.jsonl", "status.json"
STEPS, REFERENCE, ADAPTER, MERGE_REPORT = "steps", "reference", "adapter", "merge.json"
ENDED = ("done", "failed")
"""The states of a job that nobody works on, or is to."""
WORKER_LOCK, RANK_LOCK = "worker.lock", "rank.lock"

_WHERE = {"report_to", "worker", "num_machines", "address"}
"""Settings that say where a job is done and who is told, and not what comes out."""
_R = TypeVar("_R", bound=Record)


class TrainJob(Record):
    """Everything that determines the trained weights."""

    base: CheckpointRef
    base_path: str
    """Directory of the base's weights; not part of the key."""
    pairs_path: str
    """Directory with train.parquet and validation.parquet; not part of the key."""
    pairs_digest: str
    """SHA-256 of the two files' rows."""
    round: int = 1
    """Which of the run's rounds; in the checkpoint's name, not part of the key."""
    train: TrainSection
    loss_sources: dict[str, str] = Field(default_factory=dict)
    """SHA-256 of the file that defines a loss of one's own, by the loss's name (`digest_losses`)."""
    merge: MergeSection
    serve_dtype: Dtype | None = None
    """What vLLM will compute in; the merged weights must keep the training in it. Not part of the key."""
    reference: CheckpointRef | None = None
    """What training pulls towards, where that is not the base."""
    reference_weights: str | None = None
    """Directory of the reference's weights, where it has some of its own; not part of the key."""
    reference_path: str | None = None
    """Directory of cached reference log-probs, for all jobs of a run; without it, the job's own. Not part of the key."""

    @property
    def key(self) -> str:
        """What the job is known by, wherever it runs."""
        return content_key(
            base=self.base.digest,
            pairs=self.pairs_digest,
            train=self.train.model_dump(mode="json", exclude=_WHERE),
            **({"reference": self.reference.digest} if self.reference else {}),
            **({"losses": self.loss_sources} if self.loss_sources else {}),
        )

    @property
    def checkpoint_name(self) -> str:
        """The name of the merged checkpoint: method, round from the second on, and a hash that covers the merge settings."""
        number = f"r{self.round}-" if self.round > 1 else ""
        return f"{self.train.method}-{number}{content_key(job=self.key, merge=self.merge)[:10]}"

    def merged_path(self, directory: Path) -> Path:
        """Where the merged checkpoint of a job in `RUN/training/KEY` belongs."""
        return directory.parents[1] / "checkpoints" / self.checkpoint_name


def digest_losses(recipe: TrainSection) -> dict[str, str]:
    """The SHA-256 of the file that defines each loss of one's own, by the loss's name; a changed loss is another job.

    Raises RecipeError where there is no such file.
    """
    return {name: LOSSES.digest_source(name) for name in recipe.losses if name not in TRL_LOSSES}


class TrainProgress(Record):
    """One point of the loss curves."""

    kind: Literal["train", "validation"]
    step: int
    num_steps: int
    epoch: float
    loss: float
    terms: dict[str, float] = Field(default_factory=dict)
    """The loss's parts where it has several: mDPO's `preference`, `conditional` and `anchor`; `sft`."""
    gap: float | None = None
    """Of a validation point: its loss minus the mean training loss since the evaluation before."""
    reward_margin: float | None = None
    """Mean of beta * (log-ratio of chosen - log-ratio of rejected)."""
    reward_accuracy: float | None = None
    """Share of pairs whose chosen response has the higher implicit reward."""
    learning_rate: float | None = None
    elapsed_s: float


class TrainStatus(Record):
    """How far a job is."""

    state: Literal["preparing", "running", "done", "failed"]
    message: str = ""
    """For `failed`: one sentence for the user; for `preparing`: what is being done; for `running`: what to know of it."""
    num_train: int = 0
    num_validation: int = 0
    num_steps: int = 0
    num_adapted_modules: int = 0
    num_trainable_parameters: int = 0
    exit_code: int = 0
    """Of a `failed` job: 2 for what the user can mend, 1 for anything else."""


class PairSummary(Record):
    """What the preflight found in one split: requested = kept + refused."""

    model_config = ConfigDict(extra="ignore")
    """Earlier versions wrote the shortest and the median length, too, which nothing read."""

    num_rows: int
    num_kept: int
    refused: tuple[tuple[str, str], ...]
    """Task and reason of each row that cannot be trained whole."""
    refused_rows: tuple[int, ...]
    """Where they stand in the file, from 0."""
    max_length: int
    """Of the longest kept row, in tokens, image tokens included."""
    example: str
    """The first kept row as the model reads it, before image tokens are expanded."""


class Preflight(Record):
    """What was found before any training time was spent."""

    train: PairSummary
    validation: PairSummary
    memory: MemoryEstimate
    """Of one training process."""
    available_gib: float
    """Free on the fullest GPU, or in the machine where there is none."""


class Retention(Record):
    """What is left of the reward margins that were trained, over the probe's pairs (agreement.py), in nats."""

    before: float
    """Mean margin of base + adapter."""
    after: float
    """Mean margin of what came out."""
    kept: float
    """Share that is left, by least squares over the pairs; 1 is all of it."""
    kept_se: float
    """Standard error of `kept`."""
    error: float
    """Root mean square of the pairs' changes, relative to that of `before`. Unlike `kept`, it sees noise, too."""


class MergeReport(Record):
    """What making the checkpoint did to the policy, on fixed pairs, computed in float32."""

    checkpoint: CheckpointRef
    dtype: Dtype
    """What its weights are written in."""
    held: Dtype
    """What a server holds them in: the narrower of `dtype` and the recipe's serve.dtype."""
    num_changed_tensors: int
    """Weight tensors that differ from the base's in the dtype that was written; of an adapter, those that are not zero."""
    max_abs_logprob: float
    """Largest difference of a token's log-prob between base + adapter and the checkpoint."""
    differs_from_base: float
    """Largest difference between the checkpoint and the base rounded to the same type."""
    retention: Retention
    """Of the weights as held."""
    unquantized: Retention | None = None
    """Of the adapter on the base itself, where it was trained on the base in 4 bits; `retention` goes on from there."""
    dropped: tuple[tuple[Dtype, Retention], ...] = ()
    """Narrower types that were tried first and lost too much."""
    is_served_exactly: bool = True
    """False for an adapter of which vLLM would drop a part: tower and projector."""


def read_record(path: Path, kind: type[_R]) -> _R:
    """A record from a JSON file. Raises InputError naming the file."""
    record = files.read_record(path, kind, remedy="submit the job again")
    if record is None:
        raise InputError(f"{path} cannot be read (there is no such file); give the directory of a training job")
    return record


def read_status(job_directory: Path) -> TrainStatus:
    """How far the job is; `preparing` before its worker has said anything."""
    path = job_directory / STATUS
    return read_record(path, TrainStatus) if path.is_file() else TrainStatus(state="preparing")


def tell(job_directory: Path, state: str, message: str = "", **numbers: int) -> None:
    """Replace the status, keeping the numbers that were found before."""
    before = read_status(job_directory).model_dump()
    status = TrainStatus.model_validate({**before, "exit_code": 0, "state": state, "message": message, **numbers})
    write_record(job_directory / STATUS, status)


def tell_fault(job_directory: Path, error: Exception) -> None:
    """The status `failed`, with a sentence."""
    known = isinstance(error, VcotError)
    message = str(error) if known else f"training stopped ({type(error).__name__}: {error}); see worker.log"
    tell(job_directory, "failed", message, exit_code=error.exit_code if isinstance(error, VcotError) else 1)


@contextmanager
def exclusive(job_directory: Path, lock: str = WORKER_LOCK) -> Iterator[None]:
    """Hold the job for one process; raises BusyError for a second. The lock goes with the process, however it ends."""
    try:
        file = (job_directory / lock).open("w")
    except OSError as error:
        raise InputError(
            f"job directory {job_directory} cannot be used ({error.strerror}); submit the job again"
        ) from None
    with file:
        if not try_lock(file):
            raise BusyError(f"another worker holds {job_directory}; follow that one, or wait for it")
        yield


def publish_directory(partial: Path, target: Path) -> None:
    """Rename a finished directory into place, its files on disk first: `target` is complete whenever it exists."""
    for path in sorted(partial.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _sync_directory(partial)
    partial.replace(target)
    _sync_directory(target.parent)


def fresh_directory(path: Path) -> Path:
    """An empty directory at `path`; what an interrupted process left there is removed."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
