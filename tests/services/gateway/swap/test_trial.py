"""Checkpoints on trial: asked before they are registered, by nobody but who expects their weights, and then forgotten."""

import asyncio
from pathlib import Path

import pytest

from tests.services.bench_fleet import BASE, TUNED, Bench, answer_of
from tests.services.fake_vllm import write_adapter, write_checkpoint
from vcot.pipeline.errors import CheckpointError, OnTrialError, SwapError
from vcot.services.checkpoints.registry import Checkpoint, Registry
from vcot.services.gateway.admin import Swapped, named_error
from vcot.services.gateway.fleet.roster import Roster
from vcot.services.gateway.swap import rollout
from vcot.services.gateway.swap.plan import Plan

WEIGHT = 3.0


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A checkpoint that nobody registered."""
    return write_checkpoint(tmp_path / "made", "made", WEIGHT)


async def put_on_trial(bench: Bench, checkpoint: Path | str) -> tuple[Swapped, dict[str, str]]:
    """What it did, and the header that the checkpoint answers to."""
    tried = await rollout.try_out(bench.fleet, checkpoint)
    return tried, {"x-vcot-expect": tried.live.digest}


async def log_probs(bench: Bench, model: str, headers: dict[str, str]) -> set[float]:
    answer = await bench.ask(model=model, headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-vcot-digest"] == headers["x-vcot-expect"]
    return {token["logprob"] for token in answer.json()["choices"][0]["logprobs"]["content"]}


async def test_it_answers_only_who_expects_its_digest(bench: Bench, made: Path) -> None:
    tried, expecting = await put_on_trial(bench, made)
    assert tried.way == "reload"
    assert await log_probs(bench, "made", expecting) == answer_of(WEIGHT)
    for headers in ({}, {"x-vcot-expect": bench.base.ref.digest}):
        assert (await bench.ask(model="made", headers=headers)).status_code == 404
    refused = await bench.ask()  # the alias means what it meant
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "checkpoint_on_trial")
    assert refused.headers["retry-after"]  # an SDK asks again
    assert "policy means base, but made is on trial" in refused.json()["error"]["message"]
    assert (await bench.http.get("/v1/models")).json()["data"] == []
    assert bench.registry.find("made") is None
    with pytest.raises(CheckpointError, match="no checkpoint or alias 'made'"):
        await bench.swap("policy", "made")


async def test_what_is_registered_then_is_live_without_another_load(bench: Bench, made: Path) -> None:
    await put_on_trial(bench, made)
    bench.registry.register(made)
    num_calls = len(bench.server.calls)
    swapped = await bench.swap("policy", "made")
    assert (swapped.way, len(bench.server.calls)) == ("none", num_calls)
    assert await bench.answer() == ("made", answer_of(WEIGHT))
    assert bench.registry.live() == "made"


async def test_the_next_swap_ends_it(bench: Bench, made: Path) -> None:
    _, expecting = await put_on_trial(bench, made)
    swapped = await bench.swap("policy", "base")
    assert swapped.way == "reload"
    assert await bench.answer() == ("base", answer_of(BASE))
    assert (await bench.ask(model="made", headers=expecting)).status_code == 404


async def test_a_server_that_dies_comes_back_with_what_is_live(bench: Bench, made: Path) -> None:
    _, expecting = await put_on_trial(bench, made)
    bench.server.died.set()
    await bench.until("loading")
    await bench.until("live")
    assert await bench.answer() == ("base", answer_of(BASE))
    assert (await bench.ask(model="made", headers=expecting)).status_code == 409


async def test_nothing_of_it_is_recorded(bench: Bench, made: Path) -> None:
    """So that a gateway that is killed and started anew knows nothing of it."""
    recorded = (bench.directory / "run" / "checkpoints" / "registry.json").read_bytes()
    await put_on_trial(bench, made)
    assert (bench.directory / "run" / "checkpoints" / "registry.json").read_bytes() == recorded


async def test_a_canary_that_differs_leaves_all_as_it_was(bench: Bench, tmp_path: Path) -> None:
    liar = write_checkpoint(tmp_path / "liar", "liar", WEIGHT, canary_weight=4.0)
    with pytest.raises(SwapError, match=r"canary answers otherwise.*base is live as before"):
        await put_on_trial(bench, liar)
    assert bench.fleet.trial is None
    assert await bench.answer() == ("base", answer_of(BASE))


async def test_files_that_were_altered_are_not_tried(bench: Bench, made: Path) -> None:
    (made / "config.json").write_text((made / "config.json").read_text() + " ")
    with pytest.raises(CheckpointError, match="its files were changed"):
        await put_on_trial(bench, made)
    assert await bench.answer() == ("base", answer_of(BASE))


async def test_over_http(bench: Bench, made: Path, tmp_path: Path) -> None:
    tried = await bench.http.post("/admin/trial", json={"path": str(made)})
    assert (tried.status_code, tried.json()["live"]["name"], tried.json()["way"]) == (200, "made", "reload")
    metrics = (await bench.http.get("/metrics")).text
    assert 'vcot_swaps_total{outcome="tried",way="reload"} 1.0' in metrics
    named = await bench.http.post("/admin/trial", json={"name": "policy"})
    assert (named.json()["live"]["name"], named.json()["way"]) == ("base", "reload")
    for body in ({}, {"name": "base", "path": str(made)}):
        assert (await bench.http.post("/admin/trial", json=body)).status_code == 422
    assert (await bench.http.delete("/admin/trial")).json()["live"]["name"] == "base"
    assert bench.fleet.trial is None
    error = (await bench.http.post("/admin/trial", json={"path": str(tmp_path / "none")})).json()["error"]
    assert isinstance(named_error(error["code"], error["message"]), CheckpointError)


async def test_one_replica_tries_it_and_the_other_answers_as_before(pair: Bench, made: Path) -> None:
    _, expecting = await put_on_trial(pair, made)
    assert await log_probs(pair, "made", expecting) == answer_of(WEIGHT)
    for _ in range(4):
        assert await pair.answer() == ("base", answer_of(BASE))
    assert sum(any(call.startswith("reload") for call in server.calls) for server in pair.servers) == 1

    pair.registry.register(made)
    await pair.swap("policy", "made")  # the other follows
    assert [r.gate.admission.checkpoint for r in pair.fleet.replicas] == [pair.registry.resolve("made")] * 2
    assert [sum(call.startswith("reload") for call in server.calls) for server in pair.servers] == [1, 1]


async def test_after_a_trial_that_failed_both_replicas_hold_what_is_live(pair: Bench, made: Path) -> None:
    await put_on_trial(pair, made)
    await pair.swap("policy", "base")
    assert [replica.gate.admission.checkpoint for replica in pair.fleet.replicas] == [pair.base, pair.base]


async def test_a_replica_that_cannot_follow_is_started_anew_with_what_was_proven(pair: Bench, made: Path) -> None:
    """The alias means it from the start of the swap, since a replica answers already."""
    await put_on_trial(pair, made)
    pair.registry.register(made)
    behind = next(
        server for server in pair.servers if server.checkpoint == pair.base and not _was_reloaded(server.calls)
    )
    behind.fail_next_reload = True
    await pair.swap("policy", "made")
    assert await pair.answer() == ("made", answer_of(WEIGHT))
    await pair.until_so(lambda: all(_holds(replica, "made") for replica in pair.fleet.replicas))
    assert any("is started anew to hold made" in warning for warning in pair.fleet.warnings)


def _was_reloaded(calls: list[str]) -> bool:
    return any(call.startswith("reload") for call in calls)


def _holds(replica: rollout.Replica, name: str) -> bool:
    checkpoint = replica.gate.admission.checkpoint
    return checkpoint is not None and checkpoint.ref.name == name


async def test_another_shape_is_tried_on_a_server_of_its_own_beside_the_others(pair: Bench, tmp_path: Path) -> None:
    wide = write_checkpoint(tmp_path / "wide", "wide", WEIGHT, shape=2)
    tried, expecting = await put_on_trial(pair, wide)
    assert (tried.way, tried.pause_s) == ("replica", 0.0)
    assert await log_probs(pair, "wide", expecting) == answer_of(WEIGHT)
    assert [replica.name for replica in pair.fleet.replicas] == ["vllm-0", "vllm-1", "vllm-2"]
    assert await pair.answer() == ("base", answer_of(BASE))

    pair.registry.register(wide)
    await pair.swap("policy", "wide")
    assert [replica.name for replica in pair.fleet.replicas] == ["vllm-1", "vllm-2"]
    assert len(pair.lives[2]) == 1  # the server of the trial serves on
    assert all(_holds(replica, "wide") for replica in pair.fleet.replicas)
    assert all(replica.plan.pinned is None for replica in pair.fleet.replicas)


@pytest.mark.parametrize("ends", ["swap", "another trial"])
async def test_the_server_of_a_trial_goes_with_it(pair: Bench, tmp_path: Path, made: Path, ends: str) -> None:
    await put_on_trial(pair, write_checkpoint(tmp_path / "wide", "wide", WEIGHT, shape=2))
    if ends == "swap":
        assert (await pair.swap("policy", "base")).way == "none"
    else:
        await put_on_trial(pair, made)
    assert [replica.name for replica in pair.fleet.replicas] == ["vllm-0", "vllm-1"]


@pytest.mark.parametrize("removed", ["vllm-0", "vllm-1"])
async def test_no_server_is_taken_away_that_would_leave_none_after_a_trial(
    bench: Bench, tmp_path: Path, removed: str
) -> None:
    await put_on_trial(bench, write_checkpoint(tmp_path / "wide", "wide", WEIGHT, shape=2))
    assert [replica.name for replica in bench.fleet.replicas] == ["vllm-0", "vllm-1"]
    with pytest.raises(SwapError, match=r"the only one that serves|started for the trial of wide"):
        await bench.fleet.remove(removed)
    await rollout.end_trial(bench.fleet, "")
    assert await bench.answer() == ("base", answer_of(BASE))
    assert Roster(bench.directory / "run", bench.settings).now.num_own == 1  # what a gateway that is started anew has


@pytest.mark.parametrize("follows", ["swap", "trial"])
async def test_a_swap_or_trial_that_fails_ends_the_trial_before_it(bench: Bench, made: Path, follows: str) -> None:
    await put_on_trial(bench, made)
    lie = write_checkpoint(made.with_name("lie"), "lie", 4.0, canary_weight=5.0)
    bench.registry.register(lie)
    with pytest.raises(SwapError, match="its canary answers otherwise"):
        await (bench.swap("policy", "lie") if follows == "swap" else put_on_trial(bench, lie))
    assert await bench.answer() == ("base", answer_of(BASE))


async def test_an_adapter_that_fails_its_trial_leaves_its_base_live_nowhere(bench: Bench, tmp_path: Path) -> None:
    """What is live is another checkpoint than the adapter's base, which was loaded for the trial."""
    await bench.swap("policy", "tuned")
    lie = write_adapter(tmp_path / "lie", "lie", 0.5, bench.base.ref, BASE, canary_weight=9.0)
    with pytest.raises(SwapError, match="its canary answers otherwise"):
        await put_on_trial(bench, lie)
    assert await bench.answer() == ("tuned", answer_of(TUNED))


