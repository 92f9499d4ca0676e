import asyncio
import random

import pytest

from vcot.pipeline.concurrency import MAX_ATTEMPTS, MAX_PATIENCE_S, map_bounded, retry_delay_s, with_retry
from vcot.pipeline.errors import RequestError


async def test_at_most_limit_run_and_items_are_drawn_when_there_is_room():
    running = peak = drawn = 0

    def items():
        nonlocal drawn
        for i in range(50):
            drawn += 1
            assert drawn - finished <= 4
            yield i

    finished = 0

    async def work(i):
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        await asyncio.sleep(0)
        running -= 1
        return i

    results = []
    async for result in map_bounded(work, items(), limit=4):
        finished += 1
        results.append(result)
    assert sorted(results) == list(range(50))
    assert peak == 4


async def test_the_first_exception_cancels_the_others():
    cancelled = []

    async def work(i):
        if i == 2:
            raise RuntimeError("two")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(i)
            raise

    with pytest.raises(RuntimeError, match="two"):
        async for _ in map_bounded(work, range(4), limit=4):
            pass
    assert sorted(cancelled) == [0, 1, 3]


async def fail_n_times(n, error, slept):
    calls = 0

    async def call():
        nonlocal calls
        calls += 1
        if calls <= n:
            raise error
        return calls

    async def sleep(seconds):
        slept.append(seconds)

    return await with_retry(call, sleep=sleep, rng=random.Random(0))


async def test_a_retryable_error_is_retried_until_it_goes():
    slept = []
    assert await fail_n_times(3, RequestError("busy", scope="attempt", reason="overloaded"), slept) == 4
    assert len(slept) == 3


async def test_retries_end():
    slept = []
    with pytest.raises(RequestError):
        await fail_n_times(99, RequestError("busy", scope="attempt", reason="overloaded"), slept)
    assert len(slept) == MAX_ATTEMPTS - 1


async def test_a_429_with_the_servers_wish_is_no_attempt_but_patience_ends():
    busy = RequestError("busy", scope="attempt", reason="rate_limit", retry_after_s=10.0)
    slept = []
    assert await fail_n_times(4 * MAX_ATTEMPTS, busy, slept) == 4 * MAX_ATTEMPTS + 1
    assert min(slept) >= 10
    slept.clear()
    with pytest.raises(RequestError):
        await fail_n_times(999, busy, slept)
    assert len(slept) == MAX_PATIENCE_S / 10


async def test_a_final_error_is_not_retried():
    slept = []
    with pytest.raises(RequestError):
        await fail_n_times(1, RequestError("bad request", scope="item", reason="bad_request"), slept)
    assert slept == []


def test_the_servers_wish_is_kept_and_never_undercut():
    delays = [retry_delay_s(1, 4.0, random.Random(seed)) for seed in range(50)]
    assert min(delays) >= 4.0
    assert max(delays) <= 5.0
    assert len(set(delays)) == 50


def test_backoff_grows_and_is_bounded():
    delays = [max(retry_delay_s(attempt, None, random.Random(s)) for s in range(100)) for attempt in range(1, 12)]
    assert delays == sorted(delays) or max(delays) <= 30.0
    assert delays[0] <= 1.0
    assert max(delays) <= 30.0


async def test_a_limit_may_rise_and_fall_meanwhile():
    running, seen, limit = 0, [], 2

    async def work(i):
        nonlocal running, limit
        running += 1
        seen.append(running)
        await asyncio.sleep(0.001)
        running -= 1
        limit = 5 if i < 30 else 1

    results = [result async for result in map_bounded(work, range(60), limit=lambda: limit)]
    assert len(results) == 60
    assert (seen[:2], max(seen), seen[-10:]) == ([1, 2], 5, [1] * 10)
