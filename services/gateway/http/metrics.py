"""The gateway's figures, in Prometheus's text format.

Model: requests, faults and swaps are counted as they end, in plain numbers, since prometheus_client's own counters take a
lock and a look-up each; what is true now (in flight, queued, the replicas, what they serve) is read when Prometheus asks.
Labels take values of ours only (routes, statuses, names of replicas and checkpoints), never a client's.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import get_args

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    StateSetMetricFamily,
)
from prometheus_client.registry import Collector

from vcot.services.gateway.fleet.breaker import BreakerState
from vcot.services.gateway.fleet.group import Fleet
from vcot.services.gateway.http.exchange import Ended
from vcot.services.gateway.http.limits import Places

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

_Counts = Counter[tuple[str, ...]]
"""By the values of the labels."""


class _Histogram:
    """How many fell into each bucket of `_SECONDS`, and their sum."""

    def __init__(self) -> None:
        self.counts = [0] * (len(_SECONDS) + 1)
        self.sum_s = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(_SECONDS, seconds)] += 1
        self.sum_s += seconds

    @property
    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative, as Prometheus has them."""
        bounds = [*map(repr, map(float, _SECONDS)), "+Inf"]
        return list(zip(bounds, map(float, accumulate(self.counts)), strict=True))


class Metrics(Collector):
    """Counters of one gateway; mutated on its event loop only."""

    def __init__(self, fleet: Fleet, places: Places) -> None:
        self._requests: _Counts = Counter()
        self._refused: _Counts = Counter()
        self._faults: _Counts = Counter()
        self._retries: _Counts = Counter()
        self._swaps: _Counts = Counter()
        self._latency: defaultdict[str, _Histogram] = defaultdict(_Histogram)
        self._first_byte: defaultdict[str, _Histogram] = defaultdict(_Histogram)
        self._pause = _Histogram()
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._registry.register(_Now(fleet, places))

    def count(self, ended: Ended) -> None:
        """A request is over."""
        self._requests[ended.route, str(ended.status), ended.checkpoint] += 1
        if ended.refused:
            self._refused[(ended.refused,)] += 1
        if ended.checkpoint and not ended.refused and ended.first_byte_s is not None:  # a refusal names what is live
            self._latency[ended.checkpoint].observe(ended.total_s)
            self._first_byte[ended.checkpoint].observe(ended.first_byte_s)

    def count_swap(self, way: str, outcome: str, pause_s: float | None = None) -> None:
        """A swap is over: `swapped`, `tried`, `unchanged`, or the error that kept it from happening (and no way)."""
        self._swaps[way, outcome] += 1
        if pause_s is not None:
            self._pause.observe(pause_s)

    def count_fault(self, replica: str, reason: str) -> None:
        """An engine failed a request."""
        self._faults[replica, reason] += 1

    def count_retry(self, reason: str) -> None:
        """The request went on to another."""
        self._retries[(reason,)] += 1

    def render(self) -> bytes:
        """What Prometheus reads."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """What was counted."""
        yield _counter("vcot_requests", "Requests that ended.", ("route", "status", "checkpoint"), self._requests)
        yield _counter("vcot_refused", "Requests that the gateway refused.", ("reason",), self._refused)
        yield _histogram("vcot_request_seconds", "From a request's arrival to its answer's end.", self._latency)
        yield _histogram("vcot_first_byte_seconds", "From a request's arrival to its answer's begin.", self._first_byte)
        yield _counter("vcot_swaps", "Swaps, by how they ended.", ("way", "outcome"), self._swaps)
        yield _counter("vcot_engine_faults", "Requests that an engine failed.", ("replica", "reason"), self._faults)
        yield _counter("vcot_retries", "Requests sent to another replica.", ("reason",), self._retries)
        pause = HistogramMetricFamily("vcot_swap_pause_seconds", "How long a swap held requests up.")
        pause.add_metric((), self._pause.buckets, self._pause.sum_s)
        yield pause


def _counter(name: str, text: str, labels: tuple[str, ...], counts: _Counts) -> Metric:
    family = CounterMetricFamily(name, text, labels=labels)
    for values, count in counts.items():
        family.add_metric(values, count)
    return family


def _histogram(name: str, text: str, histograms: Mapping[str, _Histogram]) -> Metric:
    family = HistogramMetricFamily(name, text, labels=("checkpoint",))
    for checkpoint, histogram in histograms.items():
        family.add_metric((checkpoint,), histogram.buckets, histogram.sum_s)
    return family


class _Now(Collector):
    """What is true when it is asked."""

    def __init__(self, fleet: Fleet, places: Places) -> None:
        self._fleet = fleet
        self._places = places

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("vcot_in_flight", "Requests that hold a slot.", self._places.in_flight)
        yield GaugeMetricFamily("vcot_queued", "Requests that wait for a slot.", self._places.queued)
        restarts = CounterMetricFamily(
            "vcot_engine_restarts", "Times a replica's server was started again.", labels=("replica",)
        )
        in_flight = GaugeMetricFamily(
            "vcot_replica_in_flight", "Requests that a replica works on.", labels=("replica",)
        )
        up = GaugeMetricFamily("vcot_replica_up", "Whether a replica takes requests.", labels=("replica",))
        breaker = StateSetMetricFamily("vcot_breaker", "A replica's circuit breaker.", labels=("replica",))
        for replica in self._fleet.replicas:
            restarts.add_metric((replica.name,), replica.num_restarts)
            in_flight.add_metric((replica.name,), replica.in_flight)
            up.add_metric((replica.name,), replica.gate.admission.phase == "live")
            breaker.add_metric(
                (replica.name,), {state: replica.breaker.state == state for state in get_args(BreakerState)}
            )
        yield from (restarts, in_flight, up, breaker)
        info = GaugeMetricFamily("vcot_checkpoint_info", "What can be asked for.", labels=("name", "digest"))
        for checkpoint in self._fleet.served():
            info.add_metric((checkpoint.ref.name, checkpoint.ref.digest), 1)
        yield info