async def test_what_a_replica_was_added_for_is_not_replaced_by_the_base(bench: Bench, made: Path) -> None:
    for checkpoint in (bench.tuned, bench.registry.inspect(made)):
        plan = Plan(bench.registry, bench.said.append, pinned=checkpoint)
        assert plan.verified() == checkpoint
        (checkpoint.directory / "config.json").write_text('{"altered": true}')
        with pytest.raises(CheckpointError, match="its files were changed"):
            plan.verified()


@pytest.mark.parametrize("kind", ["reload", "replica", "adapter"])
async def test_a_trial_that_was_forgotten_is_ended(bench: Bench, tmp_path: Path, kind: str) -> None:
    """Its client was killed: what is live answers again, on as many servers as before, and nobody steers anything."""
    if kind == "adapter":
        directory = write_adapter(tmp_path / "it", "it", 0.5, bench.base.ref, BASE)
    else:
        directory = write_checkpoint(tmp_path / "it", "it", WEIGHT, shape=2 if kind == "replica" else 1)
    tried, expecting = await put_on_trial(bench, directory)
    assert tried.way == kind
    ending = asyncio.create_task(rollout.end_forgotten_trials(bench.fleet, idle_s=0.4))
    for _ in range(8):  # as long as it is asked, it goes on
        await log_probs(bench, "it", expecting)
        await asyncio.sleep(0.1)
    bench.server.hold.clear()
    held = asyncio.create_task(bench.ask("hold on", model="it", headers=expecting))
    await bench.server.holding.wait()
    await asyncio.sleep(0.8)  # one long answer counts, too
    assert bench.fleet.trial is not None
    bench.server.hold.set()
    assert (await held).status_code == 200

    await bench.until_so(lambda: any("the trial of it was ended" in warning for warning in bench.fleet.warnings))
    ending.cancel()
    assert await bench.answer() == ("base", answer_of(BASE))
    assert (await bench.ask(model="it", headers=expecting)).status_code == 404
    assert ([r.name for r in bench.fleet.replicas], bench.admission.adapters) == (["vllm-0"], {})


