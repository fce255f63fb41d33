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
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from runtime.errors import DRAINING, CancelledError, DeadlineError, DrainingError, EngineError, QueueFullError
from runtime.flow_time import ExpertSchedule, check_finite, initial_latents, time_grid
from runtime.rows import PrefixRow, is_guided
from runtime.serving.requests import Event, GenerationRequest, Handle, Limits, Listener

Clock = Callable[[], float]
NEAREST_DEADLINE = 0.1
"""In seconds. A nearer deadline adds no more weight."""
SHORTEST_AGE = 1e-3
"""In seconds, so that priority matters among jobs that have just arrived."""


@dataclass(frozen=True)
class EncodedPrompt:
    """The encoded prompt of a job, and its negative prompt if the job is guided."""

    prompt: PrefixRow
    negative: PrefixRow | None


@dataclass(eq=False)
class Job:
    """One image that is being made."""

    number: int
    """A number that no other job of the scheduler has."""
    handle: Handle
    image: int
    latents: np.ndarray
    """x at `times[index]`, `[C, H, W]` float32."""
    times: list[float]
    expires: float
    """On the scheduler's clock."""
    arrived: float
    """On the scheduler's clock."""
    index: int = 0
    """Number of steps that it has finished."""
    encoded: EncodedPrompt | None = None

    @property
    def request(self) -> GenerationRequest:
        return self.handle.request

    @property
    def is_guided(self) -> bool:
        return is_guided(self.request.guidance_scale)

    @property
    def rows(self) -> int:
        """Number of rows that it has in an expert's batch."""
        return 2 if self.is_guided else 1

    @property
    def t(self) -> float:
        return self.times[self.index]


