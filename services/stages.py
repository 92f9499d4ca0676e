"""The steps of a run, each over its run directory: sample, judge, pair, train, merge, swap, eval.

Model: a run is one round or several (Wu et al. 2024). A `Round` is a policy and its questions, and all that follows from
them: responses, pairs, training job, and the policy that comes out, which the next round starts from.

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

from eval.image_reliance import choose_images
from eval.scorer import score_response
from pipeline.client import ChatClient
from pipeline.errors import DataError, InputError, StageError
from pipeline.judges import Judge, judge_responses, judgment_key
from pipeline.judges.pointwise import PointwiseJudge
from pipeline.judges.verifier import Verifier
from pipeline.pairs import PairSet, build_pairs, split_pairs
from pipeline.publish import pairs_digest, publish_pairs, render_card
from pipeline.recipe import render_recipe
from pipeline.records import (
    CheckpointRef,
    Judgment,
    PreferencePair,
    Response,
    Score,
    ShownImage,
    Split,
    StageCount,
    Task,
)
from pipeline.run import Run
from pipeline.sample import SampleRequest, owed_requests, plan_requests, sample, show_image
from pipeline.sources import load_round, load_tasks
from services.admin import register, swap_to
from services.checkpoints import Checkpoint, Registry
from services.serving import GatewayHandle, running_gateway
from services.terminal import Terminal
from training.job import REFERENCE, TrainJob

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
    _questions: dict[Split, list[Task]] = field(default_factory=dict)

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
        """A client of the gateway, with `checkpoint` live behind it."""
        gateway = await self.gateway()
        if self.run.recipe.serve.url and checkpoint.ref.kind != "base":  # that gateway has a registry of its own
            await register(gateway.url, checkpoint.directory)
        swapped = await swap_to(gateway.url, POLICY_ALIAS, checkpoint.ref.name)
        if swapped.pause_s:
            self.terminal.say(
                f"{checkpoint.ref.name} is live at {gateway.url} after a pause of {swapped.pause_s:.2f} s"
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

    def questions(self, split: Split) -> list[Task]:
        """The benchmark's questions of one split; each has a gold answer."""
        if split not in self._questions:
            self._questions[split] = self._load_questions(split)
        return self._questions[split]

    def _load_questions(self, split: Split) -> list[Task]:
        section = self.run.recipe.eval
        tasks = load_tasks(section.tasks(split), self.run.directory, self.run.images)
        secret = next((task.id for task in tasks if task.answer is None), None)
        if secret is not None:
            raise DataError(f"task {secret} of {section.source} has no gold answer; evaluate another split")
        return tasks

    def rounds(self) -> list[Round]:
        """The rounds that can be worked on: the first, and each whose predecessor's policy is there."""
        rounds = [Round(self, 1, self.base)]
        while len(rounds) < self.run.recipe.rounds.num and (policy := rounds[-1].policy) is not None:
            rounds.append(Round(self, len(rounds) + 1, policy))
        return rounds

    def account(self, count: StageCount) -> None:
        """Show a stage's account. Raises StageError where work is still owed."""
        self.counts.append(count)
        self.terminal.account(count)
        if count.failed:
            raise StageError(
                f"{count.failed} of {count.requested} failed in {count.stage}; the same command tries them again"
            )


