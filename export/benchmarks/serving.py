"""A service under load: step-level batching beside whole-request batching and one request at a time; Triton's share.

All disciplines run the same requests on the same engines in one process, one after another in each
round. Latency is from the arrival of a request to its last image.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from runtime.pipeline import LatteFlowPipeline
from runtime.requests import GenerationRequest, Limits
from runtime.scheduler import Job, Policy, Scheduler, Station, Worker
from runtime.stations import PipelineStations

Serve = Callable[[GenerationRequest], object]
"""Serves one request; returns when it is done."""
STEPS = (10, 20, 40)
"""Of the mixed requests of the Poisson arrivals."""
LIMITS = Limits(max_queued_images=100_000)


@dataclass
class Cohorts:
    """A policy that takes requests in together and lets nobody join until all of them are done.

    With one place in a cohort that is one at a time; with more it is what a batcher around a whole
    pipeline does.
    """

    places: int
    _members: set[int] = field(default_factory=set)

    def choose(self, waiting: dict[Station, list[Job]], now: float, max_rows: int) -> tuple[Station, list[Job]]:
        """The next station of the cohort, or of a new one."""
        jobs = [job for group in waiting.values() for job in group]
        if not self._members & {job.number for job in jobs}:
            places = min(self.places, max_rows // 2)
            self._members = {job.number for job in sorted(jobs, key=lambda job: job.number)[:places]}
        ours = {station: [job for job in group if job.number in self._members] for station, group in waiting.items()}
        station = max(ours, key=lambda name: len(ours[name]))
        return station, ours[station]

    def observe(self, rows: int, seconds: float) -> None:
        """Costs are nothing to it."""


DISCIPLINES: dict[str, Callable[[], Policy | Cohorts]] = {
    "step-level": Policy,
    "whole requests": lambda: Cohorts(16),
    "one at a time": lambda: Cohorts(1),
}


@dataclass(frozen=True)
class Load:
    """What one discipline did under one load."""

    discipline: str
    load: str
    images_per_second: float
    p50_seconds: float
    """Seconds."""
    p95_seconds: float
    p99_seconds: float


@contextmanager
def serving(pipe: LatteFlowPipeline, discipline: str) -> Iterator[Serve]:
    """The scheduler in this process, under one discipline."""
    scheduler = Scheduler(PipelineStations(pipe), time.monotonic, LIMITS, DISCIPLINES[discipline]())
    worker = Worker(scheduler)
    try:
        yield lambda request: scheduler.submit(request).result()
    finally:
        worker.close()


def in_flight(serve: Serve, discipline: str, clients: int, requests: int) -> Load:
    """`clients` clients, each sending its next request when it has the last one's picture."""
    latencies: list[float] = []

    def one(index: int) -> None:
        started = time.monotonic()
        serve(GenerationRequest(f"a red star {index % 7}", seed=index))
        latencies.append(time.monotonic() - started)

    started = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(one, range(requests)))
    return _load(discipline, f"{clients} in flight", latencies, time.monotonic() - started)


def poisson(serve: Serve, discipline: str, rate: float, share: float, requests: int, seed: int = 0) -> Load:
    """Requests of mixed lengths that arrive at random, `rate` a second on average."""
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1 / rate, requests))
    steps = rng.choice(STEPS, requests)
    latencies: list[float] = []
    began = time.monotonic()

    def one(index: int) -> None:
        serve(GenerationRequest(f"a red star {index % 7}", num_inference_steps=int(steps[index]), seed=index))
        latencies.append(time.monotonic() - began - arrivals[index])

    threads = []
    for index in range(requests):
        time.sleep(max(0.0, arrivals[index] - (time.monotonic() - began)))
        threads.append(threading.Thread(target=one, args=(index,)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    return _load(discipline, f"Poisson, {share:.0%} of capacity", latencies, time.monotonic() - began)


def _load(discipline: str, load: str, latencies: list[float], seconds: float) -> Load:
    p50_seconds, p95_seconds, p99_seconds = np.percentile(latencies, [50, 95, 99])
    return Load(discipline, load, len(latencies) / seconds, float(p50_seconds), float(p95_seconds), float(p99_seconds))


def capacity(pipe: LatteFlowPipeline, requests: int) -> float:
    """Mixed requests a second that step-level batching serves when there is always enough to do."""
    rng = np.random.default_rng(1)
    scheduler = Scheduler(PipelineStations(pipe), time.monotonic, LIMITS)
    for index in range(requests):
        scheduler.submit(GenerationRequest("a red star", num_inference_steps=int(rng.choice(STEPS)), seed=index))
    started = time.monotonic()
    while scheduler.tick():
        pass
    return requests / (time.monotonic() - started)