async def test_the_end_of_a_trial_of_what_is_live_restarts_nothing(bench: Bench) -> None:
    ending = asyncio.create_task(rollout.end_forgotten_trials(bench.fleet, idle_s=0.1))
    await asyncio.sleep(0.1)  # it has looked, and found none
    await put_on_trial(bench, "base")
    await bench.until_so(lambda: bench.fleet.trial is None)
    ending.cancel()
    assert (await bench.answer(), bench.replica.num_restarts) == (("base", answer_of(BASE)), 0)


async def test_an_adapter_is_tried_beside_its_base_and_unloaded_again(bench: Bench, tmp_path: Path) -> None:
    light = write_adapter(tmp_path / "light", "light", 0.5, bench.base.ref, BASE)
    tried, expecting = await put_on_trial(bench, light)
    assert tried.way == "adapter"
    assert await log_probs(bench, "light", expecting) == answer_of(BASE + 0.5)
    assert await bench.answer() == ("base", answer_of(BASE))
    await bench.swap("policy", "base")
    assert not bench.admission.adapters
    assert any(call.startswith("unload") for call in bench.server.calls)


async def test_after_a_trial_everything_is_served_as_before_adapters_too(bench: Bench, made: Path) -> None:
    """By a reload: nothing is started anew, and the registry is what it was."""
    light = bench.adapter("light", 0.5)
    await bench.swap("prod", "light")
    recorded = (bench.directory / "run" / "checkpoints" / "registry.json").read_bytes()
    await rollout.try_out(bench.fleet, made, "me")
    assert (await bench.ask(model="prod")).json()["error"]["code"] == "checkpoint_on_trial"
    await rollout.end_trial(bench.fleet, "me")
    assert await bench.answer() == ("base", answer_of(BASE))
    assert await bench.answer(model="prod") == ("light", answer_of(BASE + 0.5))
    assert list(bench.admission.adapters.values()) == [light]
    assert bench.replica.num_restarts == 0
    assert (bench.directory / "run" / "checkpoints" / "registry.json").read_bytes() == recorded


