"""The steps of a run, each over its run directory: sample, judge, pair, train, merge, swap, eval.

A step recomputes from recipe and ledger what it needs of the earlier ones, so each can be redone alone. What a step finds
done it does not do again, and a server is started only when something is owed to it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

from eval.scorer import score_response
from pipeline.client import ChatClient
from pipeline.errors import CheckpointError, DataError, InputError, StageError, SwapError
from pipeline.judges import Judge, judge_responses, judgment_key
from pipeline.judges.pointwise import PointwiseJudge
from pipeline.judges.verifier import Verifier
from pipeline.pairs import PairSet, build_pairs, split_pairs
from pipeline.publish import pairs_digest, publish_pairs, render_card
from pipeline.recipe import render_recipe
from pipeline.records import CheckpointRef, Judgment, Response, Score, StageCount, Task
from pipeline.run import Run
from pipeline.sample import SampleRequest, owed_requests, plan_requests, sample
from pipeline.sources import load_tasks
from services.admin import register, retire, swap_to
from services.checkpoints import Checkpoint, Registry
from services.parity import ParityReport, ask_served, check_defaults, verify
from services.serving import GatewayHandle, running_gateway
from services.terminal import Terminal
from training.job import REFERENCE, TrainJob, read_record, write_record
from training.parity import PROBE, Probe, read_probe

POLICY_ALIAS = "policy"
API_KEY_ENV = "VCOT_API_KEY"
"""Holds one of the keys that the gateway knows as VCOT_API_KEYS, where it has any."""


@dataclass
class Session:
    """One command's work on one run; holds the gateway that it started, if it needed one."""

    run: Run
    terminal: Terminal
    counts: list[StageCount] = field(default_factory=list)
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)
    _gateway: GatewayHandle | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()
        self.run.ledger.close()

    async def gateway(self) -> GatewayHandle:
        """The run's gateway, started at first use and stopped with the session."""
        if self._gateway is None and self.run.recipe.serve.url:
            self._gateway = GatewayHandle(self.run.recipe.serve.url.rstrip("/").removesuffix("/v1"), started_here=False)
        if self._gateway is None:
            what = f"{self.run.recipe.model.source} by vLLM, behind the gateway"
            with self.terminal.aside("serve", what), self.terminal.waiting("starting the server") as progress:
                self._gateway = await self._stack.enter_async_context(running_gateway(self.run, progress))
        return self._gateway

    async def live(self, checkpoint: Checkpoint) -> ChatClient:
        """A client of the gateway, with `checkpoint` served behind it as the policy."""
        gateway = await self.gateway()
        if self.run.recipe.serve.url and checkpoint.ref.kind != "base":  # that gateway has a registry of its own
            await register(gateway.url, checkpoint.directory)
        swapped = await swap_to(gateway.url, POLICY_ALIAS, checkpoint.ref.name)
        if swapped.way != "none":
            self.terminal.say(
                f"{checkpoint.ref.name} is live at {gateway.url} ({swapped.way}) after a pause of {swapped.pause_s:.2f} s"
            )
        concurrency = max(self.run.recipe.sample.max_concurrency, self.run.recipe.eval.max_concurrency)
        client = ChatClient(f"{gateway.url}/v1", os.environ.get(API_KEY_ENV, "none"), max_connections=concurrency)
        return await self._stack.enter_async_context(client)

    @cached_property
    def registry(self) -> Registry:
        """The run's checkpoints."""
        return Registry(self.run.directory)

    @cached_property
    def base(self) -> Checkpoint:
        """The untaught model."""
        return self.registry.base(self.run.recipe.model, self.run.recipe.serve.dtype, self.terminal.say)

    @cached_property
    def tasks(self) -> list[Task]:
        """The questions that preference data is made of."""
        return load_tasks(self.run.recipe.tasks, self.run.directory, self.run.images)

    @cached_property
    def eval_tasks(self) -> list[Task]:
        """The benchmark's questions; each has a gold answer."""
        tasks = load_tasks(self.run.recipe.eval.tasks(), self.run.directory, self.run.images)
        secret = next((task.id for task in tasks if task.answer is None), None)
        if secret is not None:
            raise DataError(
                f"task {secret} of {self.run.recipe.eval.source} has no gold answer; evaluate another split"
            )
        return tasks

    def parity_path(self, ref: CheckpointRef) -> Path:
        """Where the ParityReport of a checkpoint is kept, as it is served by this recipe."""
        return self.run.path("parity", f"{ref.digest.removeprefix('sha256:')[:12]}-{self.run.recipe.serve.dtype}.json")

    async def retire(self, checkpoint: Checkpoint) -> None:
        """Forget a checkpoint, here and at a gateway elsewhere; its files stay."""
        if self.run.recipe.serve.url:
            await retire((await self.gateway()).url, checkpoint.ref.name)
        self.registry.retire(checkpoint.ref.name)

    def job_directory(self, job: TrainJob) -> Path:
        """Where the trainer worker does this job."""
        return self.run.path("training", job.key[:12])

    def sample_requests(self) -> list[SampleRequest]:
        """What the recipe asks of the base."""
        section = self.run.recipe.sample
        return plan_requests(self.tasks, section.prompt, self.base.ref, section.params())

    def responses(self) -> list[Response]:
        """The good responses that are there, in the order of the plan. Raises InputError where there is none."""
        keys = [key for request in self.sample_requests() for key in request.response_keys()]
        found = self.run.ledger.get(Response, keys)
        responses = [found[key] for key in keys if key in found and found[key].error is None]
        if not responses:
            raise InputError(f"run {self.run.directory} holds no response to its recipe; run `vcot sample` first")
        if len(responses) < len(keys):
            self.terminal.warn(
                f"{len(keys) - len(responses)} of {len(keys)} responses are missing; `vcot sample` asks again"
            )
        return responses

    def account(self, count: StageCount) -> None:
        """Show a stage's account. Raises StageError where work is still owed."""
        self.counts.append(count)
        self.terminal.account(count)
        if count.failed:
            raise StageError(
                f"{count.failed} of {count.requested} failed in {count.stage}; the same command tries them again"
            )


