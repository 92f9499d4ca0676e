"""Several replicas: what one fails another answers, a swap rolls over them, and a lost one comes back as it should be."""

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.services.bench_fleet import BASE, TUNED, Bench, answer_of
from tests.services.fake_vllm import FakeVllm, write_checkpoint
from tests.services.gateway.test_gateway import events
from vcot.pipeline.errors import CheckpointError, ServerError, SwapError
from vcot.services.engine.vllm import Endpoint
from vcot.services.gateway.fleet import replica
from vcot.services.gateway.fleet.replica import Supervision
from vcot.services.gateway.fleet.upstream import Upstream
from vcot.services.gateway.swap.calibration import Calibration
from vcot.services.gateway.swap.claim import Owner

BROKEN = ("reset", "half", "half-json", "500", "502", "503", "wrong-model")


async def figures(bench: Bench) -> dict[str, float]:
    lines = (await bench.http.get("/metrics")).text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


@pytest.mark.parametrize("fault", [*BROKEN, "429", "429-bare"])
async def test_what_one_replica_fails_another_answers(pair: Bench, fault: str) -> None:
    pair.server_of(0).faults = [fault]
    answer = await pair.ask()
    assert (answer.status_code, answer.headers["x-vcot-checkpoint"]) == (200, "base")
    assert pair.server_of(1).num_asked == 2  # the canary, and this one
    reason = {"reset": "lost", "half": "lost", "half-json": "not_json", "wrong-model": "wrong_model", "429-bare": "429"}
    found = await figures(pair)
    assert found[f'vcot_retries_total{{reason="{reason.get(fault, fault)}"}}'] == 1
    assert found[f'vcot_engine_faults_total{{reason="{reason.get(fault, fault)}",replica="vllm-0"}}'] == 1


@pytest.mark.parametrize("fault", ["reset", "half", "500", "empty", "wrong-model"])
async def test_a_stream_is_tried_again_until_its_first_byte(pair: Bench, fault: str) -> None:
    pair.server_of(0).faults = [fault]
    *chunks, end = events(await pair.ask(stream=True))
    assert (len(chunks), end) == (3, "[DONE]")
    assert {chunk["model"] for chunk in chunks} == {f"base@{pair.base.ref.digest[7:19]}"}


async def test_a_stream_that_has_begun_is_not_asked_for_again(pair: Bench) -> None:
    *_, last = events(await pair.ask("die", stream=True))
    assert last["error"]["type"] == "engine_lost"
    assert pair.server_of(1).num_asked == 1


@pytest.mark.parametrize("fault", BROKEN)
async def test_each_replica_is_asked_once(pair: Bench, fault: str) -> None:
    for number in (0, 1):
        pair.server_of(number).faults = [fault] * 2
        pair.server_of(number).is_sick = True
    answer = await pair.ask()
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "engine_lost")
    assert int(answer.headers["retry-after"]) > 0
    assert [pair.server_of(number).num_asked for number in (0, 1)] == [2, 2]


@pytest.mark.parametrize("fault", ["500", "502", "503"])
@pytest.mark.parametrize("stream", [False, True])
async def test_what_well_engines_fail_is_the_requests_own_fault(pair: Bench, fault: str, stream: bool) -> None:
    for _ in range(8):
        for number in (0, 1):
            pair.server_of(number).faults = [fault]
        answer = await pair.ask(stream=stream)
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "request_failed")
        assert "retry-after" not in answer.headers
    assert [replica.breaker.state for replica in pair.fleet.replicas] == ["closed", "closed"]
    for number in (0, 1):
        pair.server_of(number).faults = []
    assert (await pair.ask()).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_a_bad_request_has_the_same_status_with_and_without_a_stream(pair: Bench, stream: bool) -> None:
    for number in (0, 1):
        pair.server_of(number).faults = ["422"]
    answer = await pair.ask(stream=stream)
    assert (answer.status_code, answer.json()["error"]["message"]) == (422, "no")
    assert sum(pair.server_of(number).num_asked for number in (0, 1)) == 3, "the canaries, and one request"


