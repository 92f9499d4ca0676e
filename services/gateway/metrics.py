"""The gateway's figures, in Prometheus's text format.

Model: requests and swaps are counted as they end; what is true now (in flight, queued, the live checkpoint, restarts) is
read when Prometheus asks. Labels take values of ours only (routes, statuses, names in the registry), never a client's.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.gateway.engine import Engine
from services.gateway.exchange import Exchange
from services.gateway.limits import Places

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one gateway; mutated on its event loop only."""

    def __init__(self, engine: Engine, places: Places) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "vcot_requests", "Requests that ended.", ("route", "status", "checkpoint"), registry=self._registry
        )
        self._refused = Counter(
            "vcot_refused", "Requests that the gateway refused.", ("reason",), registry=self._registry
        )
        self._latency = self._histogram("vcot_request_seconds", "From a request's arrival to its answer's end.")
        self._first_byte = self._histogram("vcot_first_byte_seconds", "From a request's arrival to its answer's begin.")
        self._swaps = Counter("vcot_swaps", "Swaps, by how they ended.", ("outcome",), registry=self._registry)
        self._pause = Histogram(
            "vcot_swap_pause_seconds", "How long a swap held requests up.", buckets=_SECONDS, registry=self._registry
        )
        self._registry.register(_Now(engine, places))

    def count(self, route: str, status: int, exchange: Exchange, total_s: float) -> None:
        """A request is over."""
        self._requests.labels(route, str(status), exchange.checkpoint).inc()
        if exchange.refused:
            self._refused.labels(exchange.refused).inc()
        if exchange.checkpoint and exchange.first_byte is not None:
            self._latency.labels(exchange.checkpoint).observe(total_s)
            self._first_byte.labels(exchange.checkpoint).observe(exchange.first_byte - exchange.began)

    def count_swap(self, outcome: str, pause_s: float | None = None) -> None:
        """A swap is over: `swapped`, `unchanged`, or the name of the error that kept it from happening."""
        self._swaps.labels(outcome).inc()
        if pause_s is not None:
            self._pause.observe(pause_s)

    def render(self) -> bytes:
        """What Prometheus reads."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, ("checkpoint",), buckets=_SECONDS, registry=self._registry)


class _Now(Collector):
    """What is true when it is asked."""

    def __init__(self, engine: Engine, places: Places) -> None:
        self._engine = engine
        self._places = places

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("vcot_in_flight", "Requests that hold a slot.", self._places.in_flight)
        yield GaugeMetricFamily("vcot_queued", "Requests that wait for a slot.", self._places.queued)
        yield CounterMetricFamily(
            "vcot_engine_restarts", "Times that vLLM was started again.", self._engine.num_restarts
        )
        info = GaugeMetricFamily("vcot_checkpoint_info", "The live checkpoint.", labels=("name", "digest"))
        live = self._engine.gate.admission.checkpoint
        if live is not None:
            info.add_metric((live.ref.name, live.ref.digest), 1)
        yield info
