"""One command's work on one run: what its steps share, each made when it is first asked for."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from vcot.eval.benchmark import Benchmark, find_benchmark
from vcot.eval.evaluate import Questions, load_questions
from vcot.pipeline.client import ChatClient
from vcot.pipeline.errors import OwedError, StageError
from vcot.pipeline.records import CheckpointRef, Split, StageCount, Usage
from vcot.pipeline.report import Accounted, Report, Said
from vcot.services.checkpoints.registry import Checkpoint, Registry
from vcot.services.run.directory import Run
from vcot.services.run.engines import Crew, Engine, Here, Sharded
from vcot.services.run.gateways import Gateway, make_gateway
from vcot.services.run.measuring import Trials
from vcot.services.run.resting import at_rest
from vcot.training.protocol.job import TrainJob

T = TypeVar("T")


@dataclass
class Session:
    """Closes the run, and what it started, at its end."""

    run: Run
    report: Report
    """Listens to what the steps tell."""
    counts: list[StageCount] = field(default_factory=list)
    tested: dict[str, Usage | None] = field(default_factory=dict)
    """What a test took of the judges that were tested, by name; None of one that tells no tokens."""
    asked: dict[Split, Questions] = field(default_factory=dict)
    """The benchmark's questions of the splits that were needed so far."""
    crew: Crew | None = None
    """Who asks what stages owe; None for this process."""
    shards: str | None = None
    """The URL of storage that the crew reaches; None for the run directory."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.engine.close()
        await self.gateway.close()
        await self.run.close()

    @cached_property
    def registry(self) -> Registry:
        """The run's checkpoints."""
        return Registry(self.run.directory)

    @cached_property
    def gateway(self) -> Gateway:
        """The run's own, or the one elsewhere that the recipe names; not opened by being asked for."""
        return make_gateway(self.run, self.registry, self.report)

    @cached_property
    def engine(self) -> Engine:
        """Asks what stages owe."""
        if self.crew is None:
            return Here(self.run)
        return Sharded(self.run, self.gateway, self.report, self.crew, self.shards)

    @cached_property
    def trials(self) -> Trials:
        """Asks any checkpoint over the gateway, which is opened for that."""
        return Trials(self.gateway, self.registry, self.run.recipe, self.report)

    async def measure(self, checkpoint: Checkpoint, ask: Callable[[ChatClient], Awaitable[T]]) -> T:
        """As `Trials.measure`."""
        return await self.trials.measure(checkpoint, ask)

    def at_rest(self) -> AbstractAsyncContextManager[None]:
        """For training: the servers that are up rest meanwhile as `serve.while_training` says; none is started for that."""
        return at_rest(self.gateway, self.report)

    @cached_property
    def base(self) -> Checkpoint:
        """The base model; described at first use, but by a command that only reads. Raises OwedError for that one."""
        if self.run.is_read:
            found = self.registry.find(self.run.recipe.model.name)
            if found is None:
                raise OwedError(f"run {self.run.directory} does not hold its model yet; `vcot sample` finds it")
            return found
        return self.registry.base(self.run.recipe.model, lambda text: self.report(Said(text)))

    def find(self, names: Sequence[str]) -> list[Checkpoint]:
        """The checkpoints of those names or aliases, also what is made and not registered yet. Raises CheckpointError.

        Each once: two names may mean the same weights, whose answers would count twice.
        """
        found: dict[str, Checkpoint] = {}
        for name in names:
            checkpoint = self.registry.find_made(name) or self.registry.resolve(name)
            found.setdefault(checkpoint.ref.digest, checkpoint)
        return list(found.values())

    @cached_property
    def benchmark(self) -> Benchmark:
        """The recipe's benchmark. Raises RecipeError where it is not found, or cannot ask what the recipe wants."""
        recipe = self.run.recipe
        benchmark = find_benchmark(recipe.eval)
        for split in recipe.eval_splits:
            benchmark.tasks(recipe.eval, split)
        return benchmark

    def questions(self, split: Split) -> Questions:
        """The benchmark's questions of one split."""
        if split not in self.asked:
            run = self.run
            self.asked[split] = load_questions(run.recipe.eval, split, run.directory, run.images, is_read=run.is_read)
        return self.asked[split]

    def job_directory(self, job: TrainJob) -> Path:
        """Where the trainer worker does this job."""
        return self.run.path("training", job.key[:12])

    def parity_path(self, ref: CheckpointRef) -> Path:
        """Where the ParityReport of a checkpoint is kept, as it is served by this recipe."""
        return self.run.path("parity", f"{ref.digest.removeprefix('sha256:')[:12]}-{self.run.recipe.serve.dtype}.json")

    def account(self, count: StageCount) -> None:
        """Show a stage's account. Raises StageError where work is still owed."""
        self.counts.append(count)
        self.report(Accounted(count))
        if count.failed:
            raise StageError(
                f"{count.failed} of {count.requested} failed in {count.stage} ({count.by_reason}); the same command tries "
                "them again"
            )
