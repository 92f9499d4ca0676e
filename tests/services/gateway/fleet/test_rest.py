"""Servers at rest: what becomes of requests, of the lease and of crashes meanwhile, and how they come back."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.services.bench_fleet import BASE, TUNED, Bench, answer_of
from tests.services.fake_vllm import FakeVllm, write_checkpoint
from vcot.pipeline.errors import ServerError, SwapError
from vcot.services.checkpoints.registry import Registry
from vcot.services.cli.terminal import Terminal
from vcot.services.engine.serve_section import ServeSection
from vcot.services.gateway.admin import Rested, Wanted, named_error
from vcot.services.gateway.fleet import rest
from vcot.services.gateway.fleet.admission import Admission
from vcot.services.gateway.fleet.lease import Lease, choose_rest
from vcot.services.gateway.fleet.replica import Supervision
from vcot.services.gateway.swap import rollout
from vcot.services.gateway.swap.verified import SwapLimits
from vcot.services.run import resting as command_side
from vcot.services.run.gateways import make_gateway

LEASE_S = 30.0


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with Bench(tmp_path, supervision=Supervision(health_interval_s=0.01, first_backoff_s=0.0)).running() as bench:
        yield bench


async def expect_resting(bench: Bench) -> None:
    answer = await bench.ask()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "resting")
    assert int(answer.headers["retry-after"]) > 0
    assert (await bench.http.get("/health")).json()["status"] == "resting"
    assert (await bench.http.get("/health")).status_code == 200, "nobody should start it anew for that"
    state = (await bench.http.get("/admin/state")).json()
    assert state["phase"] == "resting"


# The pure part


@pytest.mark.parametrize(
    ("wanted", "is_ours", "can_sleep", "way"),
    [
        ("auto", True, True, "sleep"),
        ("auto", True, False, "keep"),
        ("auto", False, True, "sleep"),
        ("sleep", True, True, "sleep"),
        ("stop", True, True, "stop"),
        ("stop", True, False, "stop"),
        ("stop", False, True, "sleep"),
    ],
)
def test_how_a_server_rests(wanted: Wanted, is_ours: bool, can_sleep: bool, way: str) -> None:
    assert choose_rest(wanted, "vllm-0", is_ours=is_ours, can_sleep=can_sleep) == way


def test_a_server_that_cannot_sleep_is_not_taken_for_one_that_does() -> None:
    with pytest.raises(SwapError, match=r"vllm-0 cannot sleep.*serve\.while_training"):
        choose_rest("sleep", "vllm-0", is_ours=True, can_sleep=False)


def test_a_lease_is_never_made_shorter() -> None:
    lease = Lease(ends=0.0)
    lease.renew(100.0, 60.0)
    lease.renew(110.0, 1.0)
    assert not lease.is_over(159.0)
    assert lease.is_over(160.0)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, "auto"),
        ({"while_training": "keep"}, None),
        ({"while_training": "stop"}, "stop"),
        ({"url": "http://elsewhere"}, None),
        ({"url": "http://elsewhere", "while_training": "sleep"}, "sleep"),
    ],
)
def test_a_gateway_elsewhere_rests_only_where_the_recipe_says_so(
    settings: dict[str, Any], wanted: str | None, tmp_path: Path
) -> None:
    run: Any = SimpleNamespace(directory=tmp_path, recipe=SimpleNamespace(serve=ServeSection(**settings)))
    assert make_gateway(run, Registry(tmp_path), lambda _: None).wanted_rest == wanted


def test_no_request_is_admitted_to_a_server_at_rest(bench: Bench) -> None:
    admission, digest = Admission(), bench.base.ref.digest
    admission.move("live", "", bench.base)
    with pytest.raises(RuntimeError, match="cannot go from live to resting"):
        admission.move("resting", "")
    for phase in ("draining", "swapping", "resting"):
        admission.move(phase, "")
    assert not admission.serves(digest)
    assert not admission.is_changing, "waiting would not help"
    with pytest.raises(RuntimeError, match="cannot go from resting to live"):
        admission.move("live", "")


# Sleeping


async def test_a_server_sleeps_and_wakes_with_what_it_held(bench: Bench) -> None:
    await bench.swap("policy", "tuned")
    assert await rest.rest(bench.fleet, "auto", LEASE_S) == {"vllm-0": "sleep"}
    await expect_resting(bench)
    assert bench.server.calls[-1] == "sleep 1", "level 1 keeps the weights"
    await rest.wake(bench.fleet)
    after = bench.server.calls[bench.server.calls.index("wake_up") :]
    assert {"/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache"} < set(after)
    assert await bench.answer() == ("tuned", answer_of(TUNED))
    assert (len(bench.servers), bench.replica.num_restarts, bench.fleet.lease) == (1, 0, None)


async def test_a_request_in_flight_ends_before_it_sleeps_and_one_that_waits_is_told(bench: Bench) -> None:
    bench.server.hold.clear()
    asked = asyncio.create_task(bench.answer("hold on"))
    await bench.server.holding.wait()
    going = asyncio.create_task(rest.rest(bench.fleet, "sleep", LEASE_S))
    await bench.until("draining")
    late = asyncio.create_task(bench.ask("late"))
    for _ in range(20):
        await asyncio.sleep(0.005)
    assert not bench.server.is_asleep
    bench.server.hold.set()
    assert await asked == ("base", answer_of(BASE))
    await going
    assert (await late).json()["error"]["code"] == "resting"


async def test_wrong_weights_after_waking_are_refused(bench: Bench) -> None:
    await rest.rest(bench.fleet, "sleep", LEASE_S)
    bench.server.wakes_with = 7.0
    await rest.wake(bench.fleet)
    assert await bench.answer() == ("base", answer_of(BASE))
    assert (len(bench.servers), bench.replica.num_restarts) == (2, 1)
    assert any("vllm-0 did not wake as it slept" in warning for warning in bench.fleet.warnings)


async def test_an_adapter_is_verified_again(bench: Bench) -> None:
    bench.adapter("light", 0.5)
    await bench.swap("policy", "light")
    await rest.rest(bench.fleet, "sleep", LEASE_S)
    bench.server.ignores_adapters = True
    await rest.wake(bench.fleet)
    assert len(bench.servers) == 2
    assert await bench.answer() == ("light", answer_of(BASE + 0.5))


async def test_a_server_that_sleeps_is_not_taken_for_a_hung_one(bench: Bench) -> None:
    bench.server.is_stuck = True
    await rest.rest(bench.fleet, "sleep", LEASE_S)
    for _ in range(30):
        await asyncio.sleep(0.01)
    assert (bench.admission.phase, len(bench.servers)) == ("resting", 1)


async def test_a_server_that_dies_asleep_is_not_started_before_the_rest_is_over(bench: Bench) -> None:
    await rest.rest(bench.fleet, "sleep", LEASE_S)
    bench.server.died.set()
    await bench.until_so(lambda: bench.admission.checkpoint is None)
    await bench.until("resting")
    for _ in range(20):
        await asyncio.sleep(0.005)
    assert len(bench.servers) == 1
    await rest.wake(bench.fleet)
    assert await bench.answer() == ("base", answer_of(BASE))
    assert len(bench.servers) == 2


async def test_one_that_cannot_sleep_serves_on(bench: Bench) -> None:
    bench.server.refuses_sleep = True
    with pytest.raises(ServerError, match="404"):
        await rest.rest(bench.fleet, "sleep", LEASE_S)
    await bench.until("live")
    assert await bench.answer() == ("base", answer_of(BASE))
    assert bench.fleet.lease is None


# Stopping


async def test_a_server_is_stopped_and_started_again(tmp_path: Path) -> None:
    bench = Bench(tmp_path, can_sleep=False)
    async with bench.running():
        await bench.swap("policy", "tuned")
        assert await rest.rest(bench.fleet, "stop", LEASE_S) == {"vllm-0": "stop"}
        await expect_resting(bench)
        assert bench.server.endpoint.socket is not None
        assert not bench.server.endpoint.socket.exists()
        for _ in range(20):
            await asyncio.sleep(0.005)
        assert len(bench.servers) == 1
        await rest.wake(bench.fleet)
        assert await bench.answer() == ("tuned", answer_of(TUNED))
        assert (len(bench.servers), bench.replica.num_restarts) == (2, 0)


async def test_a_server_that_is_still_loading_is_not_waited_for(tmp_path: Path) -> None:
    bench = Bench(tmp_path, replicas=2)
    loading = asyncio.Event()

    def stall(server: FakeVllm) -> None:
        if len(bench.servers) == 2:
            start = server.start

            async def start_late(progress: object) -> None:
                await loading.wait()
                await start(progress)

            server.start = start_late  # type: ignore[method-assign]

    bench.prepare = stall
    task = asyncio.create_task(bench.fleet.run())
    admissions = [replica.gate.admission for replica in bench.fleet.replicas]  # whichever's files were hashed first
    await bench.fleet.changes.wait_for(lambda: any(each.phase == "live" for each in admissions), 10)
    await rest.rest(bench.fleet, "sleep", LEASE_S)
    assert [replica.gate.admission.phase for replica in bench.fleet.replicas] == ["resting", "resting"]
    loading.set()
    await rest.wake(bench.fleet)
    assert [replica.gate.admission.phase for replica in bench.fleet.replicas] == ["live", "live"]
    assert await bench.answer() == ("base", answer_of(BASE))
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_what_does_not_come_back_is_said(bench: Bench) -> None:
    await rest.rest(bench.fleet, "stop", LEASE_S)
    bench.prepare = lambda server: setattr(server, "fail_start", "no memory" if len(bench.servers) == 2 else "")
    with pytest.raises(ServerError, match="no server came back from its rest: no memory"):
        await rest.wake(bench.fleet)
    await bench.until("live")


# Others meanwhile


@pytest.mark.parametrize("way", ["sleep", "stop"])
async def test_the_next_swap_or_trial_ends_it(bench: Bench, tmp_path: Path, way: Wanted) -> None:
    await rest.rest(bench.fleet, way, LEASE_S)
    await bench.swap("policy", "tuned")
    assert await bench.answer() == ("tuned", answer_of(TUNED))
    await rest.rest(bench.fleet, way, LEASE_S)
    tried = await rollout.try_out(bench.fleet, write_checkpoint(tmp_path / "made", "made", 3.0))
    answer = await bench.ask(model="made", headers={"x-vcot-expect": tried.live.digest})
    assert answer.status_code == 200
    assert bench.fleet.lease is None


async def test_a_drain_that_takes_too_long_gives_it_up(tmp_path: Path) -> None:
    bench = Bench(tmp_path, limits=SwapLimits(drain_s=0.05), replicas=2)
    async with bench.running():
        for server in bench.servers:
            server.hold.clear()
        asked = asyncio.create_task(bench.answer("hold on"))
        holding = [asyncio.ensure_future(server.holding.wait()) for server in bench.servers]
        await asyncio.wait(holding, return_when=asyncio.FIRST_COMPLETED)
        with pytest.raises(SwapError, match="1 requests were still in flight"):
            await rest.rest(bench.fleet, "sleep", LEASE_S)
        assert [replica.gate.admission.phase for replica in bench.fleet.replicas] == ["live", "live"]
        assert not any(server.is_asleep for server in bench.servers), "the other was woken again"
        for server in bench.servers:
            server.hold.set()
        assert await asked == ("base", answer_of(BASE))
        for each in holding:
            each.cancel()


async def test_no_server_is_added_to_those_at_rest(bench: Bench) -> None:
    await rest.rest(bench.fleet, "sleep", LEASE_S)
    with pytest.raises(SwapError, match="the servers rest"):
        bench.fleet.add(None)
    assert len(bench.servers) == 1


async def test_servers_that_are_kept_serve_on(tmp_path: Path) -> None:
    bench = Bench(tmp_path, can_sleep=False)
    async with bench.running():
        assert await rest.rest(bench.fleet, "auto", LEASE_S) == {"vllm-0": "keep"}
        assert await bench.answer() == ("base", answer_of(BASE))
        assert bench.fleet.lease is None


# The lease


@asynccontextmanager
async def forgetting(bench: Bench) -> AsyncIterator[None]:
    task = asyncio.create_task(rest.end_forgotten_rests(bench.fleet, poll_s=0.01))
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("way", ["sleep", "stop"])
async def test_a_rest_whose_owner_was_killed_ends_by_itself(bench: Bench, way: Wanted) -> None:
    async with forgetting(bench):
        await rest.rest(bench.fleet, way, 0.05)
        await bench.until("live")
        assert await bench.answer() == ("base", answer_of(BASE))
    assert any("asks for it no more" in warning for warning in bench.fleet.warnings)


async def test_a_rest_goes_on_while_it_is_asked_for(bench: Bench) -> None:
    async with forgetting(bench):
        for _ in range(10):
            await rest.rest(bench.fleet, "sleep", 0.2)
            await asyncio.sleep(0.05)
            assert bench.admission.phase == "resting"
        assert bench.server.calls.count("sleep 1") == 1


async def test_a_server_that_does_not_come_back_then_ends_no_gateway(bench: Bench) -> None:
    bench.prepare = lambda server: setattr(server, "fail_start", "no memory" if len(bench.servers) == 2 else "")
    async with forgetting(bench):
        await rest.rest(bench.fleet, "stop", 0.05)
        await bench.until("live")
    assert any("no memory" in warning for warning in bench.fleet.warnings)


# A server of someone else's


async def test_a_server_of_others_sleeps_and_is_woken_by_a_gateway_that_is_started_anew(tmp_path: Path) -> None:
    """The gateway was killed while it slept: nothing is recorded, and its canary would wait for ever."""
    other = FakeVllm(None, weight=BASE)
    other.hold.set()
    url = await other.listen()
    bench = Bench(tmp_path, upstreams=(url,), can_sleep=False)
    async with bench.running():
        ways = await rest.rest(bench.fleet, "stop", LEASE_S)
        assert list(ways.values()) == ["sleep"], "it is not ours to stop"
        assert other.is_asleep
    again = Bench(tmp_path / "again", upstreams=(url,))
    async with again.running():
        assert await again.answer() == ("base", answer_of(BASE))
    await other.stop()


# Over HTTP, and the command's side


async def test_over_http(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"way": "sleep", "lease_s": 30}
    rested = await bench.http.post("/admin/rest", json=body)
    assert Rested.model_validate_json(rested.content).is_any
    await expect_resting(bench)
    woken = await bench.http.post("/admin/wake", json={})
    assert (woken.status_code, woken.json()["phase"]) == (200, "live")
    for wrong in ({}, {"way": "keep", "lease_s": 1}, {"way": "sleep", "lease_s": 0}):
        assert (await bench.http.post("/admin/rest", json=wrong)).status_code == 422
    bench.fleet.can_sleep = False
    error = (await bench.http.post("/admin/rest", json=body)).json()["error"]
    assert isinstance(named_error(error["code"], error["message"]), SwapError)
    monkeypatch.setenv("VCOT_ADMIN_KEY", "secret")
    async with Bench(bench.directory / "keyed").http as guarded:
        for route in ("rest", "wake"):
            assert (await guarded.post(f"/admin/{route}", json=body)).status_code == 401


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a command asks of the gateway."""
    asked: list[str] = []

    def note(name: str, answer: object) -> Callable[..., Awaitable[object]]:
        async def call(*_: object) -> object:
            asked.append(name)
            return answer

        return call

    monkeypatch.setattr(command_side.admin, "rest", note("rest", Rested(ways={"vllm-0": "sleep"})))
    monkeypatch.setattr(command_side.admin, "wake", note("wake", None))
    return asked


async def test_a_command_renews_the_lease_while_it_trains_then_wakes(calls: list[str]) -> None:
    async with command_side.resting("http://gateway", "sleep", Terminal(), lease_s=0.04):
        await asyncio.sleep(0.1)
    assert len(calls) > 3
    assert calls[-1] == "wake"
    assert set(calls[:-1]) == {"rest"}
    await asyncio.sleep(0.03)
    assert calls[-1] == "wake", "nothing renews it any more"


async def test_a_command_that_fails_leaves_it_to_the_lease(calls: list[str]) -> None:
    """It may be ending because of Ctrl-C, and a start takes long."""
    with pytest.raises(ServerError):
        async with command_side.resting("http://gateway", "sleep", Terminal()):
            raise ServerError("the trainer ended with 1")
    assert "wake" not in calls
