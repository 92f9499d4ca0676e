"""Requests that meet a swap, streamed or not: whatever the swap does, it fails none of them."""

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.services.bench_fleet import BASE, TUNED, Bench, answer_of
from tests.services.fake_vllm import write_checkpoint
from tests.services.gateway.test_gateway import events
from vcot.pipeline.errors import SwapError
from vcot.services.gateway.fleet import rest
from vcot.services.gateway.fleet.replica import Supervision
from vcot.services.gateway.swap.verified import SwapLimits

pytestmark = pytest.mark.usefixtures("split_too")


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def with_image(number: int, text: str) -> list[dict[str, Any]]:
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{number:04}"}}
    return [image, {"type": "text", "text": text}]


def is_whole(answer: httpx.Response, bench: Bench) -> bool:
    """Whether an answer is one checkpoint's, from its stamp to its last token, and a stream all there."""
    held = {"base": bench.base, "tuned": bench.tuned}[answer.headers["x-vcot-checkpoint"]]
    named = f"{held.ref.name}@{held.ref.digest[7:19]}"
    weight = {"base": BASE, "tuned": TUNED}[held.ref.name]
    if answer.headers["content-type"].startswith("application/json"):
        choice = answer.json()["choices"][0]
        values = {token["logprob"] for token in choice["logprobs"]["content"]}
        return answer.json()["model"] == named and values == answer_of(weight)
    *chunks, end = events(answer)
    texts = {chunk["choices"][0]["delta"]["content"] for chunk in chunks}
    return end == "[DONE]" and {c["model"] for c in chunks} == {named} and texts == {f"é{v}" for v in answer_of(weight)}


class Held:
    """A request that keeps a swap draining until it is let go."""

    def __init__(self, bench: Bench, **fields: Any) -> None:
        self._server = bench.server
        self._server.hold.clear()
        self.answer = asyncio.create_task(bench.ask("hold on", **fields))

    async def __aenter__(self) -> "Held":
        await self._server.holding.wait()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.hold.set()

    def let_go(self) -> None:
        self._server.hold.set()


async def until_waiting(bench: Bench, num: int) -> None:
    async with asyncio.timeout(10):
        while num_waiting(bench) < num:  # noqa: ASYNC110 - nothing is told when one more waits
            await asyncio.sleep(0.001)


def num_waiting(bench: Bench) -> int:
    return len(bench.fleet.changes.line.waiting)


@pytest.mark.parametrize("num_replicas", [1, 2])
async def test_swaps_under_load_with_streams_fail_nothing_though_images_drift(
    tmp_path: Path, num_replicas: int
) -> None:
    bench = Bench(tmp_path, replicas=num_replicas)
    bench.prepare = lambda server: setattr(server, "drifts", True)
    async with bench.running():
        done, ends = asyncio.Event(), Counter[object]()

        async def keep_asking(number: int) -> None:
            turn = number
            while not done.is_set():
                turn += 1
                answer = await bench.ask(with_image(turn % 8, f"{turn % 5}"), stream=turn % 3 == 0)
                ends[answer.status_code if answer.status_code != 200 or not is_whole(answer, bench) else "whole"] += 1

        askers = [asyncio.create_task(keep_asking(number)) for number in range(16)]
        for turn in range(2):
            await bench.swap("policy", ("tuned", "base")[turn % 2])
            await asyncio.sleep(0.05)
        done.set()
        await asyncio.gather(*askers)
        assert set(ends) == {"whole"}, ends


async def test_who_waited_is_let_in_in_the_order_of_coming(bench: Bench) -> None:
    async with bench.running():
        async with Held(bench):
            swap = asyncio.create_task(bench.swap("policy", "tuned"))
            await bench.until("draining")
            waiting = []
            for number in range(40):
                waiting.append(asyncio.create_task(bench.ask(f"{number}", stream=number % 3 == 0)))
                await until_waiting(bench, number + 1)
        await swap
        assert {answer.headers["x-vcot-checkpoint"] for answer in await asyncio.gather(*waiting)} == {"tuned"}
    came = [int(text) for text in bench.server.order if text.isdecimal()]
    assert all(abs(place - number) < 8 for place, number in enumerate(came)), came


async def test_an_engine_with_empty_caches_is_given_few_at_first(tmp_path: Path) -> None:
    bench = Bench(tmp_path, supervision=Supervision(first_backoff_s=0.0, lease_s=3.0, max_ramp_s=0.3))
    async with bench.running():
        async with Held(bench) as held:
            swap = asyncio.create_task(bench.swap("policy", "tuned"))
            await bench.until("draining")
            waiting = [asyncio.create_task(bench.ask(f"hold {number}")) for number in range(40)]
            await until_waiting(bench, 40)
            held.let_go()
            await held.answer
            bench.server.hold.clear()
            await swap
            await asyncio.sleep(0.1)
            assert bench.server.num_now == 8
            await bench.until_so(lambda: bench.server.num_now == 40)  # long answers hold nobody up for longer
        assert {answer.status_code for answer in await asyncio.gather(*waiting)} == {200}


async def test_a_stream_that_has_begun_is_whole_before_the_weights_change(bench: Bench) -> None:
    async with bench.running():
        async with Held(bench, stream=True) as held:
            swap = asyncio.create_task(bench.swap("policy", "tuned"))
            await bench.until("draining")
            late = asyncio.create_task(bench.ask("late", stream=True))
            await until_waiting(bench, 1)
        await swap
        for answer, name in ((await held.answer, "base"), (await late, "tuned")):
            assert is_whole(answer, bench)
            assert answer.headers["x-vcot-checkpoint"] == name