@pytest.mark.parametrize("fault", ["500", "503", "reset"])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_that_is_well_and_has_no_other_beside_it_is_asked_once_more(
    tmp_path: Path, fault: str, stream: bool
) -> None:
    """vLLM answers with a bare 500 where it has lost sight of an image, and knows it the next time."""
    bench = Bench(tmp_path)
    async with bench.running():
        bench.server.faults = [fault]
        assert (await bench.ask(stream=stream)).status_code == 200
        bench.server.faults = [fault] * 9
        assert (await bench.ask(stream=stream)).status_code == (422 if fault.isdecimal() else 502)
        assert len(bench.server.faults) >= 6, "twice and no more, but for a used connection (pool.py)"
        assert bench.replica.breaker.state == "closed"


async def test_a_connection_that_is_closed_behind_a_fault_fails_nobody_else(pair: Bench) -> None:
    for number in (0, 1):
        pair.server_of(number).faults = ["closing"] * 4
    for _ in range(4):
        assert (await pair.ask()).status_code == 422
    assert [(await pair.ask()).status_code for _ in range(4)] == [200] * 4


async def test_full_engines_are_told_with_their_own_delay(pair: Bench) -> None:
    for number in (0, 1):
        pair.server_of(number).faults = ["429"] * 6
    for _ in range(6):
        answer = await pair.ask()
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "7")
    assert [replica.breaker.state for replica in pair.fleet.replicas] == ["closed", "closed"]


async def test_a_request_that_is_wrong_itself_is_not_tried_again(pair: Bench) -> None:
    assert (await pair.ask("fail")).status_code == 400
    assert pair.server_of(1).num_asked == 1


async def test_a_replica_that_keeps_failing_is_left_alone(pair: Bench) -> None:
    pair.server_of(0).faults = ["500"] * 100
    pair.server_of(0).is_sick = pair.server_of(1).is_sick = True
    for _ in range(8):
        assert (await pair.ask()).status_code == 200
    assert pair.fleet.replicas[0].breaker.state == "open"
    assert pair.server_of(0).num_asked == 6  # the canary, and five failures
    assert (await figures(pair))['vcot_breaker{replica="vllm-0",vcot_breaker="open"}'] == 1
    pair.server_of(1).faults = ["500"] * 5
    assert [(await pair.ask()).status_code for _ in range(5)] == [502] * 5
    refused = await pair.ask()
    assert (refused.status_code, "retry-after" in refused.headers) == (503, True)


async def test_other_weights_never_answer_a_retry(pair: Bench) -> None:
    """One replica holds tuned while the other still drains: a failure there is not mended by the first."""
    old = pair.server_of(1)
    old.hold.clear()
    pair.server_of(0).hold.clear()
    held = [asyncio.create_task(pair.ask("hold on")) for _ in range(2)]
    await asyncio.gather(old.holding.wait(), pair.server_of(0).holding.wait())
    swap = asyncio.create_task(pair.swap("policy", "tuned"))
    await pair.until("draining")
    pair.server_of(0).hold.set()
    await pair.until("draining", pair.fleet.replicas[1])
    assert (await pair.answer()) == ("tuned", answer_of(TUNED))
    old.died.set()
    answers = await asyncio.gather(*held)
    assert sorted(answer.status_code for answer in answers) == [200, 502]
    assert {a.headers["x-vcot-checkpoint"] for a in answers if a.status_code == 200} == {"base"}
    await swap


async def test_a_replica_that_dies_under_load_costs_no_request(pair: Bench) -> None:
    pair.server_of(0).hold.clear()
    asked = [asyncio.create_task(pair.ask("hold on", n=number + 1)) for number in range(8)]
    await pair.server_of(0).holding.wait()
    pair.server_of(0).died.set()
    assert [answer.status_code for answer in await asyncio.gather(*asked)] == [200] * 8
    await pair.until("live")
    assert len(pair.lives[0]) == 2


