"""A request that ends engines ends three of them and no more, and those that were there by chance are answered."""

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import httpx
import pytest

from tests.services.bench_fleet import Bench
from vcot.services.gateway.fleet.replica import Supervision
from vcot.services.gateway.http.answers import Refusal
from vcot.services.gateway.http.suspects import Key, Suspects, hash_of

pytestmark = pytest.mark.usefixtures("split_too")


def killer() -> bytes:
    """The key of one body."""
    return hash_of(b"killer")


def other() -> bytes:
    """And of another."""
    return hash_of(b"other")


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Bench]:
    """Two replicas whose servers die of `kill`, each time that it comes."""
    bench = Bench(tmp_path, replicas=2)
    bench.prepare = lambda server: server.odd.update(kill="kill")
    async with bench.running():
        yield bench


async def settle(bench: Bench) -> None:
    for replica in bench.fleet.replicas:
        await bench.until("live", replica)


def num_deaths(bench: Bench) -> int:
    return sum(server.died.is_set() for server in bench.servers)


async def ask_until_refused(bench: Bench, stream: bool = False) -> httpx.Response:
    """What a client is told that sends the request again wherever it may."""
    for _ in range(9):
        answer = await bench.ask("kill", stream=stream)
        await settle(bench)
        if answer.status_code != 502:
            break
    return answer


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_ends_engines_ends_three_and_no_more(pair: Bench, stream: bool) -> None:
    refused = await ask_until_refused(pair, stream)
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "engines_died")
    assert "3 engines died" in refused.json()["error"]["message"]
    assert "retry-after" not in refused.headers, "no client sends it again by itself"
    assert num_deaths(pair) == 3
    assert [(await pair.ask("kill", stream=stream)).status_code for _ in range(4)] == [422] * 4
    assert num_deaths(pair) == 3
    assert (await pair.ask("hello")).status_code == 200


async def test_who_was_there_when_engines_died_is_answered(pair: Bench) -> None:
    """Two requests are with the one that ends engines each time, and only that one is refused."""
    for number in (0, 1):
        pair.server_of(number).hold.clear()
    held = [asyncio.create_task(pair.ask(f"hold {number}")) for number in range(4)]
    await asyncio.gather(*(pair.server_of(number).holding.wait() for number in (0, 1)))
    assert (await ask_until_refused(pair)).status_code == 422
    await asyncio.gather(*held)
    assert [(await pair.ask(f"hold {number}")).status_code for number in range(4)] == [200] * 4


async def test_an_engine_that_was_dead_already_is_held_against_nobody(tmp_path: Path) -> None:
    bench = Bench(tmp_path, supervision=Supervision(first_backoff_s=0.0, health_interval_s=60.0, lease_s=360.0))
    async with bench.running():
        for _ in range(4):
            assert (await bench.ask("another")).status_code == 200
            await asyncio.sleep(0.1)  # the first look at its health is over, and the next one is far
            await bench.server.stop()
            assert (await bench.ask()).status_code in (502, 503)
            bench.server.died.set()
            await bench.until("dead")
            await bench.until("live")
        assert (await bench.ask()).status_code == 200


def blamed(suspects: Suspects, key: Key, *lives: str) -> None:
    for life in lives:
        suspects.blame(key, life)


async def test_one_death_counts_once() -> None:
    suspects = Suspects()
    blamed(suspects, killer, *["vllm-0/0"] * 9, "vllm-0/1")
    suspects.check(killer)
    blamed(suspects, killer, "vllm-1/0")
    with pytest.raises(Refusal, match="so it is refused for 10 minutes"):
        suspects.check(killer)
    suspects.check(other)


async def test_an_answer_clears_a_request() -> None:
    suspects = Suspects()
    blamed(suspects, killer, "a", "b")
    suspects.forget(killer)
    blamed(suspects, killer, "c", "d")
    suspects.check(killer)


async def test_it_is_forgotten_after_ten_minutes() -> None:
    now = 0.0
    suspects = Suspects(lambda: now)
    blamed(suspects, other, "a", "b", "c")
    now = 500.0
    blamed(suspects, killer, "a", "b", "c")
    now = 601.0
    suspects.check(other)
    with pytest.raises(Refusal):
        suspects.check(killer)


async def test_so_many_are_remembered_and_no_more() -> None:
    suspects = Suspects()
    blamed(suspects, killer, "a", "b", "c")
    for number in range(4_096):
        suspects.blame(partial(hash_of, b"%d" % number), "a")
    suspects.check(killer)


async def test_suspects_are_asked_one_at_a_time_and_nobody_else_waits_for_them() -> None:
    suspects = Suspects()
    for key in (killer, other):
        blamed(suspects, key, "a", "b")
    waiting = asyncio.Event()

    async def ask_other() -> None:
        waiting.set()
        async with suspects.in_turn(other):
            suspects.forget(other)

    async with suspects.in_turn(killer):
        asked = asyncio.create_task(ask_other())
        await waiting.wait()
        await asyncio.sleep(0)
        assert not asked.done()
        async with suspects.in_turn(partial(hash_of, b"hello")):
            suspects.blame(killer, "c")
    await asked
    with pytest.raises(Refusal):
        async with suspects.in_turn(killer):
            raise AssertionError
