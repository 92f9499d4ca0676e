"""How a fleet comes to serve another checkpoint: the way there, taken replica by replica.

    first replica: changed and verified -> the alias is pointed at the new checkpoint -> the others, one by one
    on trial:      changed and verified, and nothing more

The others answer meanwhile what was resolved before, and the first what is resolved now, so with two replicas nobody
waits; with one, a reload makes requests wait for the drain and the load. If the first fails, nothing has changed. If
another fails, it is started anew with what it should hold.

A checkpoint on trial is served by one replica, to whoever expects its digest. A fleet has one trial at a time; several
commands may share one, and another checkpoint's waits until they are done. Nothing of a trial is recorded: it ends when its
last owner says so, with the next swap or trial (also with one that fails), or when it is forgotten; then the replica holds
again what is live, and a server that is started anew does so, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from vcot.pipeline.errors import OnTrialError, ServerError, SwapError, VcotError
from vcot.services.checkpoints.registry import Checkpoint
from vcot.services.gateway.admin import Swapped
from vcot.services.gateway.fleet.group import Fleet
from vcot.services.gateway.fleet.replica import Replica
from vcot.services.gateway.fleet.rest import end_rest
from vcot.services.gateway.swap.fingerprint import Fingerprint, read_fingerprint
from vcot.services.gateway.swap.verified import RollbackError, forget_adapter, load_adapter, reload_weights
from vcot.services.gateway.swap.ways import Way, check_adapter, choose_way

FORGOTTEN_S = 60.0
"""A trial of which nothing was asked for so long has lost its client."""
Commit = Callable[[], None]
"""Records that a checkpoint is served. In its place, None stands for a trial."""
Step = Callable[[Replica, Commit], Awaitable[float]]
"""Changes one replica, verifies it and commits; the pause in seconds. Raises SwapError or ServerError, changing nothing."""


async def swap(fleet: Fleet, alias: str, name: str) -> Swapped:
    """Serve `name` and let `alias` mean it. Raises CheckpointError, SwapError, ServerError."""
    async with fleet.steered():
        await end_rest(fleet)
        target = await asyncio.to_thread(fleet.registry.verify, name)
        fleet.registry.check_alias(alias, target.ref.name)
        return await _change(fleet, target, lambda: fleet.registry.set_live(alias, target.ref.name))


async def try_out(fleet: Fleet, checkpoint: Path | str, owner: str = "") -> Swapped:
    """Put the checkpoint in a directory, or the registered one of a name, on trial for `owner`, whose last trial ends.

    Raises OnTrialError while others ask another one, CheckpointError, SwapError, ServerError.
    """
    async with fleet.steered():
        await end_rest(fleet)
        if isinstance(checkpoint, str):
            target = await asyncio.to_thread(fleet.registry.verify, checkpoint)
        else:
            target = await asyncio.to_thread(fleet.registry.inspect, checkpoint)
        fleet.trial_owners.discard(owner)
        trial, others = fleet.trial, set(fleet.trial_owners)
        if trial is not None and trial.ref.digest != target.ref.digest:
            if others and _is_asked(fleet, trial):
                raise OnTrialError(f"{trial.ref.name} is on trial for another command")
            others = set()
        tried = await _change(fleet, target, None)
        fleet.trial_owners = {*others, owner}
        return tried


async def end_trial(fleet: Fleet, owner: str) -> None:
    """Bring back what is live, where nobody but `owner` has a checkpoint on trial."""
    async with fleet.steered():
        fleet.trial_owners.discard(owner)
        if not fleet.trial_owners and fleet.lease is None:
            await _bring_back(fleet)


async def _change(fleet: Fleet, target: Checkpoint, commit: Commit | None) -> Swapped:
    may_be_behind = fleet.trial is not None or commit is None
    await _end_trial(fleet, target)
    try:
        way, pause_s = await _serve(fleet, target, commit)
    except (VcotError, OSError):
        if may_be_behind:  # a replica holds what was on trial, or the parent of what was to be
            await _bring_back(fleet)
        raise
    if commit is None:
        fleet.trial, fleet.trial_asked = target, time.monotonic()
    await _drop_unused_adapters(fleet)
    return Swapped(live=target.ref, way=way or "none", pause_s=pause_s)


async def end_forgotten_trials(fleet: Fleet, idle_s: float = FORGOTTEN_S) -> None:
    """Bring back what is live where a trial was asked nothing for so long, since its client was killed; until cancelled."""
    while True:
        await asyncio.sleep(idle_s / 4)
        if fleet.trial is None:
            continue
        async with fleet.steered():
            trial = fleet.trial
            if trial is None or _is_asked(fleet, trial, idle_s) or fleet.lease is not None:
                continue
            await _bring_back(fleet)
            fleet.warn(f"the trial of {trial.ref.name} was ended, since nothing was asked of it for {idle_s:.0f} s")


def _is_asked(fleet: Fleet, trial: Checkpoint, idle_s: float = FORGOTTEN_S) -> bool:
    """Whether a request for what is on trial came lately, or is on its way."""
    if time.monotonic() - fleet.trial_asked < idle_s:
        return True
    return any(replica.gate.admission.asked_for(trial.ref.digest) for replica in fleet.replicas)


async def _bring_back(fleet: Fleet) -> None:
    """End a trial: each replica holds what is live again, and the adapters that aliases mean; if need be, started anew."""
    await _end_trial(fleet, None)
    plan = fleet.replicas[0].plan
    live = plan.checkpoint()
    for checkpoint in (live, *plan.adapters(live)):
        if not any(_is_behind(replica, checkpoint) for replica in fleet.replicas):
            continue
        try:
            await _serve(fleet, checkpoint, lambda: None)
        except (VcotError, OSError) as error:
            fleet.warn(f"{checkpoint.ref.name} was not brought back after a trial: {error}")
    await _drop_unused_adapters(fleet)
    for replica in [replica for replica in fleet.replicas if _is_behind(replica, live)]:
        await _start_anew(fleet, replica)


async def _end_trial(fleet: Fleet, target: Checkpoint | None) -> None:
    """A server that was started for a trial stays only if it holds `target`."""
    fleet.trial, fleet.trial_owners = None, set()
    for replica in [r for r in fleet.replicas if r.plan.pinned is not None]:
        if target is None or not replica.gate.admission.serves(target.ref.digest):
            await fleet.retire(replica)


async def _serve(fleet: Fleet, target: Checkpoint, commit: Commit | None) -> tuple[Way | None, float]:
    """Have every replica hold `target`, or one on trial; the way, None where they do, and the longest pause."""
    served = [replica for replica in fleet.replicas if replica.gate.admission.served]
    if not served:
        raise ServerError(f"no checkpoint is live ({fleet.best.gate.admission.message}); swap when one is")
    for replica in served:
        replica.gate.admission.rename(target)
    behind = [replica for replica in served if target not in replica.gate.admission.served]
    is_held = len(behind) < len(served)
    if is_held and commit is not None:
        commit()
    if not behind or (is_held and commit is None):
        return None, 0.0
    held = behind[0].gate.admission.checkpoint
    assert held is not None
    can_start = all(replica.url is None for replica in fleet.replicas)
    way = await asyncio.to_thread(choose_way, fleet.settings.swap, held, target, can_start)
    if way == "adapter":
        return way, await _serve_adapter(fleet, target, commit)
    if way == "replica":
        return way, await _replace(fleet, target, commit)
    fingerprint = await asyncio.to_thread(read_fingerprint, target, fleet.settings.dtype)
    pause_s = await _roll(fleet, target, _reload_step(fleet, target, fingerprint), commit)
    if target.manifest.canary is None:
        fleet.warn(f"checkpoint {target.ref.name} has no canary, so the swap to it was not verified")
    return way, pause_s


def _reload_step(fleet: Fleet, target: Checkpoint, fingerprint: Fingerprint) -> Step:
    async def step(replica: Replica, commit: Commit) -> float:
        return await reload_weights(replica.gate, replica.upstream, target, fingerprint, commit, fleet.limits)

    return step


async def _serve_adapter(fleet: Fleet, target: Checkpoint, commit: Commit | None) -> float:
    """Beside its parent, which is made live first where it is not."""
    parent = fleet.registry.find_digest(target.ref.parent)
    if parent is None:
        raise SwapError(
            f"adapter {target.ref.name} was trained on weights {str(target.ref.parent)[:19]}, and no checkpoint has those; "
            "register its base, or merge it"
        )
    await asyncio.to_thread(check_adapter, target, parent, fleet.max_lora_rank)
    of_parent = None if commit is None else lambda: fleet.registry.set_live(None, parent.ref.name)
    _, pause_s = await _serve(fleet, parent, of_parent)
    directory = await asyncio.to_thread(fleet.replicas[0].plan.publish, target)

    async def step(replica: Replica, commit: Commit) -> float:
        return await load_adapter(replica.gate, replica.upstream, target, directory, commit)

    return max(pause_s, await _roll(fleet, target, step, commit))


async def _roll(fleet: Fleet, target: Checkpoint, step: Step, commit: Commit | None) -> float:
    """Take every live replica through `step`, the first with `commit`; on trial, that one only. How long requests waited."""
    is_held = any(target in replica.gate.admission.served for replica in fleet.replicas)
    taken: list[Replica] = []
    pause_s = 0.0
    while behind := [r for r in fleet.replicas if _is_behind(r, target) and r not in taken]:
        replica, is_first = behind[0], not taken and not is_held
        taken.append(replica)
        try:
            taken_s = await step(replica, commit if commit and is_first else lambda: None)
            pause_s = taken_s if len(behind) == 1 and is_first else pause_s
        except (SwapError, ServerError) as error:
            if isinstance(error, RollbackError) or not is_first:
                replica.restart()
            if is_first:
                raise
            fleet.warn(f"{replica.name} is started anew to hold {target.ref.name}: {error}")
        if commit is None:
            break
    return pause_s


def _is_behind(replica: Replica, target: Checkpoint) -> bool:
    """Whether it could hold `target`, an adapter where its parent is, and does not."""
    admission = replica.gate.admission
    if admission.phase != "live" or target in admission.served or admission.checkpoint is None:
        return False
    return target.ref.kind != "adapter" or admission.checkpoint.ref.digest == target.ref.parent


async def _replace(fleet: Fleet, target: Checkpoint, commit: Commit | None) -> float:
    """Start one more server with `target`; once it answers, take the first of the others away, and start the rest anew.

    A trial ends with all of them served; where one came before, its server is there already.
    """
    first, *rest = (replica for replica in fleet.replicas if replica.plan.pinned is None)
    surge = next((replica for replica in fleet.replicas if replica.plan.pinned is not None), None)
    if surge is None:
        surge = fleet.make_own(pinned=target, devices=first.devices)
        fleet.start(surge)
    try:
        await fleet.changes.wait_for(lambda: surge.has_served or surge.failure is not None, None)
        if surge.failure is not None:
            raise surge.failure
        if commit is None:
            return 0.0
        commit()
    except (VcotError, OSError) as error:
        await fleet.retire(surge)
        raise SwapError(f"{target.ref.name} was not swapped in ({error}); {first.name} serves as before") from None
    surge.plan.pinned = None
    await fleet.retire(first)
    for replica in rest:
        await _start_anew(fleet, replica)
    return 0.0


async def _start_anew(fleet: Fleet, replica: Replica) -> None:
    """Let its requests end, then have it come back with what it should hold; the next one's turn is after that."""
    try:
        await replica.gate.drain(f"{replica.name} is started anew", fleet.limits.drain_s)
    except (SwapError, ServerError) as error:
        fleet.warn(f"{replica.name} was not drained before it was started anew: {error}")
    num_restarts = replica.num_restarts
    replica.restart()
    await fleet.changes.wait_for(
        lambda: replica.num_restarts > num_restarts and replica.gate.admission.phase in ("live", "dead"), None
    )


async def _drop_unused_adapters(fleet: Fleet) -> None:
    """Unload what no alias means any more and is not on trial, once no request is on it."""
    meant = {*fleet.registry.aliases().values(), *([fleet.trial.ref.name] if fleet.trial else ())}
    dropped: list[Checkpoint] = []
    for replica in fleet.replicas:
        for adapter in [a for a in replica.gate.admission.adapters.values() if a.ref.name not in meant]:
            if await replica.gate.drop_adapter(adapter, fleet.limits.drain_s):
                with contextlib.suppress(ServerError):  # it went down meanwhile, and has no upstream
                    await forget_adapter(replica.upstream, adapter)
                dropped.append(adapter)
    for adapter in dropped:
        shutil.rmtree(fleet.registry.served_folder / adapter.ref.digest.removeprefix("sha256:"), ignore_errors=True)
