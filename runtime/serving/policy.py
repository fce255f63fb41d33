"""Policies, which decide what a scheduler runs next."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from runtime.serving.jobs import Job, Station

NEAREST_DEADLINE = 0.1
"""In seconds. A nearer deadline adds no more weight."""
SHORTEST_AGE = 1e-3
"""In seconds, so that priority matters among jobs that have just arrived."""
MaxRows = Callable[[Station], int]
"""Returns the largest number of rows in a batch of a station."""


class SchedulingPolicy(Protocol):
    """Decides which station runs next, and for which jobs."""

    def choose(self, waiting: dict[Station, list[Job]], now: float, max_rows: MaxRows) -> tuple[Station, list[Job]]:
        """Returns the station that runs next and its batch: at least one job, and several only within `max_rows`."""

    def observe(self, station: Station, rows: int, seconds: float) -> None:
        """Learns how long a run of an expert, of "prefill" or of "write" took."""


class RunCost:
    """The cost of a run, `fixed + rows * each`: a least-squares line through the latest runs."""

    MEMORY = 0.99
    """Weight of a run relative to the next one."""

    def __init__(self) -> None:
        self._sums = np.zeros(5)

    @property
    def is_known(self) -> bool:
        """Whether a run was observed."""
        return bool(self._sums[0])

    def observe(self, rows: int, seconds: float) -> None:
        """Adds a run."""
        self._sums = self.MEMORY * self._sums + (1, rows, rows * rows, seconds, rows * seconds)

    def __call__(self, rows: int) -> float:
        """Returns seconds; until two sizes were observed, they are proportional to `1 + rows`."""
        runs, of_rows, of_squares, of_seconds, of_products = self._sums
        if not runs:
            return 1.0 + rows
        spread = runs * of_squares - of_rows**2
        if spread <= 1e-6 * runs * of_squares:
            return float(of_seconds * (1.0 + rows) / (runs + of_rows)) or 1.0
        each = max(0.0, (runs * of_products - of_rows * of_seconds) / spread)
        fixed = max(0.0, (of_seconds - each * of_rows) / runs)
        return float(fixed + each * rows) or 1.0


class CostAwarePolicy:
    """Runs the station that relieves the most waiting per second of work.

    A job's weight is its age, divided among the jobs of its request or client, doubled by each level of priority, and
    increased as its deadline comes near. A station's batch takes the greatest weights first; the station whose batch
    has the greatest weight for its cost runs next (the cμ rule of queueing theory, with a waiting cost that grows
    with age). Where a batch costs hardly more than one image, large batches go first. Where it costs as much as its
    images would alone, old jobs go first, because newcomers at the first group would only delay jobs that are nearly
    finished. No job starves: its weight grows without bound, and no later job is older. docs/log.md has the
    measurements.
    """

    def __init__(self) -> None:
        self._costs = {kind: RunCost() for kind in ("expert", "prefill", "write")}

    def choose(self, waiting: dict[Station, list[Job]], now: float, max_rows: MaxRows) -> tuple[Station, list[Job]]:
        """Returns the station whose batch has the greatest weight for its cost, and that batch."""
        best: tuple[float, Station, list[Job]] | None = None
        for station, jobs in waiting.items():
            weight, batch = self._batch(jobs, now, max_rows(station))
            relief = weight / self._seconds(station, sum(job.rows for job in batch))
            if best is None or relief > best[0]:
                best = (relief, station, batch)
        assert best is not None
        return best[1:]

    def observe(self, station: Station, rows: int, seconds: float) -> None:
        """Learns how long a run of an expert, of "prefill" or of "write" took."""
        self._costs[_kind(station)].observe(rows, seconds)

    def _seconds(self, station: Station, rows: int) -> float:
        """Returns the expected time of a run; a kind that never ran is taken for the dearest that did."""
        own = self._costs[_kind(station)]
        known = [own] if own.is_known else [cost for cost in self._costs.values() if cost.is_known]
        return max(cost(rows) for cost in known or [own])

    def weight(self, job: Job, now: float) -> float:
        """Returns a job's weight."""
        age = now - job.arrived + SHORTEST_AGE
        hurry = 1 + 1 / max(job.expires - now, NEAREST_DEADLINE)
        return float(2.0**job.handle.request.priority * hurry * age / job.sharers)

    def _batch(self, jobs: list[Job], now: float, max_rows: int) -> tuple[float, list[Job]]:
        """Returns the jobs with the greatest weights that fit together, and the sum of their weights."""
        weighted = [(-self.weight(job, now), job.number, job) for job in jobs]
        batch: list[Job] = []
        rows, total = 0, 0.0
        for weight, _, job in heapq.nsmallest(max_rows, weighted):
            if batch and rows + job.rows > max_rows:
                break
            batch.append(job)
            rows += job.rows
            total -= weight
        return total, batch


@dataclass
class WholeRequestPolicy:
    """Takes jobs in together and lets nobody join until all of them are finished.

    With one place that is one job at a time; with more it is what a batcher around a whole pipeline does. The service
    does not use it: the benchmark and the tests compare `CostAwarePolicy` with it.
    """

    places: int
    _members: set[int] = field(default_factory=set)

    def choose(self, waiting: dict[Station, list[Job]], now: float, max_rows: MaxRows) -> tuple[Station, list[Job]]:
        """Returns the next station of the current jobs, or of new ones once those are finished."""
        jobs = [job for group in waiting.values() for job in group]
        if not self._members & {job.number for job in jobs}:
            places = min(self.places, max(1, min(map(max_rows, waiting)) // 2))
            self._members = {job.number for job in sorted(jobs, key=lambda job: job.number)[:places]}
        ours = {station: [job for job in group if job.number in self._members] for station, group in waiting.items()}
        station = max(ours, key=lambda name: len(ours[name]))
        return station, ours[station]

    def observe(self, station: Station, rows: int, seconds: float) -> None:
        """Ignores costs."""


def _kind(station: Station) -> str:
    """Returns whose costs a station has. Prompts and images are encoded and decoded rarely, and count as experts."""
    return station if station == "prefill" or station == "write" else "expert"