async def test_the_samples_of_an_image_go_to_one_replica(pair: Bench) -> None:
    def content(number: int) -> list[dict[str, Any]]:
        image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{number}"}}
        return [image, {"type": "text", "text": "?"}]

    for number in range(12):
        before = [pair.server_of(n).num_asked for n in (0, 1)]
        for _ in range(3):
            await pair.ask(content(number))
        asked = [pair.server_of(n).num_asked - b for n, b in zip((0, 1), before, strict=True)]
        assert sorted(asked) == [0, 3]
    assert min(pair.server_of(n).num_asked for n in (0, 1)) > 1


async def test_a_rolling_swap_makes_nobody_wait_and_changes_every_replica(pair: Bench) -> None:
    pair.server_of(0).hold.clear()
    held = asyncio.create_task(pair.ask("hold on"))
    await pair.server_of(0).holding.wait()
    swap = asyncio.create_task(pair.swap("policy", "tuned"))
    await pair.until("draining")
    assert await pair.answer() == ("base", answer_of(BASE))  # by the other one
    pair.server_of(0).hold.set()
    assert (await swap).way == "reload"
    assert (await swap).pause_s == 0
    assert (await held).headers["x-vcot-checkpoint"] == "base"
    assert [pair.server_of(n).weight for n in (0, 1)] == [TUNED, TUNED]
    assert await pair.answer() == ("tuned", answer_of(TUNED))


async def test_swaps_under_load_over_replicas_fail_and_mix_nothing(pair: Bench) -> None:
    done, wrong = asyncio.Event(), list[object]()

    async def keep_asking(number: int) -> None:
        turn = 0
        while not done.is_set():
            name, values = await pair.answer(f"{number} {(turn := turn + 1) % 3}")
            if values != answer_of({"base": BASE, "tuned": TUNED}[name]):
                wrong.append((name, values))

    askers = [asyncio.create_task(keep_asking(number)) for number in range(6)]
    for turn in range(6):
        await pair.swap("policy", ("tuned", "base")[turn % 2])
    done.set()
    await asyncio.gather(*askers)
    assert wrong == []


async def test_a_swap_that_fails_on_the_first_replica_changes_nothing(pair: Bench) -> None:
    pair.server_of(0).fail_next_reload = True
    with pytest.raises(SwapError, match="base is live as before"):
        await pair.swap("policy", "tuned")
    assert [pair.server_of(n).weight for n in (0, 1)] == [BASE, BASE]
    assert pair.registry.live() == "base"


async def test_a_later_replica_that_fails_is_started_anew_with_the_new_checkpoint(pair: Bench) -> None:
    pair.server_of(1).fail_next_reload = True
    assert (await pair.swap("policy", "tuned")).live.name == "tuned"
    assert await pair.answer() == ("tuned", answer_of(TUNED))
    other = pair.fleet.replicas[1]
    await pair.until_so(lambda: other.num_restarts == 1 and other.gate.admission.phase == "live")
    assert (pair.server_of(1).checkpoint, pair.server_of(1).weight) == (pair.tuned, TUNED)


async def test_a_replica_that_comes_up_during_a_swap_holds_what_is_live_then(pair: Bench) -> None:
    """It was started with the base; the swap is done before it is verified."""
    started, go = asyncio.Event(), asyncio.Event()

    def slow(server: FakeVllm) -> None:
        start = server.start

        async def start_slowly(progress: Any) -> None:
            await start(progress)
            started.set()
            await go.wait()

        server.start = start_slowly  # type: ignore[method-assign]

    pair.prepare = slow
    pair.server_of(1).died.set()
    await started.wait()
    await pair.swap("policy", "tuned")
    go.set()
    await pair.until("live", pair.fleet.replicas[1])
    assert pair.server_of(1).checkpoint == pair.base
    assert pair.server_of(1).weight == TUNED
    assert pair.fleet.replicas[1].gate.admission.checkpoint == pair.tuned