@pytest.mark.parametrize("stream", [False, True])
async def test_who_waits_is_answered_where_the_drain_takes_too_long(tmp_path: Path, stream: bool) -> None:
    bench = Bench(tmp_path, limits=SwapLimits(drain_s=0.1))
    async with bench.running(), Held(bench, stream=True):
        swap = asyncio.create_task(bench.swap("policy", "tuned"))
        await bench.until("draining")
        late = asyncio.create_task(bench.ask("late", stream=stream))
        await until_waiting(bench, 1)
        with pytest.raises(SwapError, match="still in flight"):
            await swap
        assert is_whole(await late, bench)


@pytest.mark.parametrize("stream", [False, True])
async def test_who_waits_for_a_swap_that_ends_its_engine_waits_for_the_next_one(bench: Bench, stream: bool) -> None:
    async with bench.running():
        bench.server.is_rollback_broken = True
        async with Held(bench):
            swap = asyncio.create_task(bench.swap("policy", "tuned"))
            await bench.until("draining")
            late = [asyncio.create_task(bench.ask(f"late {number}", stream=stream)) for number in range(20)]
            await until_waiting(bench, 20)
        with pytest.raises(SwapError, match="could not be brought back"):
            await swap
        assert all(is_whole(answer, bench) for answer in await asyncio.gather(*late))
        assert len(bench.servers) == 2


async def test_who_waits_is_told_where_the_engine_does_not_come_back(bench: Bench) -> None:
    async with bench.running():
        bench.server.is_rollback_broken = True
        bench.prepare = lambda server: setattr(server, "fail_start", "no memory")
        async with Held(bench):
            swap = asyncio.create_task(bench.swap("policy", "tuned"))
            await bench.until("draining")
            late = asyncio.create_task(bench.ask("late"))
            await until_waiting(bench, 1)
        with pytest.raises(SwapError):
            await swap
        assert (await asyncio.wait_for(late, 3)).status_code == 503


async def test_a_request_that_sound_engine_failed_as_a_swap_began_is_asked_after_it(bench: Bench) -> None:
    async with bench.running():
        async with Held(bench, stream=True):
            bench.server.faults = ["500"]
            swap = None

            async def begin_a_drain() -> None:
                nonlocal swap
                swap = asyncio.create_task(bench.swap("policy", "tuned"))
                await bench.until("draining")

            bench.server.before_fault = begin_a_drain
            late = asyncio.create_task(bench.ask("late"))
            await until_waiting(bench, 1)
        answer = await late
        assert (answer.status_code, answer.headers.get("x-vcot-checkpoint")) == (200, "tuned")
        assert swap is not None
        await swap


async def test_one_swap_after_the_other_lets_in_first_who_waited_for_it(bench: Bench) -> None:
    """Each expects the weights of the first swap, which the second takes away again."""
    async with bench.running():
        async with Held(bench):
            swaps = [asyncio.create_task(bench.swap("policy", name)) for name in ("tuned", "base")]
            await bench.until("draining")
            expect = {"x-vcot-expect": bench.tuned.ref.digest}
            waiting = [asyncio.create_task(bench.ask(f"{number}", headers=expect)) for number in range(40)]
            await until_waiting(bench, 40)
        await asyncio.gather(*swaps)
        assert {answer.status_code for answer in await asyncio.gather(*waiting)} == {200}


async def test_a_rest_lets_in_first_who_waited_for_a_swap(bench: Bench) -> None:
    async with bench.running():
        async with Held(bench):
            swap = asyncio.create_task(bench.swap("policy", "tuned"))
            await bench.until("draining")
            waiting = [asyncio.create_task(bench.ask(f"{number}", stream=number % 3 == 0)) for number in range(40)]
            await until_waiting(bench, 40)
            resting = asyncio.create_task(rest.rest(bench.fleet, "sleep", 60.0))
            await asyncio.sleep(0)
        await swap
        assert all(is_whole(answer, bench) for answer in await asyncio.gather(*waiting))
        assert await resting == {"vllm-0": "sleep"}
        assert (await bench.ask()).json()["error"]["code"] == "resting"


async def test_a_deadline_and_a_hang_up_end_the_wait_and_free_what_was_held(bench: Bench) -> None:
    places = bench.slots.places
    async with bench.running():
        async with Held(bench):
            swap = asyncio.create_task(bench.swap("policy", "tuned"))
            await bench.until("draining")
            gone = asyncio.create_task(bench.ask("gone"))
            stays = asyncio.create_task(bench.ask("stays"))
            await until_waiting(bench, 2)
            late = await bench.ask("late", headers={"x-vcot-deadline-s": "0.05"})
            assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
            held_by_three = places.held_bytes
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)
            assert num_waiting(bench) == 1
            assert 0 < places.held_bytes < held_by_three
        await swap
        assert is_whole(await stays, bench)
        assert num_waiting(bench) == 0
        await bench.until_so(lambda: (places.taken, places.in_flight, places.held_bytes) == (0, 0, 0))


async def test_another_shape_lets_streams_end(bench: Bench) -> None:
    bench.registry.register(write_checkpoint(bench.directory / "wide", "wide", 3.0, shape=2))
    async with bench.running():
        async with Held(bench, stream=True) as held:
            swap = asyncio.create_task(bench.swap("policy", "wide"))
            await bench.until("draining")
            assert (await bench.ask("now", stream=True)).headers["x-vcot-checkpoint"] == "wide"
        assert is_whole(await held.answer, bench)
        await swap
