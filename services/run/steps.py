"""The steps of a run, each over its run directory: sample, judge, pair, train, merge, eval, swap.

A step recomputes from recipe and ledger what it needs of the earlier ones, so each can be redone alone. What a step finds
done it does not do again, and a server is started only when something is owed to it.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self, TypeVar

from eval.benchmark import Benchmark, find_benchmark
from eval.evaluate import Questions, Scores, load_questions
from pipeline.client import ChatClient
from pipeline.errors import (
    CheckpointError,
    OnTrialError,
    OwedError,
    RequestError,
    ServerError,
    StageError,
    SwapError,
    VcotError,
)
from pipeline.files import write_record
from pipeline.judging import find_unjudged_fault, judge_responses
from pipeline.publish import publish_pairs, render_card
from pipeline.recipe import POLICY_ALIAS
from pipeline.records import (
    CheckpointRef,
    PreferencePair,
    Split,
    StageCount,
    Usage,
)
from pipeline.report import Accounted, Began, Report, Said, Warned, aside, tracking, waiting
from pipeline.run import Run
from pipeline.sample import SampleRequest, owed_requests, sample
from services.checkpoints.registry import Checkpoint, Registry
from services.gateway.admin import end_trial, fetch_state, register, retire, swap_to, try_out
from services.run.billing import read_meter, say_estimate, test_judge
from services.run.parity import ParityReport, ask_served, check_defaults, verify
from services.run.resting import resting, wanted_rest
from services.run.rounds import Round, make_judge
from services.run.serving import GatewayHandle, find_gateway, is_served, running_gateway
from training.protocol.agreement import PROBE, Answers, Probe, read_probe
from training.protocol.job import TrainJob, read_record

T = TypeVar("T")
_TRIAL_POLL_S = 2.0
_MAX_TRIALS = 5
"""How often a checkpoint is put on trial again, where others end that."""
API_KEY_ENV = "VCOT_API_KEY"
"""Holds one of the keys that the gateway knows as VCOT_API_KEYS, where it has any."""


@dataclass
class Session:
    """One command's work on one run; holds the gateway that it started, if it needed one."""

    run: Run
    report: Report
    """Listens to what the steps tell."""
    counts: list[StageCount] = field(default_factory=list)
    test_usage: Usage | None = None
    """What a test judgment took, where one was made."""
    _owner: str = field(default_factory=lambda: secrets.token_hex(8))
    """What this command is to a gateway on which it has checkpoints on trial."""
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)
    _gateway: GatewayHandle | None = None
    _questions: dict[Split, Questions] = field(default_factory=dict)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()
        await self.run.close()

    async def gateway(self) -> GatewayHandle:
        """The run's gateway, started at first use and stopped with the session."""
        if self._gateway is None and (url := self._url_elsewhere):
            self._gateway = GatewayHandle(url, started_here=False)
        if self._gateway is None:
            is_up = is_served(self.run)
            what = f"{self.run.recipe.model.source} by vLLM, behind the gateway"
            with (
                nullcontext() if is_up else aside(self.report, "serve", what),
                waiting(self.report, "waiting for the server" if is_up else "starting the server") as progress,
            ):
                self._gateway = await self._stack.enter_async_context(running_gateway(self.run, progress))
        return self._gateway

    async def measure(self, checkpoint: Checkpoint, ask: Callable[[ChatClient], Awaitable[T]]) -> T:
        """What `ask` finds with a client for which `checkpoint`, registered or not, is served under its name and digest.

        No alias is moved: the gateway has it on trial meanwhile, and serves what was live afterwards. Where another command
        measures another checkpoint there, this waits for it. A trial that others end, as by a swap, is begun again; `ask` is
        then called again, so it must do what is left. Raises RequestError or AccountError where that goes on.
        """
        gateway = await self.gateway()
        for num_left in reversed(range(_MAX_TRIALS)):
            try:
                async with self._on_trial(gateway, checkpoint):
                    return await self._with_client(gateway, ask)
            except (RequestError, StageError) as error:
                fault = error if isinstance(error, RequestError) else error.__cause__
                if not num_left or not isinstance(fault, RequestError) or fault.reason not in ("checkpoint", "model"):
                    raise
                self.report(Warned(f"{checkpoint.ref.name} is not served any more ({fault}); it is put on trial again"))
        raise AssertionError("the last turn returns or raises")

    @asynccontextmanager
    async def _on_trial(self, gateway: GatewayHandle, checkpoint: Checkpoint) -> AsyncIterator[None]:
        ref = checkpoint.ref
        is_known = ref.kind == "base" or self.registry.find(ref.name) is not None
        if self.run.recipe.serve.url and is_known and ref.kind != "base":  # that gateway has a registry of its own
            await register(gateway.url, checkpoint.directory)
        known = ref.name if is_known else checkpoint.directory
        is_told, is_left = False, True
        while True:
            try:
                tried = await try_out(gateway.url, known, self._owner)
                break
            except OnTrialError as error:
                if not is_told:
                    self.report(Said(f"at {gateway.url} {error}; {ref.name} has to wait for its end"))
                    is_told = True
                await asyncio.sleep(_TRIAL_POLL_S)
        try:
            if tried.live.digest != ref.digest:
                raise CheckpointError(
                    f"{ref.name} is {tried.live.digest[:19]} at {gateway.url}, and {ref.digest[:19]} in "
                    f"{self.run.directory}; use a gateway of the same model (serve.url)"
                )
            if tried.way != "none":
                self.report(
                    Said(
                        f"{ref.name} is on trial at {gateway.url} ({tried.way}) after a pause of {tried.pause_s:.2f} s"
                    )
                )
            yield
        except asyncio.CancelledError:
            is_left = not gateway.started_here  # or else it is stopped now
            raise
        finally:
            with suppress(VcotError):  # a gateway that is gone has no trial; one that hangs ends it by itself
                if is_left:
                    await end_trial(gateway.url, self._owner)

    async def _with_client(self, gateway: GatewayHandle, ask: Callable[[ChatClient], Awaitable[T]]) -> T:
        concurrency = max(self.run.recipe.sample.max_concurrency, self.run.recipe.eval.max_concurrency)
        url, key = f"{gateway.url}/v1", os.environ.get(API_KEY_ENV, "none")
        async with ChatClient(url, key, max_connections=concurrency, is_own=True) as client:
            return await ask(client)

    @asynccontextmanager
    async def at_rest(self) -> AsyncIterator[None]:
        """For training: the servers that are up rest meanwhile as `serve.while_training` says; none is started for that."""
        way = wanted_rest(self.run.recipe.serve)
        url = self._find_gateway() if way is not None else None
        async with AsyncExitStack() as stack:
            if way is not None and url is not None:
                await stack.enter_async_context(resting(url, way, self.report))
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

    @cached_property
    def registry(self) -> Registry:
        """The run's checkpoints."""
        return Registry(self.run.directory)

    @cached_property
    def base(self) -> Checkpoint:
        """The untaught model; described at first use, but by a command that only reads. Raises OwedError for that one."""
        if self.run.is_read:
            found = self.registry.find(self.run.recipe.model.name)
            if found is None:
                raise OwedError(f"run {self.run.directory} does not hold its model yet; `vcot sample` finds it")
            return found
        return self.registry.base(self.run.recipe.model, lambda text: self.report(Said(text)))

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
        if split not in self._questions:
            run = self.run
            self._questions[split] = load_questions(
                run.recipe.eval, split, run.directory, run.images, is_read=run.is_read
            )
        return self._questions[split]

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
        self.report(Accounted(count))
        if count.failed:
            raise StageError(
                f"{count.failed} of {count.requested} failed in {count.stage} ({count.by_reason}); the same command tries "
                "them again"
            )


