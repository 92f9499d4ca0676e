"""The steps of a run, each over its run directory: sample, judge, pair, train, merge, swap, eval.

A step recomputes from recipe and ledger what it needs of the earlier ones, so each can be redone alone. What a step finds
done it does not do again, and a server is started only when something is owed to it.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

from eval.image_reliance import choose_images
from eval.scorer import score_response
from pipeline.client import ChatClient
from pipeline.errors import CheckpointError, DataError, InputError, StageError, SwapError
from pipeline.files import write_record
from pipeline.judges import find_unjudged_fault, judge_responses
from pipeline.publish import publish_pairs, render_card
from pipeline.recipe import POLICY_ALIAS, EvalSection
from pipeline.records import (
    CheckpointRef,
    PreferencePair,
    Response,
    Score,
    ShownImage,
    Split,
    StageCount,
    Task,
    Usage,
)
from pipeline.run import Run
from pipeline.sample import SampleRequest, owed_requests, plan_requests, sample, show_image
from pipeline.sources import load_tasks
from services.admin import fetch_state, register, retire, swap_to, try_out
from services.checkpoints import Checkpoint, Registry
from services.judging import read_meter, say_estimate, test_judge
from services.parity import ParityReport, ask_served, check_defaults, verify
from services.resting import resting, wanted_rest
from services.rounds import Round, make_judge
from services.serving import GatewayHandle, find_gateway, running_gateway
from services.terminal import Terminal
from training.job import TrainJob, read_record
from training.parity import PROBE, Probe, read_probe

API_KEY_ENV = "VCOT_API_KEY"
"""Holds one of the keys that the gateway knows as VCOT_API_KEYS, where it has any."""


@dataclass
class Session:
    """One command's work on one run; holds the gateway that it started, if it needed one."""

    run: Run
    terminal: Terminal
    counts: list[StageCount] = field(default_factory=list)
    test_usage: Usage | None = None
    """What a test judgment took, where one was made."""
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)
    _gateway: GatewayHandle | None = None
    _questions: dict[Split, list[Task]] = field(default_factory=dict)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()
        await self.run.ledger.finish()

    async def gateway(self) -> GatewayHandle:
        """The run's gateway, started at first use and stopped with the session."""
        if self._gateway is None and (url := self._url_elsewhere):
            self._gateway = GatewayHandle(url, started_here=False)
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
        return await self._client(gateway)

    @asynccontextmanager
    async def trials(self) -> AsyncIterator[Callable[[Checkpoint], Awaitable[ChatClient]]]:
        """Serves checkpoints, registered or not, to their client only. Afterwards the policy is served as before."""
        gateway = await self.gateway()
        before = (await fetch_state(gateway.url)).aliases[POLICY_ALIAS]

        async def serve(checkpoint: Checkpoint) -> ChatClient:
            is_base = checkpoint.ref.kind == "base"  # each gateway has its own, wherever that lies
            await try_out(gateway.url, checkpoint.ref.name if is_base else checkpoint.directory)
            return await self._client(gateway)

        try:
            yield serve
        finally:
            await swap_to(gateway.url, POLICY_ALIAS, before)

    @asynccontextmanager
    async def at_rest(self) -> AsyncIterator[None]:
        """For training: the servers that are up rest meanwhile as `serve.while_training` says; none is started for that."""
        way = wanted_rest(self.run.recipe.serve)
        url = self._find_gateway() if way is not None else None
        async with AsyncExitStack() as stack:
            if way is not None and url is not None:
                await stack.enter_async_context(resting(url, way, self.terminal))
            yield

    def _find_gateway(self) -> str | None:
        """The URL of the run's gateway, if there is one without starting it."""
        if self._gateway is not None:
            return self._gateway.url
        return self._url_elsewhere or find_gateway(self.run)

    @property
    def _url_elsewhere(self) -> str | None:
        url = self.run.recipe.serve.url
        return url.rstrip("/").removesuffix("/v1") if url else None

    async def _client(self, gateway: GatewayHandle) -> ChatClient:
        concurrency = max(self.run.recipe.sample.max_concurrency, self.run.recipe.eval.max_concurrency)
        client = ChatClient(
            f"{gateway.url}/v1", os.environ.get(API_KEY_ENV, "none"), max_connections=concurrency, is_own=True
        )
        return await self._stack.enter_async_context(client)

    @cached_property
    def registry(self) -> Registry:
        """The run's checkpoints."""
        return Registry(self.run.directory)

    @cached_property
    def base(self) -> Checkpoint:
        """The untaught model."""
        return self.registry.base(self.run.recipe.model, self.terminal.say)

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

    def job_directory(self, job: TrainJob) -> Path:
        """Where the trainer worker does this job."""
        return self.run.path("training", job.key[:12])

    def parity_path(self, ref: CheckpointRef) -> Path:
        """Where the ParityReport of a checkpoint is kept, as it is served by this recipe."""
        return self.run.path("parity", f"{ref.digest.removeprefix('sha256:')[:12]}-{self.run.recipe.serve.dtype}.json")

    async def retire(self, checkpoint: Checkpoint) -> None:
        """Forget a checkpoint, here and at a gateway elsewhere; its files stay."""
        if self.run.recipe.serve.url:
            await retire((await self.gateway()).url, checkpoint.ref.name)
        self.registry.retire(checkpoint.ref.name)

    def account(self, count: StageCount) -> None:
        """Show a stage's account. Raises StageError where work is still owed."""
        self.counts.append(count)
        self.terminal.account(count)
        if count.failed:
            raise StageError(
                f"{count.failed} of {count.requested} failed in {count.stage} ({count.by_reason}); the same command tries "
                "them again"
            )


