"""A verified swap of weights in place: it happened and was checked, or it did not happen.

    admit no new request, drain those in flight -> ask the canary of the old weights -> load -> reset the prefix,
    multimodal and encoder caches -> ask again: as the manifest says, and not as before -> record it -> admit requests

Whatever fails, the old weights are loaded and verified in the same way; should that fail as well, the caller starts the
engine anew. Nothing in vLLM stops a request from spanning a reload, nor drops what was cached under the old weights.

Limits: the tensors must have the same names and shapes, and the tokenizer is not loaded again; a checkpoint that differs
in more than its weights needs a server of its own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import ServerError, SwapError, VcotError
from services.checkpoints import Checkpoint
from services.gateway.canary import CanaryAnswer, explain_difference
from services.gateway.gate import Gate
from services.gateway.upstream import Upstream


class RollbackError(SwapError):
    """The old weights could not be brought back, either: what the engine holds is unknown."""


@dataclass(frozen=True)
class SwapLimits:
    """How long a swap may hold things up."""

    drain_s: float = 300.0
    """For requests in flight to end; the swap is given up otherwise."""


async def swap_weights(
    gate: Gate, upstream: Upstream, target: Checkpoint, commit: Callable[[], None], limits: SwapLimits
) -> float:
    """Put `target` in place of the live checkpoint and `commit` it; the pause in seconds.

    Raises SwapError with the old checkpoint live again, and RollbackError where that is not certain.
    """
    live = gate.admission.checkpoint
    if live is None:
        raise ServerError("no checkpoint is live, so none can be swapped; wait until the server is up")
    check_reloadable(live, target)
    began = time.monotonic()
    await gate.drain(f"swapping {live.ref.name} for {target.ref.name}", limits.drain_s)
    before: CanaryAnswer | None = None
    try:
        before = await _ask_afresh(upstream, target)
        await upstream.reload(target.directory)
        await _verify(upstream, target, before)
        commit()
    except (VcotError, OSError) as error:
        await _roll_back(gate, upstream, live, (target, before), error)
        raise SwapError(f"{target.ref.name} was not swapped in ({error}); {live.ref.name} is live as before") from None
    gate.move("live", "", target)
    return time.monotonic() - began


async def verify_canary(upstream: Upstream, checkpoint: Checkpoint) -> None:
    """See that the server answers as `checkpoint` should. Raises SwapError; passes where its manifest has no canary."""
    answer = await _ask_afresh(upstream, checkpoint)
    if answer is not None and checkpoint.manifest.canary is not None:
        difference = explain_difference(checkpoint.manifest.canary, answer)
        if difference:
            raise SwapError(f"the server does not answer the canary as {checkpoint.ref.name} should: {difference}")


async def _verify(upstream: Upstream, target: Checkpoint, before: CanaryAnswer | None) -> None:
    await upstream.flush_caches()
    canary = target.manifest.canary
    if canary is None:
        return
    after = await upstream.ask(canary)
    difference = explain_difference(canary, after)
    if difference:
        raise SwapError(f"its canary answers otherwise: {difference}")
    if after == before:
        raise SwapError("its canary answers to the last bit as the old weights did, so the new ones were not loaded")


async def _roll_back(
    gate: Gate,
    upstream: Upstream,
    live: Checkpoint,
    asked: tuple[Checkpoint, CanaryAnswer | None],
    cause: Exception,
) -> None:
    """Load `live` again and see that it answers as before. Raises RollbackError."""
    target, before = asked
    try:
        await upstream.reload(live.directory)
        await verify_canary(upstream, live)
        if before is not None and target.manifest.canary is not None:
            now = await upstream.ask(target.manifest.canary)
            if now.tokens != before.tokens:
                raise SwapError(f"{live.ref.name} does not answer the canary of {target.ref.name} as it did")
    except VcotError as error:
        raise RollbackError(
            f"{target.ref.name} was not swapped in ({cause}), and {live.ref.name} could not be brought back in "
            f"place ({error}); the server is started anew with {live.ref.name}"
        ) from None
    gate.move("live", "", live)


async def _ask_afresh(upstream: Upstream, checkpoint: Checkpoint) -> CanaryAnswer | None:
    """The canary's answer with empty caches, as after a reload: cached prefixes change the last bits."""
    await upstream.flush_caches()
    canary = checkpoint.manifest.canary
    return None if canary is None else await upstream.ask(canary)


def check_reloadable(live: Checkpoint, target: Checkpoint) -> None:
    """Raise SwapError unless `target` has exactly the tensors of `live`, and can be verified once loaded.

    A tensor that a file lacks would keep its old values without a word.
    """
    name = target.ref.name
    if target.manifest.canary is None and target.ref.kind != "base":
        raise SwapError(f"checkpoint {name} has no canary, so a swap to it could not be verified; merge it again")
    old, new = _tensor_shapes(live.directory), _tensor_shapes(target.directory)
    if wrong := sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key)):
        first = f"{wrong[0]} is {new.get(wrong[0], 'absent')}, and {old.get(wrong[0], 'absent')} in {live.ref.name}"
        raise SwapError(
            f"checkpoint {name} cannot be loaded in place of {live.ref.name}, since {len(wrong)} tensors are of another "
            f"shape ({first}); start a server with it"
        )


def _tensor_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor, from the safetensors headers only. Raises SwapError for a damaged file."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in directory.glob("*.safetensors"):
        try:
            with path.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
        except (OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError) as error:
            raise SwapError(f"{path} is not a whole safetensors file ({error}); make the checkpoint again") from None
    return shapes