async def sample_stage(current: Round) -> None:
    """Draw k responses per task from the round's starting policy; from none that is not served as it was trained."""
    session, recipe = current.session, current.session.run.recipe
    await parity_stage(session, [current.start])
    session.report(
        Began(
            "sample",
            f"{len(current.tasks)} {recipe.tasks.source} tasks x {recipe.sample.k} responses of {current.start.ref.name} "
            f"at temperature {recipe.sample.temperature:g}",
        )
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

    async def ask(client: ChatClient) -> StageCount:
        with tracking(session.report, "responses") as on_progress:
            return await sample(
                requests, client, ledger, images, max_concurrency=max_concurrency, on_progress=on_progress
            )

    count = await session.measure(checkpoint, ask)
    session.account(count.model_copy(update={"stage": stage}))


async def judge_stage(current: Round) -> None:
    """Score every response. Raises StageError where the judge gave no verdict on more than the recipe tolerates."""
    session, section = current.session, current.session.run.recipe.judge
    judge, standing = make_judge(session), current.standing()
    session.report(Began("judge", f"{len(standing.responses)} responses, by {judge.name}"))
    async with judge:
        meter = read_meter(session, judge)
        if standing.owed and judge.is_model and not meter.num_judgments and session.test_usage is None:
            await test_judge(session, judge, standing.num_asks)
            meter = read_meter(session, judge)
        elif standing.owed and judge.is_model:
            say_estimate(session, meter, standing.num_asks)
        with tracking(session.report, "judgments", lambda: meter.summary) as on_progress:
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
        session.report(Said(f"paid for {meter.cost.summary}"))
    session.account(count)
    if (fault := find_unjudged_fault(count, section)) is not None:
        raise StageError(fault)


def pair_stage(current: Round) -> None:
    """Best and worst response of each task, as Parquet."""
    session, recipe, pairs = current.session, current.session.run.recipe, current.pairs
    session.report(Began("pair", f"{recipe.pairs.policy}, ties dropped"))
    publish_splits(current, pairs.train, pairs.validation, pairs.directory)
    count = pairs.pair_set.count
    session.counts.append(count)
    session.report(
        Said(
            f"{len(pairs.train)} training + {len(pairs.validation)} validation pairs in {pairs.directory}"
            + (f"; left out: {count.by_reason}" if count.reasons else "")
        )
    )
    if count.ok < (recipe.pairs.num or count.requested / 2):
        judged = pairs.judged
        wanted = "" if recipe.pairs.num is None else f", and pairs.num asks for {recipe.pairs.num}"
        session.report(
            Warned(
                f"only {count.ok} of {count.requested} tasks gave a pair ({count.by_reason}){wanted}"
                + (f"; {judged.refused} responses were not judged ({judged.by_reason})" if judged.refused else "")
                + "; sample more tasks, hotter (sample.temperature), or with a judge that tells responses apart"
            )
        )


def publish_splits(
    current: Round, train: Sequence[PreferencePair], validation: Sequence[PreferencePair], directory: Path
) -> None:
    """Pairs of the round as a data set in `directory`, with its card."""
    recipe = current.session.run.recipe
    card = partial(
        render_card,
        train,
        validation,
        recipe=recipe,
        model=current.start.ref.name if current.number > 1 else recipe.model.source,
        judged=current.pairs.judged,
        paired=current.pairs.pair_set.count,
    )
    publish_pairs(train, validation, current.session.run.images, directory, card=card)


async def parity_stage(session: Session, checkpoints: Sequence[Checkpoint]) -> list[ParityReport]:
    """See that each trained checkpoint is served as it was trained, and register it; what was seen once is not asked again.

    Raises SwapError where one is not, which is not registered then. What is live is served again afterwards.
    """
    reports = []
    for checkpoint in checkpoints:
        if checkpoint.ref.kind == "base":
            continue
        probe = read_probe(checkpoint.directory)
        if probe is None:
            session.report(Warned(f"{checkpoint.ref.name} has no {PROBE}, so how it is served cannot be compared"))
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
    session.report(Began("parity", f"{ref.name}: {2 * len(probe.pairs)} responses, vLLM against Hugging Face"))
    parent = next((c for c in (session.base, *session.registry.list()) if c.ref.digest == ref.parent), None)
    if parent is None:
        raise CheckpointError(f"the base {ref.parent} of {ref.name} is not registered; `vcot checkpoints add` it first")

    async def ask(client: ChatClient) -> Answers:
        served = await ask_served(client, ref, probe, recipe.eval.max_concurrency)
        await check_defaults(client, ref, probe)
        return served

    try:
        served_base = await session.measure(
            parent, lambda client: ask_served(client, parent.ref, probe, recipe.eval.max_concurrency)
        )
        found = verify(ref, await session.measure(checkpoint, ask), served_base, probe, recipe.serve.dtype)
    except SwapError as error:
        await _reject(session, checkpoint, error)
    worst, kept = max(found.max_abs_logp.values()), found.retention
    session.report(
        Said(
            f"log-probs agree within {worst:.1e} ({found.tolerance:g} allowed in {found.dtype}), the base's differ by "
            f"{found.differs_from_base:.2g}; reward margin {kept.before:.3f} -> {kept.after:.3f} as served ({kept.kept:.1%})"
        )
    )
    return found


async def _reject(session: Session, checkpoint: Checkpoint, fault: SwapError) -> NoReturn:
    """Raise SwapError, after retiring a checkpoint that was served rightly once, as in another type, if nothing means it."""
    name = checkpoint.ref.name
    if session.registry.find(name) is None:
        raise SwapError(f"{fault}; it is not registered, and all else is served as before")
    try:
        await session.retire(checkpoint)
    except CheckpointError as error:
        raise SwapError(f"{fault}; {error}") from None
    raise SwapError(f"{fault}; {name} is retired, and all else is served as before")


async def eval_stage(session: Session, checkpoints: Sequence[Checkpoint], split: Split) -> None:
    """Ask one split of the benchmark of each checkpoint, after checking that it is served as it was trained."""
    await parity_stage(session, checkpoints)
    questions = session.questions(split)
    for checkpoint in checkpoints:
        session.report(Began("eval", f"{checkpoint.ref.name}: {questions.summary}"))
        await ask_questions(session, "eval", checkpoint, questions)


async def ask_questions(session: Session, stage: str, checkpoint: Checkpoint, questions: Questions) -> None:
    """Ask a checkpoint what it has not answered yet."""
    requests = questions.requests(checkpoint.ref)
    await _ask(session, f"{stage} {checkpoint.ref.name}", checkpoint, requests, questions.section.max_concurrency)


async def swap_stage(session: Session, checkpoint: Checkpoint) -> None:
    """The loop's hot swap: from now on the run's gateway means `checkpoint` by `policy`.

    A gateway that serves another run (serve.url) is not the loop's to steer: its alias stays. Raises SwapError.
    """
    name = checkpoint.ref.name
    session.report(Began("swap", f"{POLICY_ALIAS} is to mean {name}"))
    aliases = session.registry.aliases()
    if session.run.recipe.serve.url:
        gateway = await session.gateway()
        by_hand = f"`vcot swap {POLICY_ALIAS} {name} --run {session.run.directory}` does it"
        try:
            state = await fetch_state(gateway.url)
        except ServerError as error:
            session.report(Warned(f"{POLICY_ALIAS} is left as it was, since {error}; {by_hand}"))
            return
        if Path(state.run).resolve() != session.run.directory.resolve():
            session.report(Said(f"the gateway at {gateway.url} serves {state.run}: left as it was; {by_hand}"))
            return
        aliases = state.aliases
    if aliases.get(POLICY_ALIAS) == name:
        session.report(Said("it does already"))
        return
    gateway = await session.gateway()
    swapped = await swap_to(gateway.url, POLICY_ALIAS, name)
    how = (
        "which it served already"
        if swapped.way == "none"
        else f"({swapped.way}) after a pause of {swapped.pause_s:.2f} s"
    )
    session.report(Said(f"{name} is live at {gateway.url} {how}"))


def load_scores(session: Session, checkpoints: Sequence[Checkpoint], split: Split) -> Scores:
    """A score for each response that the benchmark asked of `checkpoints` and got, errors included."""
    return session.questions(split).scores([checkpoint.ref for checkpoint in checkpoints], session.run.ledger)
