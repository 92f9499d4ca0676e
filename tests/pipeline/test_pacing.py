"""Keeping to a provider's limits: the pure pacer, and the gate against the simulated API on a clock that jumps."""

import asyncio
import itertools

import httpx2
import pytest

from tests.rehearsal.openai_api import Settings, create_app
from vcot.pipeline.client import ChatClient, user_message
from vcot.pipeline.concurrency import map_bounded, with_retry
from vcot.pipeline.errors import RequestError
from vcot.pipeline.pacing import Gate, Pacer
from vcot.pipeline.records import SamplingParams

PARAMS = SamplingParams(temperature=0.0, max_tokens=100, seed=0)


class JumpingLoop(asyncio.SelectorEventLoop):
    """Its time jumps to the next timer as soon as there is nothing else to do."""

    now = 0.0

    def time(self):
        return self.now

    def _run_once(self):
        due = [handle.when() for handle in self._scheduled if not handle.cancelled()]
        if not self._ready and due:
            self.now = max(self.now, min(due))
        super()._run_once()


def run(coroutine):
    """Its result, and the seconds that it would have taken."""
    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        return runner.run(coroutine), runner.get_loop().time()


def headers(limit=60_000, remaining=60_000, reset="0s", what="tokens"):
    values = {"limit": limit, "remaining": remaining, "reset": reset}
    return {f"x-ratelimit-{name}-{what}": str(value) for name, value in values.items()}


def make_pacer(tokens=1000):
    pacer = Pacer()
    ticket = pacer.admit(0, 0.0)
    pacer.count(tokens)
    pacer.num_running -= 1
    return pacer, ticket


def test_before_the_first_answer_one_request_goes_alone():
    pacer = Pacer()
    assert pacer.wait_s(0, 0.0) == 0
    pacer.admit(0, 0.0)
    assert pacer.wait_s(0, 0.0) is None
    pacer.count(1000)
    assert pacer.wait_s(0, 0.0) == 0


def test_a_request_waits_until_its_tokens_are_there():
    pacer, ticket = make_pacer()
    pacer.learn(ticket, headers(limit=60_000, remaining=1500), 0.0)
    assert pacer.wait_s(0, 0.0) == 0
    pacer.admit(0, 0.0)
    assert pacer.wait_s(0, 0.0) == pytest.approx(0.5)  # 500 of 1,000 are left, and 1,000 a second come in
    assert pacer.wait_s(0, 0.5) == pytest.approx(0)
    assert pacer.wait_s(2000, 0.5) == pytest.approx(1)


def test_what_was_sent_since_is_not_counted_as_left():
    pacer, ticket = make_pacer()
    for _ in range(3):
        pacer.admit(0, 0.0)
    pacer.learn(ticket, headers(limit=60_000, remaining=3500), 0.0)
    assert pacer.wait_s(0, 0.0) == pytest.approx(0.5)


def test_requests_a_minute_are_a_limit_too():
    pacer, ticket = make_pacer()
    pacer.learn(ticket, headers(limit=60, remaining=0, what="requests"), 0.0)
    assert pacer.wait_s(0, 0.0) == pytest.approx(1)


def test_a_reset_of_hours_shows_a_limit_of_the_day():
    pacer, ticket = make_pacer()
    pacer.learn(ticket, headers(limit=200, remaining=0, reset="24h0m0s", what="requests"), 0.0)
    assert pacer.wait_s(0, 0.0) == pytest.approx(60 / 200)  # a day is no window that is believed
    pacer.learn(ticket, headers(limit=200, remaining=0, reset="2h0m0s", what="requests"), 0.0)
    assert pacer.wait_s(0, 0.0) == pytest.approx(36)


@pytest.mark.parametrize("wrong", [headers(limit=-1, remaining=-1), headers(limit="x"), headers(remaining="-inf"), {}])
def test_a_provider_that_tells_nothing_sets_no_pace(wrong):
    pacer, ticket = make_pacer()
    pacer.learn(ticket, wrong, 0.0)
    assert pacer.wait_s(0, 0.0) == 0