async def sample_stage(current: Round) -> None:
    """Draw k responses per task from the round's starting policy; from none that is not served as it was trained."""
    session, recipe = current.session, current.session.run.recipe
    await parity_stage(session, [current.start])
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
    """Score every response. Raises StageError where the judge gave no verdict on more than the recipe tolerates."""
    session, section = current.session, current.session.run.recipe.judge
    judge, standing = make_judge(session), current.standing()
    session.terminal.heading("judge", f"{len(standing.responses)} responses, by {judge.name}")
    async with judge:
        meter = read_meter(session, judge)
        if standing.owed and judge.is_model and not meter.num_judgments and session.test_usage is None:
            await test_judge(session, judge, standing.num_asks)
            meter = read_meter(session, judge)
        elif standing.owed and judge.is_model:
            say_estimate(session, meter, standing.num_asks)
        with session.terminal.tracking("judgments", lambda: meter.summary) as on_progress:
            count = await judge_responses(
                judge,
                {task.id: task for task in current.tasks},
                standing,
                session.run.ledger,
                meter,
                max_concurrency=section.max_concurrency,
                on_progress=on_progress,
            )
    if meter.num_judgments:
        session.terminal.say(f"paid for {meter.cost.summary}")
    session.account(count)
    if (fault := find_unjudged_fault(count, section)) is not None:
        raise StageError(fault)


def pair_stage(current: Round) -> None:
    """Best and worst response of each task, as Parquet."""
    session, recipe, pairs = current.session, current.session.run.recipe, current.pairs
    session.terminal.heading("pair", f"{recipe.pairs.policy}, ties dropped")
    publish_splits(current, pairs.train, pairs.validation, pairs.directory)
    count = pairs.pair_set.count
    session.counts.append(count)
    session.terminal.say(
        f"{len(pairs.train)} training + {len(pairs.validation)} validation pairs in {pairs.directory}"
        + (f"; left out: {count.by_reason}" if count.reasons else "")
    )
    if count.ok < (recipe.pairs.num or count.requested / 2):
        judged = pairs.judged
        wanted = "" if recipe.pairs.num is None else f", and pairs.num asks for {recipe.pairs.num}"
        session.terminal.warn(
            f"only {count.ok} of {count.requested} tasks gave a pair ({count.by_reason}){wanted}"
            + (f"; {judged.refused} responses were not judged ({judged.by_reason})" if judged.refused else "")
            + "; sample more tasks, hotter (sample.temperature), or with a judge that tells responses apart"
        )


def publish_splits(
    current: Round, train: Sequence[PreferencePair], validation: Sequence[PreferencePair], directory: Path
) -> None:
    """Pairs of the round as a data set in `directory`, with its card."""
    recipe = current.session.run.recipe
    card = render_card(
        train,
        validation,
        recipe=recipe,
        model=current.start.ref.name if current.number > 1 else recipe.model.source,
        judged=current.pairs.judged,
        paired=current.pairs.pair_set.count,
    )
    publish_pairs(train, validation, current.session.run.images, directory, card=card)


def eval_requests(
    session: Session, checkpoint: CheckpointRef, split: Split, images: Sequence[ShownImage]
) -> list[SampleRequest]:
    """Every prompt at every temperature about every kind of image, for one checkpoint."""
    tasks = session.questions(split)
    requests = plan_settings(session.run.recipe.eval, tasks, checkpoint)
    asked: list[SampleRequest] = []
    for name in images:
        if name == "true":
            asked += requests
            continue
        shown = choose_images(tasks, name, session.run.images)
        asked += [show_image(request, shown[request.task.id]) for request in requests if request.task.id in shown]
    return asked


