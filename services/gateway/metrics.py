"""The gateway's figures, in Prometheus's text format.

Model: requests and swaps are counted as they end; what is true now (in flight, queued, the replicas, what they serve)
is read when Prometheus asks. Labels take values of ours only (routes, statuses, names of replicas and checkpoints),
never a client's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, StateSetMetricFamily
from prometheus_client.registry import Collector

from services.gateway.breaker import BreakerState
from services.gateway.exchange import Exchange
from services.gateway.fleet import Fleet
from services.gateway.limits import Places

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one gateway; mutated on its event loop only."""

    def __init__(self, fleet: Fleet, places: Places) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "vcot_requests", "Requests that ended.", ("route", "status", "checkpoint"), registry=self._registry
        )
        self._refused = Counter(
            "vcot_refused", "Requests that the gateway refused.", ("reason",), registry=self._registry
        )
        self._latency = self._histogram("vcot_request_seconds", "From a request's arrival to its answer's end.")
        self._first_byte = self._histogram("vcot_first_byte_seconds", "From a request's arrival to its answer's begin.")
        self._swaps = Counter("vcot_swaps", "Swaps, by how they ended.", ("way", "outcome"), registry=self._registry)
        self._faults = Counter(
            "vcot_engine_faults", "Requests that an engine failed.", ("replica", "reason"), registry=self._registry
        )
        self._retries = Counter(
            "vcot_retries", "Requests sent to another replica.", ("reason",), registry=self._registry
        )
        self._pause = Histogram(
            "vcot_swap_pause_seconds", "How long a swap held requests up.", buckets=_SECONDS, registry=self._registry
        )
        self._registry.register(_Now(fleet, places))

    def count(self, route: str, status: int, exchange: Exchange, total_s: float) -> None:
        """A request is over."""
        self._requests.labels(route, str(status), exchange.checkpoint).inc()
        if exchange.refused:
            self._refused.labels(exchange.refused).inc()
        if exchange.checkpoint and exchange.first_byte is not None:
            self._latency.labels(exchange.checkpoint).observe(total_s)
            self._first_byte.labels(exchange.checkpoint).observe(exchange.first_byte - exchange.began)

    def count_swap(self, way: str, outcome: str, pause_s: float | None = None) -> None:
        """A swap is over: `swapped`, `unchanged`, or the name of the error that kept it from happening (and no way)."""
        self._swaps.labels(way, outcome).inc()
        if pause_s is not None:
            self._pause.observe(pause_s)

    def count_fault(self, replica: str, reason: str) -> None:
        """An engine failed a request."""
        self._faults.labels(replica, reason).inc()

    def count_retry(self, reason: str) -> None:
        """The request went on to another."""
        self._retries.labels(reason).inc()

    def render(self) -> bytes:
        """What Prometheus reads."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, ("checkpoint",), buckets=_SECONDS, registry=self._registry)


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