def test_a_request_larger_than_the_limit_goes_when_the_bucket_is_full():
    pacer, ticket = make_pacer(tokens=90_000)
    pacer.learn(ticket, headers(limit=60_000, remaining=30_000), 0.0)
    assert pacer.wait_s(0, 0.0) == pytest.approx(30)


async def ask_all(app, num_requests, gate, limit=16):
    transport = httpx2.ASGITransport(app=app)
    async with ChatClient(
        "http://openai/v1", "sk-rehearsal", max_connections=99, gate=gate, transport=transport
    ) as client:

        async def ask(number):
            message = user_message("word " * 1000 + f"Response: {number}")
            return await with_retry(lambda: client.complete("gpt-4o-mini", [message], PARAMS))

        return [answer async for answer in map_bounded(ask, range(num_requests), limit=limit)]


async def ask_simulated(num_requests, gate, **settings):
    clock = asyncio.get_running_loop().time
    app = create_app(Settings(latency_s=2.0, **settings), clock)
    answers = await ask_all(app, num_requests, gate)
    return len(answers), app.state.api.counts


@pytest.mark.parametrize("limits", [{"tokens_per_min": 60_000}, {"requests_per_min": 48}])
def test_a_stage_runs_at_the_pace_that_the_headers_tell(limits):
    (num_answers, counts), seconds = run(ask_simulated(200, Gate(), **limits))
    assert num_answers == counts["answers"] == 200
    assert counts["429 rate_limit_exceeded"] <= 3
    ideal = (200 * 1280 - 60_000) / 1000 if "tokens_per_min" in limits else (200 - 48) / 0.8
    assert ideal <= seconds <= 1.15 * ideal


def test_without_a_gate_the_same_stage_is_told_429_again_and_again():
    (num_answers, counts), _ = run(ask_simulated(200, None, tokens_per_min=60_000))
    assert num_answers == 200  # patience gets there, too
    assert counts["429 rate_limit_exceeded"] > 100


def test_a_429_with_the_servers_wish_pauses_all_and_uses_up_no_attempt():
    async def ask():
        told, asked_at = [], []

        async def upstream(request):
            now = asyncio.get_running_loop().time()
            asked_at.append(now)
            await asyncio.sleep(0.1)
            if len(told) < 20:
                told.append(now)
                return httpx2.Response(429, json={"error": {"message": "slow"}}, headers={"retry-after": "10"})
            return httpx2.Response(200, json=COMPLETION)

        await ask_all_from(httpx2.MockTransport(upstream))
        return asked_at

    asked_at, _ = run(ask())
    gaps = [late - early for early, late in itertools.pairwise(asked_at[:21])]
    assert min(gaps) >= 10  # one request shows that the pause is over; the others do not ask meanwhile
    assert len(asked_at) == 20 + 4


async def ask_all_from(transport):
    async with ChatClient("http://openai/v1", "k", max_connections=9, gate=Gate(), transport=transport) as client:

        async def ask(number):
            return await with_retry(lambda: client.complete("m", [user_message(str(number))], PARAMS))

        return [answer async for answer in map_bounded(ask, range(4), limit=4)]


COMPLETION = {
    "id": "x",
    "object": "chat.completion",
    "created": 0,
    "model": "m",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "fine"}}],
    "usage": {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6},
}


def test_a_server_that_always_asks_for_patience_is_given_up():
    async def upstream(request):
        return httpx2.Response(429, json={"error": {"message": "slow"}}, headers={"retry-after": "100"})

    with pytest.raises(RequestError, match="slow"):
        run(ask_all_from(httpx2.MockTransport(upstream)))


def test_a_fault_of_the_account_costs_one_request():
    async def ask():
        asked = []

        async def upstream(request):
            asked.append(request)
            await asyncio.sleep(1)
            return httpx2.Response(401, json={"error": {"message": "no", "code": "invalid_api_key"}})

        async def fail(client, number):
            with pytest.raises(RequestError):
                await client.complete("m", [user_message(str(number))], PARAMS)

        transport = httpx2.MockTransport(upstream)
        async with ChatClient("http://openai/v1", "k", max_connections=9, gate=Gate(), transport=transport) as client:
            await asyncio.gather(*(fail(client, number) for number in range(8)))
        return len(asked)

    assert run(ask())[0] == 1
