"""Step-level batching: images of different requests share every run of an engine.

Each image is a job that walks through stations: its prompt is encoded, expert groups take it step by
step along its own time grid, and it is decoded. A tick runs one station for the jobs that wait there,
so requests join and leave between steps, whatever their number of steps, guidance, prompt or size.
What an image becomes does not depend on who shared its batches.

The scheduler knows no engine: it drives `Stations`, which `runtime.stations` makes of a pipeline and
the tests of a script. It takes time from a clock that is given, and does one tick when told to;
`Worker` tells it to from a thread.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from runtime.errors import CancelledError, DeadlineError, DrainingError, QueueFullError
from runtime.noise import initial_latents
from runtime.requests import Event, GenerationRequest, Handle, Limits, Listener
from runtime.schedule import ExpertSchedule, time_grid

Clock = Callable[[], float]
NEAREST_DEADLINE = 0.1
"""Seconds; a nearer one hurries no more."""
SHORTEST_AGE = 1e-3
"""Seconds; so that priority counts among those that have just come."""


@dataclass(eq=False)
class Job:
    """One image on its way."""

    number: int
    """Of all jobs of a scheduler; no two have the same."""
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
    """Steps behind it."""
    encoded: tuple[object, object | None] | None = None
    """The prompt's prefix, and the negative prompt's if there is guidance."""

    @property
    def request(self) -> GenerationRequest:
        return self.handle.request

    @property
    def rows(self) -> int:
        """Rows that it takes in an expert's batch."""
        return 1 if self.request.guidance_scale == 1.0 else 2

    @property
    def t(self) -> float:
        return self.times[self.index]


