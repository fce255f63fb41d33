"""Step-level batching: images of different requests share every run of an engine.

Each image is a job that passes through stations: its prompt is encoded, expert groups take it step by step along
its own time grid, and it is decoded. A tick runs one station for the jobs that wait there, so requests join and
leave between steps, whatever their number of steps, guidance or prompt. An image does not depend on the other images
in its batches.

The scheduler knows no engine: it drives `Stations`, which `runtime.serving.stations` implements over a pipeline and
the tests implement with a script. The caller supplies the clock, and calls `tick`; `Worker` does so from a thread.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from runtime.errors import (
    DRAINING,
    CancelledError,
    DeadlineError,
    DrainingError,
    EngineError,
    QueueFullError,
    ServiceError,
    one_line,
)
from runtime.flow_time import check_finite, initial_latents, time_grid
from runtime.serving.jobs import EncodedPrompt, Job, Station, Stations
from runtime.serving.policy import CostAwarePolicy, SchedulingPolicy
from runtime.serving.requests import Event, GenerationRequest, Handle, Limits, Listener

Clock = Callable[[], float]
_LOG = logging.getLogger("latte_flow")


@dataclass
class Statistics:
    """Counts since the start, for metrics."""

    submitted: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    rejected: int = 0
    expired: int = 0
    steps_of_group: Counter[int] = field(default_factory=Counter)
    """Number of image steps that each expert has run."""
    batch_sizes: Counter[int] = field(default_factory=Counter)
    """Number of expert runs by the number of images in the batch."""
    step_seconds: float = 0.0
    """Time spent in experts."""
    queue_seconds: float = 0.0
    """Time that images waited for their first station."""
    last_image_time: float = 0.0
    """Unix time when the last image was drawn."""


class Scheduler:
    """Holds the jobs and runs ticks. Any thread may call any method, but only one at a time may call `tick`."""

    def __init__(
        self, stations: Stations, clock: Clock, limits: Limits | None = None, policy: SchedulingPolicy | None = None
    ) -> None:
        self.limits = limits or Limits()
        self.statistics = Statistics()
        self._stations = stations
        self._clock = clock
        self._policy = policy or CostAwarePolicy()
        self._numbers = itertools.count()
        self._open: dict[Handle, list[Job]] = {}
        """Requests that have not been told their end, with the jobs that are left of each."""
        self._pending = 0
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._refusal: ServiceError | None = None

    def submit(self, request: GenerationRequest, listener: Listener | None = None) -> Handle:
        """Queues a request.

        Args:
            listener: called with every event, from the thread that ticks, instead of `Handle.events`. It may be called
                before this method returns.

        Raises:
            InputError: the request cannot work.
            QueueFullError: there is no room for it now.
            DrainingError: the service takes no new requests.
        """
        request.check(self.limits)
        self._stations.check(request)
        handle = Handle(request, listener)
        times = time_grid(request.num_inference_steps, request.shift)
        noise = initial_latents([request.seed + i for i in range(request.num_images)], self._stations.latent_shape)
        now = self._clock()
        expires = np.inf if request.deadline is None else now + request.deadline
        jobs = [Job(next(self._numbers), handle, i, noise[i], times, expires, now) for i in range(request.num_images)]
        for job in jobs:
            job.sharers = len(jobs)
        with self._work:
            try:
                self._admit(len(jobs))
            except ServiceError:
                self.statistics.rejected += 1
                raise
            self.statistics.submitted += 1
            self._open[handle] = jobs
            self._pending += len(jobs)
            self._work.notify_all()
        return handle

    def _admit(self, images: int) -> None:
        if self._refusal is not None:
            raise self._refusal
        if self._pending + images > self.limits.max_queued_images:
            raise QueueFullError(
                f"the queue has {self._pending} of {self.limits.max_queued_images} images and no room for "
                f"{images} more; try again later"
            )

    @property
    def pending(self) -> int:
        """Number of images in the scheduler."""
        return self._pending

    def drain(self) -> None:
        """Refuses new requests from now on; those in the scheduler finish."""
        self._refuse(DrainingError(f"{DRAINING} and takes no new requests; ask another one"))

    def abort(self, error: ServiceError) -> None:
        """Fails all requests, and every new one, for good."""
        self._refuse(error)
        for handle in list(self._open):
            self._fail(handle, error)

    def _refuse(self, error: ServiceError) -> None:
        with self._work:
            self._refusal = error
            self._work.notify_all()

    def wait_for_work(self, timeout: float) -> bool:
        """Waits at most `timeout` seconds for a job; returns whether there is one."""
        with self._work:
            return self._work.wait_for(lambda: bool(self._open), timeout)

    def wait_until_empty(self, timeout: float) -> bool:
        """Waits at most `timeout` seconds until all requests were told their end; returns whether they were."""
        with self._work:
            return self._work.wait_for(lambda: not self._open, timeout)

    def tick(self) -> bool:
        """Runs one station for the jobs that wait there; returns False if there was nothing to do.

        A batch that fails is tried again by halves, so that only the jobs that cannot run fail their requests.
        """
        self._drop_abandoned()
        waiting: dict[Station, list[Job]] = {}
        with self._lock:
            for jobs in self._open.values():
                for job in jobs:
                    waiting.setdefault(job.station(self._stations.schedule), []).append(job)
        if not waiting:
            return False
        now = self._clock()
        station, batch = self._policy.choose(waiting, now, self._max_rows)
        if station == "encode":
            self.statistics.queue_seconds += sum(now - job.arrived for job in batch)
        self._run(station, batch)
        return True

    def _max_rows(self, station: Station) -> int:
        limit = self._stations.max_rows(station)
        configured = self.limits.max_rows_per_tick
        return configured if limit is None else min(limit, configured)

    def _run(self, station: Station, batch: list[Job]) -> None:
        started = self._clock()
        try:
            results = self._compute(station, batch)
        except Exception as error:
            self._run_by_halves(station, batch, error)
            return
        if isinstance(station, int):
            seconds = self._clock() - started
            self.statistics.steps_of_group[station] += len(batch)
            self.statistics.batch_sizes[len(batch)] += 1
            self.statistics.step_seconds += seconds
            self._policy.observe(sum(job.rows for job in batch), seconds)
        self._advance(station, batch, results)

    def _run_by_halves(self, station: Station, batch: list[Job], error: Exception) -> None:
        if len(batch) == 1:
            _LOG.warning("%s failed for one job: %s", _name(station), one_line(error), exc_info=error)
            self._fail(batch[0].handle, error)
            self.statistics.failed += 1
            return
        _LOG.warning("%s failed for %d jobs, tried by halves: %s", _name(station), len(batch), one_line(error))
        middle = len(batch) // 2
        for half in (batch[:middle], batch[middle:]):
            if left := [job for job in half if job.handle in self._open]:
                self._run(station, left)

    def _compute(self, station: Station, batch: list[Job]) -> Sequence[Any]:
        """Runs the engines and changes no job."""
        if station == "encode":
            results: Sequence[Any] = self._stations.encode(batch)
        elif station == "decode":
            results = self._stations.decode([job.latents for job in batch])
        else:
            results = self._stations.step(station, batch)
        if len(results) != len(batch):
            raise EngineError(f"{_name(station)} gave {len(results)} results for {len(batch)} jobs")
        return results

    def _advance(self, station: Station, batch: list[Job], results: Sequence[Any]) -> None:
        if isinstance(station, int):
            self._advance_steps(batch, results)
            return
        for job, result in zip(batch, results, strict=True):
            if isinstance(result, EncodedPrompt):
                job.encoded = result
            else:
                self.statistics.last_image_time = time.time()
                job.handle.send(Event("image", job.image, job.index, result))
                self._finish(job)

    def _advance_steps(self, batch: list[Job], results: Sequence[np.ndarray]) -> None:
        self._fail_where_not_finite(batch, results)
        previews = []
        for job, latents in zip(batch, results, strict=True):
            if job.handle not in self._open:
                continue
            job.latents = latents
            job.index += 1
            job.handle.send(Event("progress", job.image, job.index))
            every = job.request.preview_every
            if every and job.index % every == 0 and job.index + 1 < len(job.times):
                previews.append(job)
        if previews:
            self._send_previews(previews)

    def _send_previews(self, jobs: list[Job]) -> None:
        """Sends previews; one that cannot be decoded is left out and harms nobody."""
        try:
            decoded = self._compute("decode", jobs)
        except Exception as error:
            _LOG.warning("a preview of %d images failed: %s", len(jobs), one_line(error))
            middle = len(jobs) // 2
            for half in (jobs[:middle], jobs[middle:]) if middle else ():
                self._send_previews(half)
            return
        for job, pixels in zip(jobs, decoded, strict=True):
            job.handle.send(Event("preview", job.image, job.index, pixels))

    def _fail_where_not_finite(self, batch: list[Job], results: Sequence[np.ndarray]) -> None:
        """Fails the requests with latents that are not finite, not those that share their batch."""
        for job, latents in zip(batch, results, strict=True):
            try:
                check_finite(latents[None])
            except EngineError as error:
                if job.handle in self._open:
                    self._fail(job.handle, error)
                    self.statistics.failed += 1

    def _finish(self, job: Job) -> None:
        jobs = self._open[job.handle]
        with self._work:
            jobs.remove(job)
            self._pending -= 1
        if jobs:
            return
        self.statistics.finished += 1
        job.handle.send(Event("done"))
        with self._work:  # after the event, so that a request that was not told its end is never forgotten
            del self._open[job.handle]
            self._work.notify_all()

    def _drop_abandoned(self) -> None:
        """Removes the requests that were cancelled or missed their deadline."""
        now = self._clock()
        with self._lock:
            abandoned = [
                handle for handle, jobs in self._open.items() if handle.cancelled or (jobs and jobs[0].expires <= now)
            ]
        for handle in abandoned:
            if handle.cancelled:
                self._fail(handle, CancelledError("the request was cancelled"))
                self.statistics.cancelled += 1
            else:
                deadline = handle.request.deadline
                self._fail(handle, DeadlineError(f"the request was not finished within its deadline of {deadline:g} s"))
                self.statistics.expired += 1

    def _fail(self, handle: Handle, error: Exception) -> None:
        handle.send(Event("failed", error=error))
        with self._work:
            self._pending -= len(self._open.pop(handle))
            self._work.notify_all()


def _name(station: Station) -> str:
    return f"expert_{station}" if isinstance(station, int) else station