async def test_one_replica_that_cannot_start_does_not_stop_the_others(tmp_path: Path) -> None:
    bench = Bench(tmp_path, replicas=2, supervision=Supervision(first_backoff_s=30))
    bench.prepare = lambda server: setattr(
        server, "fail_start", "no memory" if server is bench.lives.get(0, [None])[-1] else ""
    )
    task = asyncio.create_task(bench.fleet.run())
    await bench.until("live", bench.fleet.replicas[1])
    assert (await bench.ask()).status_code == 200
    assert [replica.state.phase for replica in bench.fleet.replicas] == ["dead", "live"]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_devices_are_given_in_turn(tmp_path: Path) -> None:
    bench = Bench(tmp_path, replicas=3, devices=("0", "1,2"))
    assert [replica.devices for replica in bench.fleet.replicas] == ["0", "1,2", "0"]


def watched(**options: float) -> Supervision:
    return Supervision(health_interval_s=0.005, first_backoff_s=0.0, lease_s=3.0, **options)


async def test_a_server_that_hangs_is_found_and_its_requests_answered_by_another(tmp_path: Path) -> None:
    bench = Bench(tmp_path, replicas=2, supervision=watched(hang_timeout_s=0.05))
    async with bench.running():
        stuck = bench.server_of(0)
        stuck.is_stuck, stuck.faults = True, ["hang"]
        assert (await bench.ask()).status_code == 200
        assert bench.server_of(1).num_asked == 2
        await bench.until("live")
        assert "made no token" in " ".join(bench.said)


async def test_a_server_that_is_silent_is_down(tmp_path: Path) -> None:
    bench = Bench(tmp_path, supervision=watched(pulse_timeout_s=0.02))
    async with bench.running():
        bench.server.is_silent = True
        await bench.until_so(lambda: len(bench.servers) == 2)
        await bench.until("live")
        assert "did not answer /health 3 times in a row" in " ".join(bench.said)


async def test_where_nothing_listens_a_server_is_down_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    endpoint, owner = Endpoint(f"http://127.0.0.1:{port}"), Owner("a", "here")
    async with Upstream(endpoint, Calibration("float32"), owner, 1.0, is_shared=True) as upstream:
        with pytest.raises(ServerError, match="nothing answers"):
            await upstream.pulse()


class Remote:
    """A vLLM server that someone else runs, with lives of its own."""

    def __init__(self) -> None:
        self.vllm = FakeVllm(None)
        self.url = ""

    async def start(self, weight: float) -> None:
        """Begin a new life, at the same address."""
        await self.vllm.stop()
        self.vllm = FakeVllm(None, weight=weight)
        self.vllm.hold.set()
        self.url = await self.vllm.listen(port=int(self.url.rpartition(":")[2] or 0))


@pytest.fixture
async def remotes() -> AsyncIterator[list[Remote]]:
    found = [Remote(), Remote()]
    for remote in found:
        await remote.start(BASE)
    yield found
    for remote in found:
        await remote.vllm.stop()


async def test_servers_of_others_are_used_and_none_is_started(tmp_path: Path, remotes: list[Remote]) -> None:
    bench = Bench(tmp_path, upstreams=[remote.url for remote in remotes])
    async with bench.running():
        await bench.swap("policy", "tuned")
        assert await bench.answer() == ("tuned", answer_of(TUNED))
        assert bench.servers == []
        assert [remote.vllm.weight for remote in remotes] == [TUNED, TUNED]
        bench.registry.register(write_checkpoint(tmp_path / "wide", "wide", 3.0, shape=2))
        with pytest.raises(SwapError, match=r"another shape.*not ours to start"):
            await bench.swap("policy", "wide")
    assert [remote.vllm.calls.count("reload tuned") for remote in remotes] == [1, 1]
    async with httpx.AsyncClient() as client:  # they run on
        assert (await client.get(f"{remotes[0].url}/health")).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.usefixtures("split_too")
