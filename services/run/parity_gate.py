"""The gate before an evaluation: each trained checkpoint must be served as it was trained, or it is not registered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from vcot.pipeline.client import ChatClient
from vcot.pipeline.errors import CheckpointError, SwapError
from vcot.pipeline.files import write_record
from vcot.pipeline.report import Began, Said, Warned
from vcot.services.checkpoints.registry import Checkpoint
from vcot.services.run.parity import ParityReport, ask_served, check_defaults, verify
from vcot.services.run.session import Session
from vcot.training.protocol.agreement import PROBE, Answers, Probe, read_probe
from vcot.training.protocol.job import read_record


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
        await session.gateway.retire(name)
    except CheckpointError as error:
        raise SwapError(f"{fault}; {error}") from None
    raise SwapError(f"{fault}; {name} is retired, and all else is served as before")
