"""Metrics of the gateway for Prometheus, and those of the scheduler behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from runtime.serving.metrics import BUCKETS


class Gauges:
    """What the gateway counts itself."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("route", "status")
        self.requests = Counter(
            "latte_flow_gateway_requests", "HTTP requests by route and status", labels, registry=self.registry
        )
        self.seconds = Histogram(
            "latte_flow_gateway_request_seconds",
            "From the first byte to the last, by route",
            ("route",),
            buckets=BUCKETS,
            registry=self.registry,
        )
        self.open = Gauge("latte_flow_gateway_open_requests", "HTTP requests in flight", registry=self.registry)

    def text(self) -> bytes:
        """Returns all metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class Families:
    """Makes metrics on Prometheus' client; it has the form of the `MetricFamily` of Triton's Python backend."""

    COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def __call__(self, name: str, description: str, kind: str) -> _Family:
        """Returns a family of metrics."""
        makers: dict[str, Any] = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}
        return _Family(makers[kind], name, description, self._registry)


class _Family:
    def __init__(self, make: Any, name: str, description: str, registry: CollectorRegistry) -> None:
        self._make, self._name, self._description, self._registry = make, name, description, registry
        self._metric: Any = None

    def Metric(self, labels: dict[str, str], buckets: Sequence[float] | None = None) -> Any:
        """Returns the metric of these labels; the first call decides which names they have."""
        if self._metric is None:
            options: dict[str, Any] = {} if buckets is None else {"buckets": buckets}
            self._metric = self._make(self._name, self._description, tuple(labels), registry=self._registry, **options)
        metric = self._metric.labels(**labels) if labels else self._metric
        return _Counter(metric) if isinstance(metric, Counter) else metric


class _Counter:
    def __init__(self, metric: Any) -> None:
        self._metric = metric

    def increment(self, amount: float) -> None:
        self._metric.inc(amount)