async def sample_stage(session: Session) -> None:
    """Draw k responses per task from the base."""
    recipe = session.run.recipe
    session.terminal.heading(
        "sample",
        f"{len(session.tasks)} {recipe.tasks.source} tasks x {recipe.sample.k} responses of {session.base.ref.name} "
        f"at temperature {recipe.sample.temperature:g}",
    )
    requests = session.sample_requests()
    await _ask(session, "sample", session.base, requests, recipe.sample.max_concurrency)


async def _ask(
    session: Session, stage: str, checkpoint: Checkpoint, requests: Sequence[SampleRequest], max_concurrency: int
) -> None:
    """Ask what is owed of `requests`, all of one checkpoint; no server is needed where nothing is."""
    ledger, images = session.run.ledger, session.run.images
    if not owed_requests(requests, ledger):
        total = sum(request.sampling.n for request in requests)
        session.account(StageCount(stage=stage, requested=total, cached=total))
        return
    client = await session.live(checkpoint)
    with session.terminal.tracking("responses") as on_progress:
        count = await sample(requests, client, ledger, images, max_concurrency=max_concurrency, on_progress=on_progress)
    session.account(count.model_copy(update={"stage": stage}))


async def judge_stage(session: Session) -> None:
    """Score every response."""
    responses = session.responses()
    judge = make_judge(session)
    session.terminal.heading("judge", f"{len(responses)} responses, by {judge.name}")
    async with judge:
        with session.terminal.tracking("judgments") as on_progress:
            count = await judge_responses(
                judge,
                {task.id: task for task in session.tasks},
                responses,
                session.run.ledger,
                max_concurrency=session.run.recipe.judge.max_concurrency,
                on_progress=on_progress,
            )
    session.account(count)


def make_judge(session: Session) -> Judge:
    """The recipe's judge."""
    section = session.run.recipe.judge
    return Verifier() if section.kind == "verifier" else PointwiseJudge(section, session.run.images)


@dataclass(frozen=True)
class Published:
    """The pairs of a run, on disk."""

    pair_set: PairSet
    directory: Path
    digest: str
    judgments: tuple[Judgment, ...]


def pair_stage(session: Session) -> Published:
    """Best and worst response of each task, as Parquet."""
    recipe = session.run.recipe
    session.terminal.heading("pair", f"{recipe.pairs.policy}, ties dropped")
    responses = session.responses()
    judge = make_judge(session)
    tasks = {task.id: task for task in session.tasks}
    keys = {judgment_key(judge, tasks[r.task], r): r.key for r in responses}
    judgments = {keys[key]: j for key, j in session.run.ledger.get(Judgment, keys).items() if j.error is None}
    if not judgments:
        raise InputError(f"run {session.run.directory} holds no judgment by {judge.name}; run `vcot judge` first")
    pair_set = build_pairs(session.tasks, responses, judgments)
    train, validation = split_pairs(pair_set.pairs, recipe.pairs.validation_fraction, recipe.pairs.seed)
    digest = pairs_digest(train, validation)
    directory = session.run.path("pairs", digest[:12])
    card = render_card(
        train, validation, source=recipe.tasks.source, model=recipe.model.source, recipe_toml=render_recipe(recipe)
    )
    publish_pairs(train, validation, session.run.images, directory, card=card)
    session.counts.append(pair_set.count)
    dropped, unjudged = pair_set.count.refused, pair_set.count.failed
    session.terminal.say(
        f"{len(train)} training + {len(validation)} validation pairs in {directory}; "
        f"{dropped} tasks dropped as ties" + (f", {unjudged} had too few judged responses" if unjudged else "")
    )
    return Published(pair_set, directory, digest, tuple(judgments.values()))