async def test_what_a_machine_that_lost_its_power_was_asked_is_asked_elsewhere(
    tmp_path: Path, remotes: list[Remote], stream: bool
) -> None:
    """Its connections do not break: nothing is said on them any more."""
    bench = Bench(tmp_path, upstreams=[remote.url for remote in remotes], supervision=watched(pulse_timeout_s=0.2))
    async with bench.running():
        for remote in remotes:
            remote.vllm.hold.clear()
        held = [asyncio.create_task(bench.ask("hold on", stream=stream)) for _ in range(2)]
        await asyncio.gather(*(remote.vllm.holding.wait() for remote in remotes))
        remotes[0].vllm.is_silent = True
        await bench.until_so(lambda: bench.fleet.replicas[0].gate.admission.phase != "live")
        remotes[1].vllm.hold.set()
        async with asyncio.timeout(20):
            answers = await asyncio.gather(*held)
        assert [answer.status_code for answer in answers] == [200, 200]
        if stream:
            assert all(answer.text.endswith("data: [DONE]\n\n") for answer in answers)
        remotes[0].vllm.hold.set()


async def test_a_server_of_others_that_holds_something_else_is_loaded_first(
    tmp_path: Path, remotes: list[Remote]
) -> None:
    await remotes[0].start(7.0)
    bench = Bench(tmp_path, upstreams=[remotes[0].url])
    async with bench.running():
        assert await bench.answer() == ("base", answer_of(BASE))


async def test_a_server_of_others_that_was_restarted_never_answers_with_its_first_weights(
    tmp_path: Path, remotes: list[Remote]
) -> None:
    """It was started with the base, holds tuned since a swap, and comes back with the base."""
    bench = Bench(tmp_path, upstreams=[remotes[0].url], supervision=watched())
    async with bench.running():
        await bench.swap("policy", "tuned")
        await remotes[0].start(BASE)
        await bench.until_so(lambda: bench.replica.num_restarts > 0 and bench.admission.phase == "live")
        assert await bench.answer() == ("tuned", answer_of(TUNED))