@dataclass(frozen=True)
class Round:
    """One pass of sample, judge, pair, train and merge. What it holds is read from the run when it is first asked for."""

    session: Session
    number: int
    """From 1."""
    start: Checkpoint
    """Samples the responses, and is what training starts from: the base, then the policy of the round before."""

    @property
    def reference(self) -> Checkpoint:
        """What training pulls towards."""
        seeded = self.number > 1 and self.session.run.recipe.rounds.reference == "seed"
        return self.session.base if seeded else self.start

    @cached_property
    def tasks(self) -> list[Task]:
        """The questions that the round's preference data is made of; no earlier round saw their images."""
        run = self.session.run
        return load_round(run.recipe.tasks, self.number, run.directory, run.images)

    def requests(self) -> list[SampleRequest]:
        """What the recipe asks of the starting policy."""
        section = self.session.run.recipe.sample
        return plan_requests(self.tasks, section.prompt, self.start.ref, section.params())

    def responses(self) -> list[Response]:
        """The good responses that are there, in the order of the plan. Raises InputError where there is none."""
        run = self.session.run
        keys = [key for request in self.requests() for key in request.response_keys()]
        found = run.ledger.get(Response, keys)
        responses = [found[key] for key in keys if key in found and found[key].error is None]
        if not responses:
            raise InputError(f"run {run.directory} holds no response to its recipe; run `vcot sample` first")
        if len(responses) < len(keys):
            self.session.terminal.warn(
                f"{len(keys) - len(responses)} of {len(keys)} responses are missing; `vcot sample` asks again"
            )
        return responses

    @cached_property
    def pairs(self) -> Pairs:
        """Best and worst response of each task. Raises InputError where nothing is sampled or judged."""
        run, section = self.session.run, self.session.run.recipe.pairs
        responses = self.responses()
        judge = make_judge(self.session)
        tasks = {task.id: task for task in self.tasks}
        keys = {judgment_key(judge, tasks[r.task], r): r.key for r in responses}
        judgments = {keys[key]: j for key, j in run.ledger.get(Judgment, keys).items() if j.error is None}
        if not judgments:
            raise InputError(f"run {run.directory} holds no judgment by {judge.name}; run `vcot judge` first")
        pair_set = build_pairs(self.tasks, responses, judgments)
        train, validation = split_pairs(pair_set.pairs, section.validation_fraction, section.seed)
        digest = pairs_digest(train, validation)
        return Pairs(pair_set, train, validation, digest, run.path("pairs", digest[:12]), tuple(judgments.values()))

    @cached_property
    def job(self) -> TrainJob:
        """The training job on the round's pairs. Raises DataError where a pair's image is in the benchmark."""
        recipe = self.session.run.recipe
        splits: set[Split] = {recipe.eval.split} | ({"validation"} if recipe.rounds.num > 1 else set())
        seen = {task.image.sha256 for split in splits for task in self.session.questions(split) if task.image}
        leak = next((pair.task for pair in self.pairs.pair_set.pairs if pair.image.sha256 in seen), None)
        if leak is not None:
            raise DataError(
                f"the image of pair {leak} is in the evaluation set too; take another split for one of them"
            )
        return TrainJob(
            base=self.start.ref,
            base_path=str(self.start.directory),
            pairs_path=str(self.pairs.directory),
            pairs_digest=self.pairs.digest,
            round=self.number,
            train=recipe.train,
            merge=recipe.merge,
            serve_dtype=recipe.serve.dtype,
            reference_path=str(self.session.run.path(REFERENCE)),
            reference=None if self.reference is self.start else self.reference.ref,
            reference_weights=None if self.reference is self.start else str(self.reference.directory),
        )

    @property
    def job_directory(self) -> Path:
        """Where the trainer worker does the job."""
        return self.session.run.path("training", self.job.key[:12])

    @property
    def policy(self) -> Checkpoint | None:
        """What the round made of its starting policy; None as long as it is not there."""
        try:
            name = self.job.checkpoint_name
        except InputError:  # nothing is sampled or judged yet
            return None
        return self.session.registry.find(name)


async def sample_stage(current: Round) -> None:
    """Draw k responses per task from the round's starting policy."""
    session, recipe = current.session, current.session.run.recipe
    session.terminal.heading(
        "sample",
        f"{len(current.tasks)} {recipe.tasks.source} tasks x {recipe.sample.k} responses of {current.start.ref.name} "
        f"at temperature {recipe.sample.temperature:g}",
    )
    await _ask(session, "sample", current.start, current.requests(), recipe.sample.max_concurrency)


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