def make_job(session: Session, published: Published) -> TrainJob:
    """The training job on these pairs. Raises DataError where a pair's image is in the benchmark."""
    seen = {task.image.sha256 for task in session.eval_tasks if task.image}
    leak = next((pair.task for pair in published.pair_set.pairs if pair.image.sha256 in seen), None)
    if leak is not None:
        raise DataError(f"the image of pair {leak} is in the evaluation set too; take another split for one of them")
    return TrainJob(
        base=session.base.ref,
        base_path=str(session.base.directory),
        pairs_path=str(published.directory),
        pairs_digest=published.digest,
        train=session.run.recipe.train,
        merge=session.run.recipe.merge,
        serve_dtype=session.run.recipe.serve.dtype,
        reference_path=str(session.run.path(REFERENCE)),
    )


def eval_requests(session: Session, checkpoint: CheckpointRef) -> list[SampleRequest]:
    """Every prompt at every temperature, for one checkpoint."""
    section = session.run.recipe.eval
    return [
        request
        for prompt in section.prompts
        for temperature in section.temperatures
        for request in plan_requests(session.eval_tasks, prompt, checkpoint, section.params(temperature))
    ]


async def parity_stage(session: Session, checkpoints: Sequence[Checkpoint]) -> list[ParityReport]:
    """See that each trained checkpoint is served as it was trained; what was seen once is not asked again.

    Raises SwapError where one is not; the checkpoint that it was trained from is live again then, and it is retired.
    """
    reports = []
    for checkpoint in checkpoints:
        if checkpoint.ref.kind == "base":
            continue
        probe = read_probe(checkpoint.directory)
        if probe is None:
            session.terminal.warn(f"{checkpoint.ref.name} has no {PROBE}, so how it is served cannot be compared")
            continue
        path = session.parity_path(checkpoint.ref)
        if not path.is_file():
            write_record(path, await _verify_served(session, checkpoint, probe))
        reports.append(read_record(path, ParityReport))
    return reports


async def _verify_served(session: Session, checkpoint: Checkpoint, probe: Probe) -> ParityReport:
    ref, recipe = checkpoint.ref, session.run.recipe
    session.terminal.heading("parity", f"{ref.name}: {2 * len(probe.pairs)} responses, vLLM against Hugging Face")
    parent = next((c for c in session.registry.list() if c.ref.digest == ref.parent), None)
    if parent is None:
        raise CheckpointError(f"the base {ref.parent} of {ref.name} is not registered; `vcot checkpoints add` it")
    try:
        client = await session.live(parent)
        served_base = await ask_served(client, parent.ref, probe, recipe.eval.max_concurrency)
        client = await session.live(checkpoint)
        served = await ask_served(client, ref, probe, recipe.eval.max_concurrency)
        await check_defaults(client, ref, probe)
        report = verify(ref, served, served_base, probe, recipe.serve.dtype)
    except SwapError as error:
        await session.live(parent)
        await session.retire(checkpoint)
        raise SwapError(f"{error}; {parent.ref.name} is live again, and {ref.name} is retired") from None
    worst, kept = max(report.max_abs_logp.values()), report.retention
    session.terminal.say(
        f"log-probs agree within {worst:.1e} ({report.tolerance:g} allowed in {report.dtype}), the base's differ by "
        f"{report.differs_from_base:.2g}; reward margin {kept.before:.3f} -> {kept.after:.3f} as served ({kept.kept:.1%})"
    )
    return report


async def eval_stage(session: Session, checkpoints: Sequence[Checkpoint]) -> None:
    """Ask the benchmark of each checkpoint, swapped in in turn. None is evaluated that is not served as it was trained."""
    await parity_stage(session, checkpoints)
    section = session.run.recipe.eval
    for checkpoint in checkpoints:
        session.terminal.heading(
            "eval",
            f"{checkpoint.ref.name}: {len(session.eval_tasks)} {section.source} questions, {', '.join(section.prompts)} "
            f"at temperatures {', '.join(f'{t:g}' for t in section.temperatures)}",
        )
        requests = eval_requests(session, checkpoint.ref)
        await _ask(session, f"eval {checkpoint.ref.name}", checkpoint, requests, section.max_concurrency)


def load_scores(session: Session, checkpoints: Sequence[Checkpoint]) -> list[Score]:
    """A score for each response that the benchmark asked of `checkpoints` and got, errors included."""
    tasks = {task.id: task for task in session.eval_tasks}
    scores: list[Score] = []
    for checkpoint in checkpoints:
        keys = [key for request in eval_requests(session, checkpoint.ref) for key in request.response_keys()]
        found = session.run.ledger.get(Response, keys)
        if not found:
            raise InputError(
                f"run {session.run.directory} holds no answer of {checkpoint.ref.name}; run `vcot eval` first"
            )
        scores += [score_response(tasks[found[key].task], found[key]) for key in keys if key in found]
    return scores
