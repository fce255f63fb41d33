"""The scheduler's statistics as metrics by Prometheus' conventions, on Triton's endpoint or the gateway's."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from runtime.serving.scheduler import Scheduler
from runtime.serving.statistics import OUTCOMES, RequestRecord
from runtime.serving.worker import Worker

BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 180.0)
"""Upper limits of the histograms' buckets, in seconds."""
KINDS = ("draw", "ask")
HISTOGRAMS = {
    "request": "From submission to the last response, of requests that finished",
    "queue": "From submission to the first run of an engine",
    "first_event": "From submission to the first step or text",
}
COUNTERS = {
    "requests": "Requests by kind and outcome",
    "steps": "Steps of images by expert group",
    "batches": "Runs of experts by images in the batch",
    "tokens": "Tokens of answers",
    "busy_seconds": "Time in engines by station",
}
GAUGES = {
    "pending_images": "Images in the queue or being drawn",
    "pending_questions": "Questions in the queue or being answered",
    "open_requests": "Requests that were not told their end",
    "heartbeat_timestamp_seconds": "When the service last began or waited for a run of an engine",
    "last_image_timestamp_seconds": "When the last image was drawn",
}


KeyT = TypeVar("KeyT")


class Metrics:
    """Counters, gauges and histograms whose names begin with `latte_flow_`.

    Args:
        families: Triton's `MetricFamily`, or `runtime.gateway.metrics.Families`, which has its form.
        groups: number of expert groups.
    """

    def __init__(self, families: Any, groups: int) -> None:
        self._counters = {
            name: families(name=f"latte_flow_{name}_total", description=about, kind=families.COUNTER)
            for name, about in COUNTERS.items()
        }
        self._gauge_families = {
            name: families(name=f"latte_flow_{name}", description=about, kind=families.GAUGE)
            for name, about in GAUGES.items()
        }
        self._gauges = {name: family.Metric(labels={}) for name, family in self._gauge_families.items()}
        self._histogram_families = {
            name: families(name=f"latte_flow_{name}_seconds", description=about, kind=families.HISTOGRAM)
            for name, about in HISTOGRAMS.items()
        }
        self._histograms = {
            (name, kind): family.Metric(labels={"kind": kind}, buckets=list(BUCKETS))
            for name, family in self._histogram_families.items()
            for kind in KINDS
        }
        self._totals: dict[tuple[str, tuple[tuple[str, str], ...]], tuple[Any, float]] = {}
        """Each counter with its current value, since reading it is a round trip to the server."""
        for group in range(groups):
            self._count("steps", 0, group=str(group))
        for kind in KINDS:
            for outcome in OUTCOMES:
                self._count("requests", 0, kind=kind, outcome=outcome)
        self._count("tokens", 0)

    def update(self, schedulers: Sequence[Scheduler], workers: Sequence[Worker], open_requests: int) -> None:
        """Reports what has changed, of all schedulers together.

        Args:
            open_requests: number of requests that were not told their end.
        """
        all_statistics = [scheduler.statistics for scheduler in schedulers]
        for (kind, outcome), requests in _sums([each.ended for each in all_statistics]).items():
            self._count("requests", requests, kind=kind, outcome=outcome)
        for group, steps in _sums([each.steps_of_group for each in all_statistics]).items():
            self._count("steps", steps, group=str(group))
        for size, runs in _sums([each.batch_sizes for each in all_statistics]).items():
            self._count("batches", runs, images=str(size))
        for station, seconds in _sums([each.busy_seconds for each in all_statistics]).items():
            self._count("busy_seconds", seconds, station=station)
        self._count("tokens", sum(each.tokens for each in all_statistics))
        for statistics in all_statistics:
            while statistics.records:
                self._observe(statistics.records.popleft())
        self._gauges["pending_images"].set(sum(scheduler.pending for scheduler in schedulers))
        self._gauges["pending_questions"].set(sum(scheduler.pending_questions for scheduler in schedulers))
        self._gauges["open_requests"].set(open_requests)
        oldest = max(worker.seconds_since_heartbeat for worker in workers)
        self._gauges["heartbeat_timestamp_seconds"].set(time.time() - oldest)
        self._gauges["last_image_timestamp_seconds"].set(max(each.last_image_time for each in all_statistics))

    def _observe(self, record: RequestRecord) -> None:
        values = {
            "request": record.seconds if record.outcome == "finished" else None,
            "queue": record.queue_seconds,
            "first_event": record.first_event_seconds,
        }
        for name, seconds in values.items():
            if seconds is not None:
                self._histograms[name, record.kind].observe(seconds)

    def _count(self, name: str, total: float, **labels: str) -> None:
        key = (name, tuple(labels.items()))
        if key not in self._totals:
            self._totals[key] = (self._counters[name].Metric(labels=labels), 0.0)
        metric, reported = self._totals[key]
        if total > reported:
            metric.increment(total - reported)
            self._totals[key] = (metric, total)


def _sums(counts: Sequence[Mapping[KeyT, float]]) -> dict[KeyT, float]:
    """Adds up what several schedulers count, which may count on meanwhile."""
    total: defaultdict[KeyT, float] = defaultdict(float)
    for each in counts:
        for key, value in list(each.items()):
            total[key] += value
    return total
