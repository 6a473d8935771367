"""What Prometheus reads: the engine's own metrics, and what clients saw of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from ..engine import Engine

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
MEANING = "As Engine.metrics() says of this field."


class Record:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_OfEngine(engine))
        own: dict[str, Any] = {"registry": self._registry}
        self._answers = Counter("skipjack_http_requests", "Answers by address and status.", ("path", "status"), **own)
        self._seconds = Histogram(
            "skipjack_http_request_seconds",
            "From a request to the end of its answer.",
            ("path",),
            buckets=SECONDS,
            **own,
        )
        self._first = Histogram(
            "skipjack_first_token_seconds", "From a request to its first tokens.", buckets=SECONDS, **own
        )

    def answered(self, path: str, status: int, seconds: float) -> None:
        """An answer has ended; its status is 499 where the client left before it began."""
        self._answers.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def began(self, seconds: float) -> None:
        """A request has its first tokens."""
        self._first.observe(seconds)

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)


class _OfEngine(Collector):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        metrics = self._engine.metrics()
        for name, value in metrics.counters.items():
            yield CounterMetricFamily(f"skipjack_{name}", MEANING, value)
        for name, value in metrics.gauges.items():
            yield GaugeMetricFamily(f"skipjack_{name}", MEANING, value)