class Stations(Protocol):
    """What the scheduler drives."""

    schedule: ExpertSchedule
    latent_shape: tuple[int, int, int]

    def check(self, request: GenerationRequest) -> None:
        """Raises `InputError` for a prompt that cannot be encoded, before the request is queued."""

    def encode(self, jobs: Sequence[Job]) -> None:
        """Sets `encoded` of every job."""

    def step(self, group: int, jobs: Sequence[Job]) -> list[np.ndarray]:
        """The latents of every job after one step of its own, from `times[index]` to `times[index + 1]`."""

    def decode(self, latents: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Pixels `[height, width, 3]` uint8 of every image."""


Station = Literal["encode", "decode"] | int
"""Where a job waits: a number is an expert group."""


class Chooses(Protocol):
    """What decides."""

    def choose(self, waiting: dict[Station, list[Job]], now: float, max_rows: int) -> tuple[Station, list[Job]]:
        """The station that runs next, and which of its jobs: at least one."""

    def observe(self, rows: int, seconds: float) -> None:
        """Is told what every run of an expert took."""


class RunCost:
    """What a run of an expert costs, `fixed + rows * each`: a least-squares line through the latest runs."""

    MEMORY = 0.99
    """What a run still counts when the next one has come."""

    def __init__(self) -> None:
        self._sums = np.zeros(5)

    def observe(self, rows: int, seconds: float) -> None:
        """Takes a run in."""
        self._sums = self.MEMORY * self._sums + (1, rows, rows * rows, seconds, rows * seconds)

    def __call__(self, rows: int) -> float:
        """Seconds; a number in proportion to `1 + rows` until two sizes have been seen."""
        runs, of_rows, of_squares, of_seconds, of_products = self._sums
        spread = runs * of_squares - of_rows**2
        if spread <= 1e-6 * runs * of_squares:
            return 1.0 + rows
        each = max(0.0, (runs * of_products - of_rows * of_seconds) / spread)
        fixed = max(0.0, (of_seconds - each * of_rows) / runs)
        return float(fixed + each * rows) or 1.0


class Policy:
    """Which station runs next, and for whom: the one that relieves the most waiting in a second.

    A job weighs its age, shared with the other images of its request, doubled by each level of priority,
    and more as its deadline comes near. A station's batch takes the greatest weights first, and the
    station runs whose batch weighs most for what it costs (the cμ rule of queueing theory, where the
    cost of waiting grows with age). Where a batch is hardly dearer than one image, many go before few;
    where it costs what its images cost alone, old go before new, because newcomers at the first group
    would only hold up those that are nearly done. No job starves: its weight grows without bound, and
    none that comes later is older. docs/log.md has the measurements.
    """

    def __init__(self) -> None:
        self._cost = RunCost()

    def choose(self, waiting: dict[Station, list[Job]], now: float, max_rows: int) -> tuple[Station, list[Job]]:
        """The station, and the jobs of its batch: at least one, of at most `max_rows` rows if there are several."""
        batches = {station: self._batch(jobs, now, max_rows) for station, jobs in waiting.items()}

        def relief(station: Station) -> float:
            batch = batches[station]
            return sum(self.weight(job, now) for job in batch) / self._cost(sum(job.rows for job in batch))

        best = max(batches, key=relief)
        return best, batches[best]

    def observe(self, rows: int, seconds: float) -> None:
        """Learns what a batch costs here."""
        self._cost.observe(rows, seconds)

    def weight(self, job: Job, now: float) -> float:
        """How much a job pulls."""
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
class Statistics:
    """What has happened since the start, for metrics."""

    submitted: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    rejected: int = 0
    expired: int = 0
    steps_of_group: Counter[int] = field(default_factory=Counter)
    """Steps of images that each expert has run."""
    batch_sizes: Counter[int] = field(default_factory=Counter)
    """How often an expert ran with so many images."""
    step_seconds: float = 0.0
    """Time in experts."""
    queue_seconds: float = 0.0
    """Time that images waited before their first station."""


class Scheduler:
    """Jobs, and the next tick. All methods may be called from any thread; one at a time runs `tick`."""

    def __init__(
        self, stations: Stations, clock: Clock, limits: Limits | None = None, policy: Chooses | None = None
    ) -> None:
        self.limits = limits or Limits()
        self.statistics = Statistics()
        self._stations = stations
        self._clock = clock
        self._policy = policy or Policy()
        self._numbers = itertools.count()
        self._jobs: list[Job] = []
        self._remaining: Counter[Handle] = Counter()
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._draining = False

    def submit(self, request: GenerationRequest, listener: Listener | None = None) -> Handle:
        """Takes a request in.

        Args:
            listener: is called with every event, from the thread that ticks, instead of `Handle.events`.

        Raises:
            InputError: it cannot work.
            QueueFullError: there is no place now.
            DrainingError: the service takes nothing new.
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
                raise DrainingError("the service is shutting down and takes no new requests; ask another one")
            if len(self._jobs) + len(jobs) > self.limits.max_queued_images:
                self.statistics.rejected += 1
                raise QueueFullError(
                    f"the queue holds {len(self._jobs)} of {self.limits.max_queued_images} images and has no place for "
                    f"{len(jobs)} more; try again later"
                )
            self.statistics.submitted += 1
            self._remaining[handle] = len(jobs)
            self._jobs += jobs
            self._work.notify_all()
        return handle

    @property
    def pending(self) -> int:
        """Images in the scheduler."""
        with self._lock:
            return len(self._jobs)

    def drain(self) -> None:
        """Takes nothing new from now on; what is in finishes."""
        with self._work:
            self._draining = True
            self._work.notify_all()

    def wait_for_work(self, timeout: float) -> bool:
        """Waits until there is a job, at most `timeout` seconds; whether there is one."""
        with self._work:
            return self._work.wait_for(lambda: bool(self._jobs), timeout)

    def wait_until_empty(self, timeout: float) -> bool:
        """Waits until there is no job, at most `timeout` seconds; whether there is none."""
        with self._work:
            return self._work.wait_for(lambda: not self._jobs, timeout)

    def tick(self) -> bool:
        """Runs one station for the jobs that wait there; False if there was nothing to do.

        An error of a station fails the requests of its batch and nobody else's.
        """
        self._drop_the_lost()
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
                job.handle.tell(Event("image", job.image, job.index, pixels))
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
        for job, latents in zip(batch, self._stations.step(group, batch), strict=True):
            job.latents = latents
            job.index += 1
            job.handle.tell(Event("progress", job.image, job.index))
            every = job.request.preview_every
            if every and job.index % every == 0 and job.index + 1 < len(job.times):
                previews.append(job)
        if previews:
            for job, pixels in zip(previews, self._stations.decode([job.latents for job in previews]), strict=True):
                job.handle.tell(Event("preview", job.image, job.index, pixels))

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
            job.handle.tell(Event("done"))

    def _drop_the_lost(self) -> None:
        """Frees the places of who was cancelled or ran out of time."""
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
                self._fail({handle}, DeadlineError(f"the request was not done within its deadline of {deadline:g} s"))
                self.statistics.expired += 1

    def _fail(self, handles: set[Handle], error: Exception) -> None:
        with self._work:
            self._jobs = [job for job in self._jobs if job.handle not in handles]
            self._work.notify_all()
            for handle in handles:
                self._remaining.pop(handle, None)
        for handle in handles:
            handle.tell(Event("failed", error=error))


class Worker:
    """A thread that ticks while there is work."""

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
        """Refuses new requests and waits for those that are in; whether all got done in time."""
        self._scheduler.drain()
        return self._scheduler.wait_until_empty(timeout)

    def close(self) -> None:
        """Stops after the tick that runs."""
        self._stop.set()
        self._thread.join()
