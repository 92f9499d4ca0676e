"""The controller against simulated servers, each with a knee beyond which more requests only wait longer."""

import heapq
import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vcot.pipeline.saturation import GROWTH, Saturation


class Server:
    """Answers in `base` seconds up to `knee` at once; beyond, a request waits its share. Times vary by `spread`."""

    def __init__(self, knee, base=1.0, spread=0.0, room=None, seed=0):
        self.knee, self.base, self.spread, self.room = knee, base, spread, room
        self.rng = random.Random(seed)
        self.now, self.running, self.peak, self.num_refused = 0.0, [], 0, 0

    def best(self, ceiling):
        return min(self.knee, ceiling) / self.base

    def run(self, saturation, num):
        """Keep it as full as the controller says until `num` were answered; answers a second over the second half."""
        ended = []
        while len(ended) < num:
            while len(self.running) < saturation.limit:
                if self.room is not None and len(self.running) >= self.room:
                    self.num_refused += 1
                    saturation.shrink(self.now, self.now)
                    break
                load = max(1.0, (len(self.running) + 1) / self.knee)
                took = self.base * load * self.rng.uniform(1 - self.spread, 1 + self.spread)
                heapq.heappush(self.running, (self.now + took, self.now))
            self.peak = max(self.peak, len(self.running))
            end, began = heapq.heappop(self.running)
            self.now = max(self.now, end)
            saturation.note(began, end)
            ended.append(end)
        half = num // 2
        return (num - half) / (ended[-1] - ended[half])


@settings(max_examples=60)
@given(
    knee=st.integers(1, 200), base=st.floats(0.05, 30), ceiling=st.integers(1, 512), first=st.sampled_from((8, 32, 64))
)
@example(knee=137, base=1.0, ceiling=171, first=8)  # a doubled limit that stops just below the knee
@example(knee=137, base=1.0, ceiling=229, first=8)
@example(knee=138, base=1.0, ceiling=258, first=8)
def test_it_finds_the_knee_and_holds_little_more(knee, base, ceiling, first):
    server, saturation = Server(knee, base), Saturation(ceiling, first)
    rate = server.run(saturation, 12_000)
    assert rate >= 0.9 * server.best(ceiling)
    assert server.peak <= min(ceiling, max(2 * first, 2.7 * knee + 2))


@pytest.mark.parametrize(("knee", "num", "share"), [(16, 200, 0.85), (32, 200, 0.6), (64, 200, 0.35), (64, 1_000, 0.7)])
def test_a_short_run_soon_has_what_the_server_can_take(knee, num, share):
    server = Server(knee, spread=0.3)
    server.run(Saturation(256), num)
    assert num / server.now >= share * server.best(256)


@settings(max_examples=40)
@given(knee=st.integers(8, 120), spread=st.floats(0, 0.3), seed=st.integers(0, 100))
def test_requests_that_differ_in_length_do_not_mislead_it(knee, spread, seed):
    server, saturation = Server(knee, spread=spread, seed=seed), Saturation(512)
    assert server.run(saturation, 12_000) >= 0.9 * server.best(512)
    assert server.peak <= 4 * knee


@settings(max_examples=40)
@given(before=st.integers(8, 100), after=st.integers(8, 100))
def test_it_follows_a_server_that_changes(before, after):
    server, saturation = Server(before), Saturation(512)
    server.run(saturation, 6_000)
    server.knee = after
    assert server.run(saturation, 20_000) >= 0.9 * server.best(512)
    assert saturation.limit <= GROWTH**2 * after + 2


@settings(max_examples=40)
@given(room=st.integers(1, 60))
def test_a_server_without_room_is_left_in_peace(room):
    server, saturation = Server(knee=500, room=room), Saturation(512)
    rate = server.run(saturation, 12_000)
    assert server.peak <= room
    assert server.num_refused < 12_000 * 0.05
    assert rate >= 0.6 * room


def test_a_burst_of_refusals_is_one():
    saturation = Saturation(64)
    for _ in range(8):
        saturation.shrink(began=1.0, now=2.0)
    assert saturation.limit == 5
    saturation.shrink(began=3.0, now=4.0)
    assert saturation.limit == 3
    for second in range(5, 20):
        saturation.shrink(began=second, now=second)
    assert saturation.limit == 1


def test_what_began_under_another_limit_is_no_measurement():
    saturation = Saturation(64)
    saturation.shrink(began=0.0, now=10.0)
    for _ in range(1000):
        saturation.note(began=9.0, ended=11.0)
    assert saturation.limit == 5
