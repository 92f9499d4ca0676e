"""A verified swap on one replica: it happened and was checked, or it did not happen.

    reload    read every file -> admit no new request, drain those in flight -> ask the canary of the old weights -> load ->
              reset the prefix, multimodal and encoder caches -> verify -> have the engine say so (claim.py) -> record it ->
              admit
    adapter   load it under a name and a path that nothing was ever served from -> ask its canary: as the manifest says, and
              nearer to it than its parent answers, which answers beside it as it does alone -> read its files again ->
              record it -> admit

Verified is a reload by
    files     what was registered when they were read, and not written since (fingerprint.py)
    cache     a prompt that the old weights had cached is computed anew
    canary    the answer that the manifest says, within what such engines are off by (calibration.py), and not that of before
    tensors   those of the files, as far as the engine says what it holds (fingerprint.py)

Whatever fails, what was there is there again, verified in the same way; should that fail as well, the caller starts the
server anew. Nothing in vLLM stops a request from spanning a reload, nor drops what was cached under the old weights. An
adapter needs neither drain nor reset: its name and path are part of every cache's key.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vcot.pipeline.errors import ServerError, SwapError, VcotError
from vcot.pipeline.manifest import Canary
from vcot.services.checkpoints.integrity import check_digest
from vcot.services.checkpoints.registry import Checkpoint
from vcot.services.gateway.fleet.gate import Gate
from vcot.services.gateway.fleet.upstream import Upstream
from vcot.services.gateway.stamps import served_name
from vcot.services.gateway.swap.canary_check import CanaryAnswer, agree, distance, explain_difference
from vcot.services.gateway.swap.claim import DisownedError
from vcot.services.gateway.swap.fingerprint import Fingerprint, check_unchanged

Asked = tuple[Canary, CanaryAnswer]
"""A canary and what was answered."""


class RollbackError(SwapError):
    """The old weights could not be brought back, either: what the engine holds is unknown."""


@dataclass(frozen=True)
class SwapLimits:
    """How long a swap may hold things up."""

    drain_s: float = 300.0
    """For requests in flight to end; the swap is given up otherwise."""


async def reload_weights(
    gate: Gate,
    upstream: Upstream,
    target: Checkpoint,
    fingerprint: Fingerprint,
    commit: Callable[[], None],
    limits: SwapLimits,
) -> float:
    """Put `target` in place of the live checkpoint and `commit` it; the pause in seconds.

    Raises SwapError with the old checkpoint live again, and RollbackError where that is not certain.
    """
    live, adapters = gate.admission.checkpoint, list(gate.admission.adapters.values())
    if live is None:
        raise ServerError("no checkpoint is live, so none can be swapped; wait until the server is up")
    began = await gate.drain(f"swapping {live.ref.name} for {target.ref.name}", limits.drain_s)
    before: Asked | None = None
    try:
        await upstream.claim.tell(None)
        before = await _ask_afresh(upstream, target)
        if before is not None:
            await upstream.warm(before[0])
        await upstream.reload(target.directory)
        await _verify(upstream, before)
        await _check_tensors(upstream, target, fingerprint)
        await upstream.claim.tell(target.ref.digest)
        commit()
    except DisownedError as error:
        raise RollbackError(f"{target.ref.name} was not swapped in: {error}") from None
    except (VcotError, OSError) as error:
        await _roll_back(gate, upstream, live, (target, before), error)
        raise SwapError(f"{target.ref.name} was not swapped in ({error}); {live.ref.name} is live as before") from None
    upstream.fingerprint = fingerprint
    gate.move("live", "", target)
    pause_s = time.monotonic() - began
    for adapter in adapters:  # of the old weights; vLLM would go on to serve them, on the new ones
        await forget_adapter(upstream, adapter)
    return pause_s


async def load_adapter(
    gate: Gate, upstream: Upstream, target: Checkpoint, directory: Path, commit: Callable[[], None]
) -> float:
    """Serve adapter `target`, whose files are in `directory`, beside its parent and `commit` it; 0, the pause.

    Raises SwapError or ServerError, with everything as before.
    """
    try:
        await upstream.claim.renew()
        await put_adapter(upstream, target, directory)
        commit()
    except (VcotError, OSError) as error:
        await forget_adapter(upstream, target)
        raise SwapError(f"adapter {target.ref.name} was not swapped in ({error}); all is as before") from None
    gate.put_adapter(target)
    return 0.0


async def put_adapter(upstream: Upstream, adapter: Checkpoint, directory: Path) -> None:
    """Load an adapter and see that it answers as its manifest says. Raises SwapError or ServerError."""
    name, canary = served_name(adapter.ref), adapter.manifest.canary
    if canary is None:
        raise SwapError("it has no canary, so that it is what answers could not be verified")
    await upstream.load_adapter(name, directory)
    # vLLM's prefix cache outlives an adapter, under its name and path: what a refused one computed would answer here.
    answer, parents = await upstream.ask(canary, name, uuid.uuid4().hex), await upstream.ask(canary)
    if difference := explain_difference(canary, answer, upstream.tolerance):
        raise SwapError(f"its canary answers otherwise: {difference}")
    if not distance(canary, answer, upstream.tolerance) < distance(canary, parents, upstream.tolerance):
        raise SwapError("its canary answers no nearer to its manifest than its parent does, so it was not applied")
    beside, _ = await asyncio.gather(
        upstream.ask(canary, salt=uuid.uuid4().hex), upstream.ask(canary, name, uuid.uuid4().hex)
    )
    if not agree(parents, beside, upstream.tolerance):
        raise SwapError("its parent answers otherwise while it answers, so the engine applies it to others' requests")
    await asyncio.to_thread(check_digest, directory, adapter.ref)


async def forget_adapter(upstream: Upstream, adapter: Checkpoint) -> None:
    """Make room; where that fails the adapter is a name that nobody asks for."""
    with contextlib.suppress(ServerError):
        await upstream.unload_adapter(served_name(adapter.ref))


async def verify_held(upstream: Upstream, checkpoint: Checkpoint, fingerprint: Fingerprint | None) -> None:
    """See that the server holds `checkpoint`: its files were not changed, its canary answers, its tensors are those.

    Raises SwapError, CheckpointError. Without a canary in the manifest, or a fingerprint, the rest must do.
    """
    asked = await _ask_afresh(upstream, checkpoint)
    if asked is not None and (difference := explain_difference(*asked, upstream.tolerance)):
        raise SwapError(f"the server does not answer the canary as {checkpoint.ref.name} should: {difference}")
    if fingerprint is not None:
        await _check_tensors(upstream, checkpoint, fingerprint)
    if asked is not None:
        upstream.calibration.saw(distance(*asked, upstream.tolerance))
    upstream.fingerprint = fingerprint


async def _check_tensors(upstream: Upstream, checkpoint: Checkpoint, fingerprint: Fingerprint) -> None:
    held, layout = await upstream.checksums(), upstream.calibration.layout
    await asyncio.to_thread(check_unchanged, checkpoint, fingerprint)
    if fault := layout.fault(held, fingerprint):
        raise SwapError(fault)
    layout.learn(held, fingerprint)


async def _verify(upstream: Upstream, before: Asked | None) -> None:
    """See that the new weights were loaded, where they have a canary that the old ones were asked."""
    await upstream.flush_caches()
    if before is None:
        return
    canary, answer = before
    num_hits = await upstream.num_prefix_hits()
    await upstream.warm(canary)
    if await upstream.num_prefix_hits() > num_hits:
        raise SwapError("its prefix cache still holds what the old weights computed, though it said that it was reset")
    after = await upstream.ask(canary)
    difference = explain_difference(canary, after, upstream.tolerance)
    if difference:
        raise SwapError(f"its canary answers otherwise: {difference}")
    if after == answer:
        raise SwapError("its canary answers to the last bit as the old weights did, so the new ones were not loaded")


async def _roll_back(
    gate: Gate,
    upstream: Upstream,
    live: Checkpoint,
    tried: tuple[Checkpoint, Asked | None],
    cause: Exception,
) -> None:
    """Load `live` again and see that it answers as before, also to the canary of what was tried. Raises RollbackError."""
    target, before = tried
    try:
        await upstream.claim.tell(None)
        await upstream.reload(live.directory)
        await verify_held(upstream, live, upstream.fingerprint)
        if before is not None:
            canary, answer = before
            if (await upstream.ask(canary)).tokens != answer.tokens:
                raise SwapError(f"{live.ref.name} does not answer the canary of {target.ref.name} as it did")
        await upstream.claim.tell(live.ref.digest)
    except VcotError as error:
        raise RollbackError(
            f"{target.ref.name} was not swapped in ({cause}), and {live.ref.name} could not be brought back in "
            f"place ({error}); the server is started anew with {live.ref.name}"
        ) from None
    gate.move("live", "")


async def _ask_afresh(upstream: Upstream, checkpoint: Checkpoint) -> Asked | None:
    """Its canary and the answer with empty caches, as after a reload: cached prefixes change the last bits."""
    await upstream.flush_caches()
    canary = checkpoint.manifest.canary
    return None if canary is None else (canary, await upstream.ask(canary))