async def test_what_does_not_come_back_after_a_trial_by_a_load_is_started_anew(bench: Bench, made: Path) -> None:
    await rollout.try_out(bench.fleet, made, "me")
    bench.server.fail_next_reload = True
    await rollout.end_trial(bench.fleet, "me")
    assert any("base was not brought back after a trial" in warning for warning in bench.fleet.warnings)
    assert (bench.replica.num_restarts, len(bench.servers)) == (1, 2)
    assert await bench.answer() == ("base", answer_of(BASE))


async def test_an_adapter_whose_base_is_not_live_is_tried_without_making_it_so(pair: Bench, tmp_path: Path) -> None:
    light = write_adapter(tmp_path / "light", "light", 0.5, pair.base.ref, BASE)
    await pair.swap("policy", "tuned")
    tried = await rollout.try_out(pair.fleet, light, "me")
    expecting = {"x-vcot-expect": tried.live.digest}
    assert await log_probs(pair, "light", expecting) == answer_of(BASE + 0.5)
    assert (pair.registry.live(), await pair.answer()) == ("tuned", ("tuned", answer_of(TUNED)))
    await rollout.end_trial(pair.fleet, "me")
    assert [replica.gate.admission.served for replica in pair.fleet.replicas] == [[pair.tuned]] * 2
    assert [replica.num_restarts for replica in pair.fleet.replicas] == [0, 0]


