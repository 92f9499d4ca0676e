"""Which replica is asked, when it is given up for a while, and when it counts as down: pure, with a clock of our own."""

from collections import Counter
from dataclasses import dataclass

from vcot.services.gateway.fleet.breaker import Breaker
from vcot.services.gateway.fleet.health import Health
from vcot.services.gateway.fleet.routing import choose, image_key
from vcot.services.gateway.fleet.upstream import Pulse, parse_pulse


@dataclass
class Candidate:
    name: str
    in_flight: int = 0


def candidates(count: int) -> list[Candidate]:
    return [Candidate(f"vllm-{number}") for number in range(count)]


def test_an_image_keeps_its_replica_and_images_are_spread() -> None:
    three = candidates(3)
    chosen = {key: choose(three, key).name for key in range(3000)}
    assert chosen == {key: choose(three[::-1], key).name for key in range(3000)}
    assert all(900 < count < 1100 for count in Counter(chosen.values()).values())


def test_only_the_images_of_a_replica_that_went_move() -> None:
    three = candidates(3)
    for key in range(300):
        before = choose(three, key)
        after = choose(three[:2], key)
        assert before is after or before is three[2]


def test_no_replica_has_more_than_its_share_of_one_image() -> None:
    four = candidates(4)
    for _ in range(100):
        choose(four, 7).in_flight += 1
    assert max(candidate.in_flight for candidate in four) <= 1.25 * 101 / 4 + 1
    assert min(candidate.in_flight for candidate in four) > 0


def test_without_an_image_the_least_loaded_is_asked() -> None:
    assert choose([Candidate("a", 3), Candidate("b", 1), Candidate("c", 2)], None).name == "b"


def test_the_key_is_the_first_images() -> None:
    def request(*urls: str) -> dict[str, object]:
        return {
            "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": u}} for u in urls]}]
        }

    assert image_key(request("data:a", "data:b")) == image_key(request("data:a"))
    assert image_key(request("data:a")) != image_key(request("data:b"))
    assert image_key(request("x" * 9000 + "tail")) != image_key(request("x" * 9001 + "tail"))
    for none in ({}, {"messages": 3}, {"messages": ["x", {"content": ["y", {"image_url": 3}]}]}, {"prompt": "text"}):
        assert image_key(none) is None


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def cooldown_of(breaker: Breaker, clock: Clock) -> float:
    """How long it stays open; the clock stands at that time afterwards."""
    began = clock.now
    while breaker.state == "open":
        assert not breaker.allows
        clock.now += 0.5
    return clock.now - began


def test_a_breaker_opens_after_failures_in_a_row_only() -> None:
    breaker = Breaker(max_failures=3, clock=Clock())
    for outcome in (breaker.fail, breaker.fail, breaker.succeed, breaker.fail, breaker.fail, breaker.abandon):
        breaker.begin()
        outcome()
    assert (breaker.state, breaker.allows) == ("closed", True)
    breaker.fail()
    assert (breaker.state, breaker.allows) == ("open", False)


def test_a_breaker_tries_one_request_then_closes_or_waits_twice_as_long() -> None:
    clock = Clock()
    breaker = Breaker(max_failures=1, max_cooldown_s=3.0, clock=clock)
    breaker.fail()
    for cooldown_s in (1.0, 2.0, 3.0, 3.0):
        assert cooldown_of(breaker, clock) == cooldown_s
        assert (breaker.state, breaker.allows) == ("half-open", True)
        breaker.begin()
        assert not breaker.allows  # the trial is on
        breaker.fail()
    cooldown_of(breaker, clock)
    breaker.begin()
    breaker.abandon()  # its client hung up: the next may try
    assert breaker.allows
    breaker.begin()
    breaker.succeed()
    breaker.fail()
    assert cooldown_of(breaker, clock) == 1.0  # as at first


def test_a_late_failure_of_another_request_after_a_good_trial_counts_as_the_first_of_a_row() -> None:
    breaker = Breaker(max_failures=2, clock=(clock := Clock()))
    breaker.fail()
    breaker.fail()
    cooldown_of(breaker, clock)
    breaker.begin()
    breaker.succeed()
    breaker.fail()
    assert breaker.state == "closed"


def test_a_request_from_before_the_breaker_opened_does_not_extend_it() -> None:
    breaker = Breaker(max_failures=1, clock=(clock := Clock()))
    breaker.fail()
    clock.now += 0.5
    breaker.fail()
    assert cooldown_of(breaker, clock) == 0.5


def pulse(num_tokens: float | None, started: bytes = b"1") -> Pulse:
    return Pulse(started, num_tokens)


def test_a_server_hangs_when_requests_are_in_flight_and_no_token_is_made() -> None:
    health = Health(hang_timeout_s=10)
    assert health.fault(0, 2, pulse(5)) is None
    assert health.fault(9, 2, pulse(5)) is None
    assert health.fault(10, 2, pulse(5)) == "made no token in 10 s with 2 requests in flight"


def test_tokens_an_idle_time_or_no_counters_are_no_hang() -> None:
    health = Health(hang_timeout_s=10)
    for now, in_flight, tokens in ((0, 1, 5), (9, 1, 6), (18, 0, 6), (27, 1, 6), (36, 1, 7)):
        assert health.fault(now, in_flight, pulse(tokens)) is None
    blind = Health(hang_timeout_s=10)
    assert [blind.fault(now, 1, pulse(None)) for now in (0, 50)] == [None, None]


def test_silence_counts_when_it_lasts() -> None:
    health = Health(hang_timeout_s=10)
    answers = [None, None, pulse(1), None, None, None]
    faults = [health.fault(now, 0, answer) for now, answer in enumerate(answers)]
    assert faults[:-1] == [None] * 5
    assert "3 times in a row" in str(faults[-1])


def test_another_process_is_another_server() -> None:
    health = Health(hang_timeout_s=10)
    assert health.fault(0, 0, pulse(9)) is None
    assert health.fault(1, 0, pulse(9, started=b"2")) == "was started anew by someone else"


def test_a_pulse_is_read_from_vllms_metrics() -> None:
    text = (
        b"# TYPE process_start_time_seconds gauge\nprocess_start_time_seconds 1.79e+09\n"
        b'vllm:prompt_tokens_total{engine="0",model_name="vcot"} 40.0\nvllm:prompt_tokens_created{engine="0"} 1.7e9\n'
        b'vllm:generation_tokens_total{engine="0",model_name="vcot"} 2.0\nvllm:generation_tokens_total{engine="1"} 1.0\n'
    )
    assert parse_pulse(text) == Pulse(b"1.79e+09", 43.0)
    assert parse_pulse(b"") == Pulse(None, None)