async def test_a_server_of_others_that_was_restarted_as_it_went_live_is_noticed(
    tmp_path: Path, remotes: list[Remote], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its verification and the first look at its health, which must not take the new process for that one."""
    watch = replica.watch

    async def restart_first(*arguments: Any) -> ServerError:
        monkeypatch.setattr(replica, "watch", watch)
        await remotes[0].start(TUNED)
        return await watch(*arguments)

    monkeypatch.setattr(replica, "watch", restart_first)
    bench = Bench(tmp_path, upstreams=[remotes[0].url], supervision=watched())
    async with bench.running():
        await bench.until_so(lambda: bench.replica.num_restarts > 0 and bench.admission.phase == "live")
        assert await bench.answer() == ("base", answer_of(BASE))


async def test_replicas_come_and_go_at_run_time(tmp_path: Path, remotes: list[Remote]) -> None:
    bench = Bench(tmp_path)
    async with bench.running():
        await bench.swap("policy", "tuned")
        with pytest.raises(SwapError, match="the only one that serves"):
            await bench.fleet.remove("vllm-0")
        for body in ({"url": remotes[0].url}, {}):
            assert (await bench.http.post("/admin/replicas", json=body)).status_code == 202
            await bench.until("live", bench.fleet.replicas[-1])
        assert [remotes[0].vllm.weight, bench.server_of(1).weight] == [TUNED, TUNED]
        again = await bench.http.post("/admin/replicas", json={"url": remotes[0].url})
        assert again.status_code == 409
        bench.server_of(0).hold.clear()
        held = asyncio.create_task(bench.ask("hold on"))
        await bench.server_of(0).holding.wait()
        removing = asyncio.create_task(bench.http.delete("/admin/replicas/vllm-0"))
        await bench.until("draining")
        assert (await bench.ask()).status_code == 200
        bench.server_of(0).hold.set()
        listed = (await removing).json()["replicas"]
        assert (await held).status_code == 200  # drained, not cut off
        assert [replica["name"] for replica in listed] == [remotes[0].url.removeprefix("http://"), "vllm-1"]
        with pytest.raises(CheckpointError, match="no replica 'vllm-0'"):
            await bench.fleet.remove("vllm-0")


async def test_another_shape_takes_a_server_of_its_own(pair: Bench) -> None:
    wide = pair.registry.register(write_checkpoint(pair.directory / "wide", "wide", 3.0, shape=2))
    done, failed = asyncio.Event(), list[int]()

    async def keep_asking() -> None:
        while not done.is_set():
            if (answer := await pair.ask()).status_code != 200:
                failed.append(answer.status_code)

    asker = asyncio.create_task(keep_asking())
    swapped = await pair.swap("policy", "wide")
    done.set()
    await asker
    assert (swapped.way, swapped.live, failed) == ("replica", wide.ref, [])
    assert await pair.answer() == ("wide", answer_of(3.0))
    assert [replica.name for replica in pair.fleet.replicas] == ["vllm-1", "vllm-2"]
    assert [pair.server_of(number).checkpoint for number in (1, 2)] == [wide, wide]
    assert not any(call.startswith("reload") for server in pair.servers for call in server.calls)


async def test_a_server_of_its_own_that_does_not_pass_changes_nothing(pair: Bench) -> None:
    liar = write_checkpoint(pair.directory / "liar", "liar", 3.0, shape=2, canary_weight=4.0)
    pair.registry.register(liar)
    with pytest.raises(SwapError, match=r"liar was not swapped in.*does not answer the canary"):
        await pair.swap("policy", "liar")
    assert [replica.name for replica in pair.fleet.replicas] == ["vllm-0", "vllm-1"]
    assert await pair.answer() == ("base", answer_of(BASE))


async def test_the_first_start_that_fails_everywhere_is_said(tmp_path: Path) -> None:
    bench = Bench(tmp_path, replicas=2)
    bench.prepare = lambda server: setattr(server, "fail_start", "no memory")
    with pytest.raises(ServerError, match="no memory"):
        await bench.fleet.run()


@pytest.mark.parametrize("bug", [KeyError("x"), ZeroDivisionError(), OSError(28, "No space left"), RuntimeError("\n")])
async def test_a_bug_in_supervising_one_server_ends_that_life_only(
    pair: Bench, caplog: pytest.LogCaptureFixture, bug: Exception
) -> None:
    first, second = pair.fleet.replicas
    pair.server_of(0).bug = bug
    pair.server_of(0).died.set()
    await pair.until_so(lambda: first.num_restarts == 1 and first.gate.admission.phase == "live")
    assert second.gate.admission.phase == "live"
    assert (await pair.ask()).status_code == 200
    assert any("a bug in supervising vllm-0" in said for said in pair.said)
    assert type(bug).__name__ in caplog.text, "with its traceback"


async def test_a_first_start_that_fails_by_a_bug_says_so(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.prepare = lambda server: setattr(server, "fail_start", KeyError("x"))
    with pytest.raises(ServerError, match="a bug in supervising vllm-0 \\(KeyError"):
        async with bench.running():
            pass


async def test_a_server_that_fails_for_days_ends_nobody_else(tmp_path: Path) -> None:
    """The pause before its next start was computed as a power of two without end, which ended the gateway in a day or so."""
    bench = Bench(tmp_path, replicas=2)
    async with bench.running():
        bench.prepare = lambda server: setattr(server, "fail_start", "no GPU")
        other = bench.fleet.replicas[1]
        bench.server_of(1).died.set()
        async with asyncio.timeout(60):
            while other.num_restarts < 1_050:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.05)
        assert await bench.answer() == ("base", answer_of(BASE))