async def test_one_trial_at_a_time_shared_by_those_who_ask_the_same(bench: Bench, made: Path) -> None:
    for owner in ("one", "two"):
        await rollout.try_out(bench.fleet, made, owner)
    for owner in ("one", "three"):  # `one` has ended its own by asking for another, so that no two wait for each other
        with pytest.raises(OnTrialError, match="made is on trial for another command"):
            await rollout.try_out(bench.fleet, "tuned", owner)
    await rollout.end_trial(bench.fleet, "three")
    assert bench.fleet.trial is not None, "it is not the last one's"
    bench.fleet.trial_asked -= rollout.FORGOTTEN_S  # `two` was killed
    assert (await rollout.try_out(bench.fleet, "tuned", "three")).live.name == "tuned"
    await rollout.end_trial(bench.fleet, "two")
    assert bench.fleet.trial == bench.tuned
    await rollout.end_trial(bench.fleet, "three")
    assert (bench.fleet.trial, await bench.answer()) == (None, ("base", answer_of(BASE)))


async def test_what_is_not_live_anyhow_is_not_said_to_wait_for_a_trial(bench: Bench, made: Path) -> None:
    await put_on_trial(bench, made)
    refused = await bench.ask(model="tuned")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "checkpoint_not_live")


async def test_a_trial_waits_for_a_swap_that_is_on(bench: Bench, made: Path) -> None:
    bench.server.hold.clear()
    held = asyncio.create_task(bench.ask("hold on"))
    await bench.server.holding.wait()
    swap = asyncio.create_task(bench.swap("policy", "tuned"))
    await bench.until("draining")
    trial = asyncio.create_task(put_on_trial(bench, made))
    bench.server.hold.set()
    assert (await held).status_code == 200
    await swap
    await trial
    assert bench.registry.live() == "tuned"
    assert (bench.fleet.live, bench.admission.checkpoint) == (bench.fleet.trial, bench.fleet.trial)


def test_what_a_run_made_is_found_before_it_is_registered(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "run")
    directory = write_checkpoint(tmp_path / "run" / "checkpoints" / "made", "made", WEIGHT)
    write_checkpoint(tmp_path / "run" / "checkpoints" / "seed", "seed", BASE, kind="base")
    found = registry.find_made("made")
    assert found == registry.inspect(directory)
    assert isinstance(found, Checkpoint)
    write_checkpoint(tmp_path / "run" / "elsewhere", "elsewhere", WEIGHT)
    assert registry.find("made") is registry.find_made("seed") is registry.find_made("../elsewhere") is None
    with pytest.raises(CheckpointError, match="it was made, and is registered once `vcot parity made`"):
        registry.resolve("made")