async def judge_stage(current: Round) -> None:
    """Score every response."""
    session, responses = current.session, current.responses()
    judge = make_judge(session)
    session.terminal.heading("judge", f"{len(responses)} responses, by {judge.name}")
    async with judge:
        with session.terminal.tracking("judgments") as on_progress:
            count = await judge_responses(
                judge,
                {task.id: task for task in current.tasks},
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
class Pairs:
    """The pairs of a round."""

    pair_set: PairSet
    train: list[PreferencePair]
    validation: list[PreferencePair]
    digest: str
    directory: Path
    """Where `pair_stage` puts them."""
    judgments: tuple[Judgment, ...]


def pair_stage(current: Round) -> None:
    """Best and worst response of each task, as Parquet."""
    session, recipe, pairs = current.session, current.session.run.recipe, current.pairs
    session.terminal.heading("pair", f"{recipe.pairs.policy}, ties dropped")
    card = render_card(
        pairs.train,
        pairs.validation,
        source=recipe.tasks.source,
        model=current.start.ref.name if current.number > 1 else recipe.model.source,
        recipe_toml=render_recipe(recipe),
    )
    publish_pairs(pairs.train, pairs.validation, session.run.images, pairs.directory, card=card)
    count = pairs.pair_set.count
    session.counts.append(count)
    session.terminal.say(
        f"{len(pairs.train)} training + {len(pairs.validation)} validation pairs in {pairs.directory}; "
        f"{count.refused} tasks dropped as ties"
        + (f", {count.failed} had too few judged responses" if count.failed else "")
    )


def eval_requests(
    session: Session, checkpoint: CheckpointRef, split: Split, images: Sequence[ShownImage]
) -> list[SampleRequest]:
    """Every prompt at every temperature about every kind of image, for one checkpoint."""
    section, tasks = session.run.recipe.eval, session.questions(split)
    requests = [
        request
        for prompt in section.prompts
        for temperature in section.temperatures
        for request in plan_requests(tasks, prompt, checkpoint, section.params(temperature))
    ]
    asked: list[SampleRequest] = []
    for name in images:
        if name == "true":
            asked += requests
            continue
        shown = choose_images(tasks, name, session.run.images)
        asked += [show_image(request, shown[request.task.id]) for request in requests if request.task.id in shown]
    return asked


async def eval_stage(session: Session, checkpoints: Sequence[Checkpoint], split: Split) -> None:
    """Ask one split of the benchmark of each checkpoint, swapped in in turn."""
    section = session.run.recipe.eval
    for checkpoint in checkpoints:
        session.terminal.heading(
            "eval",
            f"{checkpoint.ref.name}: {len(session.questions(split))} {section.source} questions of {split}, "
            f"{', '.join(section.prompts)} at temperatures {', '.join(f'{t:g}' for t in section.temperatures)}"
            + (f", images {', '.join(section.images)}" if len(section.images) > 1 else ""),
        )
        requests = eval_requests(session, checkpoint.ref, split, section.images)
        await _ask(session, f"eval {checkpoint.ref.name}", checkpoint, requests, section.max_concurrency)


Scores = dict[ShownImage, list[Score]]
"""By the image that was shown."""


def load_scores(session: Session, checkpoints: Sequence[Checkpoint], split: Split) -> Scores:
    """A score for each response that the benchmark asked of `checkpoints` and got, errors included."""
    tasks = {task.id: task for task in session.questions(split)}
    return {
        shown: [score for checkpoint in checkpoints for score in _load_scores(session, checkpoint, split, shown, tasks)]
        for shown in session.run.recipe.eval.images
    }


def _load_scores(
    session: Session, checkpoint: Checkpoint, split: Split, shown: ShownImage, tasks: dict[str, Task]
) -> list[Score]:
    requests = eval_requests(session, checkpoint.ref, split, [shown])
    keys = [key for request in requests for key in request.response_keys()]
    found = session.run.ledger.get(Response, keys)
    if not found:
        raise InputError(
            f"run {session.run.directory} holds no answer of {checkpoint.ref.name} on {split} with the {shown} image; "
            "run `vcot eval` first"
        )
    return [score_response(tasks[found[key].task], found[key]) for key in keys if key in found]