def plan_settings(section: EvalSection, tasks: Sequence[Task], checkpoint: CheckpointRef) -> list[SampleRequest]:
    """Every prompt of the section at every temperature, about the tasks' own images."""
    return [
        request
        for prompt in section.prompts
        for temperature in section.temperatures
        for request in plan_requests(tasks, prompt, checkpoint, section.params(temperature))
    ]


async def parity_stage(session: Session, checkpoints: Sequence[Checkpoint]) -> list[ParityReport]:
    """See that each trained checkpoint is served as it was trained, and register it; what was seen once is not asked again.

    Raises SwapError where one is not, which is not registered then. What is live stays so, but for the time of asking.
    """
    reports = []
    for checkpoint in checkpoints:
        if checkpoint.ref.kind == "base":
            continue
        probe = read_probe(checkpoint.directory)
        if probe is None:
            session.terminal.warn(f"{checkpoint.ref.name} has no {PROBE}, so how it is served cannot be compared")
        else:
            path = session.parity_path(checkpoint.ref)
            if not path.is_file():
                write_record(path, await _verify_served(session, checkpoint, probe))
            reports.append(read_record(path, ParityReport))
        if session.registry.find(checkpoint.ref.name) is None:
            session.registry.register(checkpoint.directory)
    return reports


async def _verify_served(session: Session, checkpoint: Checkpoint, probe: Probe) -> ParityReport:
    ref, recipe = checkpoint.ref, session.run.recipe
    session.terminal.heading("parity", f"{ref.name}: {2 * len(probe.pairs)} responses, vLLM against Hugging Face")
    parent = next((c for c in (session.base, *session.registry.list()) if c.ref.digest == ref.parent), None)
    if parent is None:
        raise CheckpointError(f"the base {ref.parent} of {ref.name} is not registered; `vcot checkpoints add` it first")
    found: ParityReport | SwapError
    async with session.trials() as serve:
        try:
            served_base = await ask_served(await serve(parent), parent.ref, probe, recipe.eval.max_concurrency)
            client = await serve(checkpoint)
            served = await ask_served(client, ref, probe, recipe.eval.max_concurrency)
            await check_defaults(client, ref, probe)
            found = verify(ref, served, served_base, probe, recipe.serve.dtype)
        except SwapError as error:
            found = error
    if isinstance(found, SwapError):
        await _reject(session, checkpoint, parent, found)
    worst, kept = max(found.max_abs_logp.values()), found.retention
    session.terminal.say(
        f"log-probs agree within {worst:.1e} ({found.tolerance:g} allowed in {found.dtype}), the base's differ by "
        f"{found.differs_from_base:.2g}; reward margin {kept.before:.3f} -> {kept.after:.3f} as served ({kept.kept:.1%})"
    )
    return found


async def _reject(session: Session, checkpoint: Checkpoint, parent: Checkpoint, fault: SwapError) -> NoReturn:
    """Raise SwapError, after retiring a checkpoint that was served rightly once, as in another type."""
    name = checkpoint.ref.name
    if session.registry.find(name) is None:
        raise SwapError(f"{fault}; it is not registered, and all else is served as before")
    await session.live(parent)
    try:
        await session.retire(checkpoint)
    except CheckpointError as error:
        raise SwapError(f"{fault}; {parent.ref.name} is live, but {error}") from None
    raise SwapError(f"{fault}; {parent.ref.name} is live, and {name} is retired")


async def eval_stage(session: Session, checkpoints: Sequence[Checkpoint], split: Split) -> None:
    """Ask one split of the benchmark of each checkpoint, swapped in in turn.

    None is evaluated that is not served as it was trained.
    """
    await parity_stage(session, checkpoints)
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


async def probe_stage(session: Session, checkpoints: Sequence[Checkpoint], tasks: Sequence[Task]) -> None:
    """Ask `tasks` of each checkpoint as the benchmark's questions are asked, after checking how it is served."""
    await parity_stage(session, checkpoints)
    section = session.run.recipe.eval
    for checkpoint in checkpoints:
        session.terminal.heading("probe", f"{checkpoint.ref.name}: {len(tasks)} {tasks[0].source} drawings")
        requests = plan_settings(section, tasks, checkpoint.ref)
        await _ask(session, f"probe {checkpoint.ref.name}", checkpoint, requests, section.max_concurrency)


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