class Stations(Protocol):
    """The work that the scheduler distributes."""

    schedule: ExpertSchedule
    latent_shape: tuple[int, int, int]

    def check(self, request: GenerationRequest) -> None:
        """Raises `InputError` for a prompt that cannot be encoded, before the request is queued."""

    def encode(self, jobs: Sequence[Job]) -> None:
        """Sets `encoded` of every job."""

    def step(self, group: int, jobs: Sequence[Job]) -> list[np.ndarray]:
        """Returns the latents of every job after its next step, from `times[index]` to `times[index + 1]`."""

    def decode(self, latents: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns the pixels of every image, `[height, width, 3]` uint8."""


Station = Literal["encode", "decode"] | int
"""Where a job waits: a number is an expert group."""


class SchedulingPolicy(Protocol):
    """Decides which station runs next, and for which jobs."""

    def choose(self, waiting: dict[Station, list[Job]], now: float, max_rows: int) -> tuple[Station, list[Job]]:
        """Returns the station that runs next and its batch: at least one job, and several only within `max_rows`."""

    def observe(self, rows: int, seconds: float) -> None:
        """Learns how long a run of an expert took."""


class RunCost:
    """The cost of a run of an expert, `fixed + rows * each`: a least-squares line through the latest runs."""

    MEMORY = 0.99
    """Weight of a run relative to the next one."""

    def __init__(self) -> None:
        self._sums = np.zeros(5)

    def observe(self, rows: int, seconds: float) -> None:
        """Adds a run."""
        self._sums = self.MEMORY * self._sums + (1, rows, rows * rows, seconds, rows * seconds)

    def __call__(self, rows: int) -> float:
        """Returns seconds; until two sizes were observed, a number proportional to `1 + rows`."""
        runs, of_rows, of_squares, of_seconds, of_products = self._sums
        spread = runs * of_squares - of_rows**2
        if spread <= 1e-6 * runs * of_squares:
            return 1.0 + rows
        each = max(0.0, (runs * of_products - of_rows * of_seconds) / spread)
        fixed = max(0.0, (of_seconds - each * of_rows) / runs)
        return float(fixed + each * rows) or 1.0


class CostAwarePolicy:
    """Runs the station that relieves the most waiting per second of work.

    A job's weight is its age, divided among the images of its request, doubled by each level of priority, and
    increased as its deadline comes near. A station's batch takes the greatest weights first; the station whose batch
    has the greatest weight for its cost runs next (the cμ rule of queueing theory, with a waiting cost that grows
    with age). Where a batch costs hardly more than one image, large batches go first. Where it costs as much as its
    images would alone, old jobs go first, because newcomers at the first group would only delay jobs that are nearly
    finished. No job starves: its weight grows without bound, and no later job is older. docs/log.md has the
    measurements.
    """

    def __init__(self) -> None:
        self._cost = RunCost()

    def choose(self, waiting: dict[Station, list[Job]], now: float, max_rows: int) -> tuple[Station, list[Job]]:
        """Returns the station whose batch has the greatest weight for its cost, and that batch."""
        batches = {station: self._batch(jobs, now, max_rows) for station, jobs in waiting.items()}

        def relief(station: Station) -> float:
            batch = batches[station]
            return sum(self.weight(job, now) for job in batch) / self._cost(sum(job.rows for job in batch))

        best = max(batches, key=relief)
        return best, batches[best]

    def observe(self, rows: int, seconds: float) -> None:
        """Learns how long a run of an expert took."""
        self._cost.observe(rows, seconds)

    def weight(self, job: Job, now: float) -> float:
        """Returns a job's weight."""
        age = now - job.arrived + SHORTEST_AGE
        hurry = 1 + 1 / max(job.expires - now, NEAREST_DEADLINE)
        return float(2.0**job.request.priority * hurry * age / job.request.num_images)

    def _batch(self, jobs: list[Job], now: float, max_rows: int) -> list[Job]:
        batch: list[Job] = []
        rows = 0
        for job in sorted(jobs, key=lambda job: -self.weight(job, now)):
            if batch and rows + job.rows > max_rows:
                break
            batch.append(job)
            rows += job.rows
        return batch


@dataclass
class WholeRequestPolicy:
    """Takes jobs in together and lets nobody join until all of them are finished.

    With one place that is one job at a time; with more it is what a batcher around a whole pipeline does. The service
    does not use it: the benchmark and the tests compare `CostAwarePolicy` with it.
    """

    places: int
    _members: set[int] = field(default_factory=set)

    def choose(self, waiting: dict[Station, list[Job]], now: float, max_rows: int) -> tuple[Station, list[Job]]:
        """Returns the next station of the current jobs, or of new ones once those are finished."""
        jobs = [job for group in waiting.values() for job in group]
        if not self._members & {job.number for job in jobs}:
            places = min(self.places, max_rows // 2)
            self._members = {job.number for job in sorted(jobs, key=lambda job: job.number)[:places]}
        ours = {station: [job for job in group if job.number in self._members] for station, group in waiting.items()}
        station = max(ours, key=lambda name: len(ours[name]))
        return station, ours[station]

    def observe(self, rows: int, seconds: float) -> None:
        """Ignores costs."""


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
        self._jobs: list[Job] = []
        self._remaining: Counter[Handle] = Counter()
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._draining = False

    def submit(self, request: GenerationRequest, listener: Listener | None = None) -> Handle:
        """Queues a request.

        Args:
            listener: called with every event, from the thread that ticks, instead of `Handle.events`.

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
        with self._work:
            if self._draining:
                self.statistics.rejected += 1
                raise DrainingError(f"{DRAINING} and takes no new requests; ask another one")
            if len(self._jobs) + len(jobs) > self.limits.max_queued_images:
                self.statistics.rejected += 1
                raise QueueFullError(
                    f"the queue has {len(self._jobs)} of {self.limits.max_queued_images} images and no room for "
                    f"{len(jobs)} more; try again later"
                )
            self.statistics.submitted += 1
            self._remaining[handle] = len(jobs)
            self._jobs += jobs
            self._work.notify_all()
        return handle

    @property
    def pending(self) -> int:
        """Number of images in the scheduler."""
        with self._lock:
            return len(self._jobs)

    def drain(self) -> None:
        """Refuses new requests from now on; those in the scheduler finish."""
        with self._work:
            self._draining = True
            self._work.notify_all()

    def wait_for_work(self, timeout: float) -> bool:
        """Waits at most `timeout` seconds for a job; returns whether there is one."""
        with self._work:
            return self._work.wait_for(lambda: bool(self._jobs), timeout)

    def wait_until_empty(self, timeout: float) -> bool:
        """Waits at most `timeout` seconds until all jobs are finished; returns whether they are."""
        with self._work:
            return self._work.wait_for(lambda: not self._jobs, timeout)

    def tick(self) -> bool:
        """Runs one station for the jobs that wait there; returns False if there was nothing to do.

        An error in a station fails the requests of its batch only.
        """
        self._drop_abandoned()
        with self._lock:
            waiting: dict[Station, list[Job]] = {}
            for job in self._jobs:
                waiting.setdefault(self._station_of(job), []).append(job)
        if not waiting:
            return False
        station, batch = self._policy.choose(waiting, self._clock(), self.limits.max_rows_per_tick)
        try:
            self._run(station, batch)
        except Exception as error:
            self._fail({job.handle for job in batch}, error)
            self.statistics.failed += len({job.handle for job in batch})
        return True

    def _station_of(self, job: Job) -> Station:
        if job.encoded is None:
            return "encode"
        return "decode" if job.index + 1 == len(job.times) else self._stations.schedule.group_of(job.t)

    def _run(self, station: Station, batch: list[Job]) -> None:
        started = self._clock()
        if station == "encode":
            self.statistics.queue_seconds += sum(started - job.arrived for job in batch)
            self._stations.encode(batch)
        elif station == "decode":
            for job, pixels in zip(batch, self._stations.decode([job.latents for job in batch]), strict=True):
                job.handle.send(Event("image", job.image, job.index, pixels))
                self._finish(job)
        else:
            assert isinstance(station, int)
            self._step(station, batch)
            self.statistics.steps_of_group[station] += len(batch)
            self.statistics.batch_sizes[len(batch)] += 1
            seconds = self._clock() - started
            self.statistics.step_seconds += seconds
            self._policy.observe(sum(job.rows for job in batch), seconds)

    def _step(self, group: int, batch: list[Job]) -> None:
        previews = []
        stepped = list(zip(batch, self._stations.step(group, batch), strict=True))
        failed = self._fail_where_not_finite(stepped)
        for job, latents in stepped:
            if job.handle in failed:
                continue
            job.latents = latents
            job.index += 1
            job.handle.send(Event("progress", job.image, job.index))
            every = job.request.preview_every
            if every and job.index % every == 0 and job.index + 1 < len(job.times):
                previews.append(job)
        if previews:
            for job, pixels in zip(previews, self._stations.decode([job.latents for job in previews]), strict=True):
                job.handle.send(Event("preview", job.image, job.index, pixels))

    def _fail_where_not_finite(self, stepped: Sequence[tuple[Job, np.ndarray]]) -> set[Handle]:
        """Fails the requests with latents that are not finite, not those that share their batch; returns them."""
        failed: set[Handle] = set()
        for job, latents in stepped:
            try:
                check_finite(latents[None])
            except EngineError as error:
                if job.handle not in failed:
                    failed.add(job.handle)
                    self._fail({job.handle}, error)
        self.statistics.failed += len(failed)
        return failed

    def _finish(self, job: Job) -> None:
        with self._work:
            self._jobs.remove(job)
            self._work.notify_all()
            self._remaining[job.handle] -= 1
            last = self._remaining[job.handle] == 0
            if last:
                del self._remaining[job.handle]
                self.statistics.finished += 1
        if last:
            job.handle.send(Event("done"))

    def _drop_abandoned(self) -> None:
        """Removes the jobs of requests that were cancelled or missed their deadline."""
        now = self._clock()
        with self._lock:
            handles = list(self._remaining)
            late = {job.handle for job in self._jobs if job.expires <= now}
        for handle in handles:
            if handle.cancelled:
                self._fail({handle}, CancelledError("the request was cancelled"))
                self.statistics.cancelled += 1
            elif handle in late:
                deadline = handle.request.deadline
                self._fail(
                    {handle}, DeadlineError(f"the request was not finished within its deadline of {deadline:g} s")
                )
                self.statistics.expired += 1

    def _fail(self, handles: set[Handle], error: Exception) -> None:
        with self._work:
            self._jobs = [job for job in self._jobs if job.handle not in handles]
            self._work.notify_all()
            for handle in handles:
                self._remaining.pop(handle, None)
        for handle in handles:
            handle.send(Event("failed", error=error))


class Worker:
    """A thread that calls `tick` while there is work."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="latte-flow-scheduler", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while not self._stop.is_set():
            if self._scheduler.wait_for_work(timeout=0.05):
                self._scheduler.tick()

    def drain(self, timeout: float) -> bool:
        """Refuses new requests and waits for those in the scheduler; returns whether all finished in time."""
        self._scheduler.drain()
        return self._scheduler.wait_until_empty(timeout)

    def close(self) -> None:
        """Stops after the current tick."""
        self._stop.set()
        self._thread.join()
