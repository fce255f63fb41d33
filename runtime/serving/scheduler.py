"""Step-level batching: images of different requests share every run of an engine.

Each image is a job that passes through stations: its prompt is encoded, expert groups take it step by step along
its own time grid, and it is decoded. A tick runs one station for the jobs that wait there, so requests join and
leave between steps, whatever their number of steps, guidance or prompt. An image does not depend on the other images
in its batches. Answers are jobs too: a question is read ("prefill"), then its answer is written token by token,
together with others. So one thread runs all engines, and drawing and answering cannot disturb each other.

The scheduler knows no engine: it drives `Stations`, which `runtime.serving.stations` implements over a pipeline and
the tests implement with a script. The caller supplies the clock, and calls `tick`; `Worker` does so from a thread.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import numpy as np

from runtime.backends import Value, to_host
from runtime.errors import (
    DRAINING,
    TRY_AGAIN,
    CancelledError,
    DeadlineError,
    DrainingError,
    EngineError,
    InputError,
    LatteFlowError,
    QueueFullError,
    ServiceError,
    one_line,
)
from runtime.flow_time import check_finite, initial_latents, time_grid
from runtime.serving.jobs import AnswerJob, ImageJob, Job, Station, Stations
from runtime.serving.policy import CostAwarePolicy, SchedulingPolicy
from runtime.serving.quotas import Quotas, needs_of
from runtime.serving.requests import AnswerRequest, AnyRequest, Event, Handle, Limits, Listener, RequestKind, Usage
from runtime.serving.statistics import OpenRequest, Outcome, RequestRecord, Statistics, name_of

Clock = Callable[[], float]
OnEnd = Callable[["RequestRecord"], None]
_LOG = logging.getLogger("latte_flow")
READERS = 2
"""Threads that decode the images of questions, so that no engine waits for them."""
READ_AHEAD = 4
"""Questions that are read before their answers begin."""


class Scheduler:
    """Holds the jobs and runs ticks. Any thread may call any method, but only one at a time may call `tick`.

    Args:
        clock: seconds, from any start.
        on_end: called with a record of each request that ends, refused ones too.
        readers: decodes the images of questions; by default two threads.
    """

    def __init__(
        self,
        stations: Stations,
        clock: Clock,
        limits: Limits | None = None,
        policy: SchedulingPolicy | None = None,
        on_end: OnEnd = lambda record: None,
        readers: Executor | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.statistics = Statistics()
        self._stations = stations
        self._clock = clock
        self._policy = policy or CostAwarePolicy()
        self._on_end = on_end
        self._readers = readers or ThreadPoolExecutor(READERS, thread_name_prefix="reader")
        self._numbers = itertools.count()
        self._open: dict[Handle, OpenRequest] = {}
        """Requests that have not been told their end."""
        self._quotas = Quotas(self.limits)
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._refusal: ServiceError | None = None

    def submit(self, request: AnyRequest, listener: Listener | None = None) -> Handle:
        """Queues a request.

        Args:
            listener: called with every event, from the thread that ticks, instead of `Handle.events`. It may be called
                before this method returns.

        Raises:
            InputError: the request cannot work.
            QueueFullError: there is no room for it now.
            DrainingError: the service takes no new requests.
        """
        now = self._clock()
        handle = Handle(request, listener)
        try:
            request.check(self.limits)
            self._stations.check(request)
            jobs = self._jobs_of(request, handle, now)
            with self._work:
                self._admit(request, len(jobs))
                self._open[handle] = OpenRequest(request, jobs, now)
                self._count(request, len(jobs))
                self._work.notify_all()
        except LatteFlowError as error:
            self._record(OpenRequest(request, [], now), "rejected", error)
            raise
        self.statistics.submitted += 1
        return handle

    def count_rejected(self, kind: RequestKind, request_id: str, client_id: str, error: Exception) -> None:
        """Counts and logs a request that could not even be read, and so was never submitted."""
        self._count_end(RequestRecord(kind, "rejected", request_id, client_id, 0, 0, 0.0, None, None, one_line(error)))

    def _jobs_of(self, request: AnyRequest, handle: Handle, now: float) -> list[Job]:
        expires = np.inf if request.deadline is None else now + request.deadline
        if isinstance(request, AnswerRequest):
            return [AnswerJob(next(self._numbers), handle, expires, now, request)]
        times = time_grid(request.num_inference_steps, request.shift)
        scales = [self._stations.sampling.row_scale(request.guidance_scale, t) for t in times[:-1]]
        noise = initial_latents([request.seed + i for i in range(request.num_images)], self._stations.latent_shape)
        return [
            ImageJob(next(self._numbers), handle, expires, now, request, i, latents, times, scales, sharers=len(noise))
            for i, latents in enumerate(noise)
        ]

    def _admit(self, request: AnyRequest, jobs: int) -> None:
        """Raises `QueueFullError` if there is no room for so many jobs, or `DrainingError`."""
        if self._refusal is not None:
            raise type(self._refusal)(str(self._refusal))  # a new one: its traceback keeps the request in memory
        if reason := self._quotas.refusal(needs_of(request, jobs), request.client_id):
            seconds = self.statistics.seconds_per_job[request.kind] * self._quotas.taken(request.kind) / 2
            raise QueueFullError(f"{reason}; {TRY_AGAIN} {max(1, round(seconds))} s")

    def _count(self, request: AnyRequest, jobs: int) -> None:
        self._quotas.take(needs_of(request, jobs), request.client_id)

    def _read_ahead(self) -> None:
        """Lets questions be read, few ahead of those that are answered: decoded images take much more memory."""
        if not self._quotas.taken("ask"):
            return
        with self._lock:
            jobs = [job for opened in self._open.values() for job in opened.jobs if isinstance(job, AnswerJob)]
        ahead = sum(job.reading and job.answer is None for job in jobs)
        unread = sorted((job for job in jobs if not job.reading), key=lambda job: (-job.request.priority, job.number))
        for job in unread[: max(0, READ_AHEAD - ahead)]:
            job.reading = True
            self._readers.submit(self._read, job)

    def _read(self, job: AnswerJob) -> None:
        try:
            wanted = job.handle in self._open and not job.handle.cancelled
            inputs = self._stations.read(job.request) if wanted else None
        except Exception as error:
            job.error = error
        with self._work:
            if job.error is None:
                job.inputs = inputs
            self._work.notify_all()

    @property
    def open_requests(self) -> int:
        """Number of requests that were not told their end."""
        return len(self._open)

    @property
    def pending(self) -> int:
        """Number of images in the scheduler."""
        return self._quotas.taken("draw")

    @property
    def pending_questions(self) -> int:
        """Number of questions in the scheduler."""
        return self._quotas.taken("ask")

    def drain(self) -> None:
        """Refuses new requests from now on; those in the scheduler finish."""
        self._refuse(DrainingError(f"{DRAINING} and takes no new requests; ask another one"))

    def abort(self, error: ServiceError) -> None:
        """Fails all requests, and every new one, for good."""
        self._refuse(error)
        for handle in list(self._open):
            self._fail(handle, error)

    def close(self) -> None:
        """Ends the threads that read questions."""
        self._readers.shutdown(wait=True, cancel_futures=True)

    def _refuse(self, error: ServiceError) -> None:
        with self._work:
            self._refusal = error
            self._work.notify_all()

    def wait_for_work(self, timeout: float) -> bool:
        """Waits at most `timeout` seconds for a request; returns whether there is one."""
        with self._work:
            return self._work.wait_for(lambda: bool(self._open), timeout)

    def wait_for_change(self, timeout: float) -> None:
        """Waits at most `timeout` seconds for a request to come, to be read, or to end."""
        with self._work:
            self._work.wait(timeout)

    def wait_until_empty(self, timeout: float) -> bool:
        """Waits at most `timeout` seconds until all requests were told their end; returns whether they were."""
        with self._work:
            return self._work.wait_for(lambda: not self._open, timeout)

    def tick(self) -> bool:
        """Runs one station for the jobs that wait there; returns False if there was nothing to do.

        A batch that fails is tried again by halves, so that only the jobs that cannot run fail their requests.
        """
        self._read_ahead()
        self._drop_abandoned()
        waiting = self._waiting()
        if not waiting:
            return False
        now = self._clock()
        station, batch = self._policy.choose(waiting, now, self._max_rows)
        if station == "write" and "prefill" in waiting:  # another answer can share this run and those that follow
            station, batch = self._policy.choose({"prefill": waiting["prefill"]}, now, self._max_rows)
        if station in ("encode", "prefill"):
            for job in batch:
                self._open[job.handle].started = self._open[job.handle].started or now
        self._run(station, batch)
        return True

    def _waiting(self) -> dict[Station, list[Job]]:
        """Returns the jobs that can run, by station. Questions wait until there is room for one more answer."""
        waiting: dict[Station, list[Job]] = {}
        schedule = self._stations.schedule
        with self._lock:
            for opened in self._open.values():
                client = opened.request.client_id
                sharers = self._quotas.of_client(opened.request.kind, client) if client else 0
                for job in opened.jobs:
                    job.sharers = sharers or job.sharers
                    if (station := job.station(schedule)) is not None:
                        waiting.setdefault(station, []).append(job)
        if len(waiting.get("write", ())) >= self._max_rows("write"):
            waiting.pop("prefill", None)
        return waiting

    def _max_rows(self, station: Station) -> int:
        limit = self._stations.max_rows(station)
        if station == "prefill":
            return 1
        configured = self.limits.max_answers_at_once if station == "write" else self.limits.max_rows_per_tick
        return configured if limit is None else min(limit, configured)

    def _run(self, station: Station, batch: list[Job]) -> None:
        started = self._clock()
        try:
            results = self._compute(station, batch)
        except CancelledError as error:
            self._end(batch[0].handle, "cancelled", error)
            return
        except Exception as error:
            self._run_by_halves(station, batch, error)
            return
        seconds = self._clock() - started
        self.statistics.count_run(station, len(batch), seconds)
        if station not in ("encode", "decode"):
            self._policy.observe(station, sum(job.rows for job in batch), seconds)
        self._advance(station, batch, results)

    def _run_by_halves(self, station: Station, batch: list[Job], error: Exception) -> None:
        if len(batch) == 1:
            self._fail(batch[0].handle, error)
            return
        _LOG.warning("%s failed for %d jobs, tried by halves: %s", name_of(station), len(batch), one_line(error))
        middle = len(batch) // 2
        for half in (batch[:middle], batch[middle:]):
            if left := [job for job in half if job.handle in self._open]:
                self._run(station, left)

    def _compute(self, station: Station, batch: Sequence[Any]) -> Sequence[Any]:
        """Runs the engines and changes no job."""
        stations = self._stations
        if station == "encode":
            results: Sequence[Any] = stations.encode(batch)
        elif station == "decode":
            results = stations.decode([_finite(job.latents) for job in batch])
        elif station == "prefill":
            results = [stations.prefill(job) for job in batch]
        elif station == "write":
            results = stations.write(batch)
        else:
            results = stations.step(station, batch)
        if len(results) != len(batch):
            raise EngineError(f"{name_of(station)} gave {len(results)} results for {len(batch)} jobs")
        return results

    def _advance(self, station: Station, batch: Sequence[Any], results: Sequence[Any]) -> None:
        """Stores the results of a run and reports them."""
        if isinstance(station, int):
            self._advance_steps(batch, results)
            return
        for job, result in zip(batch, results, strict=True):
            if station == "encode":
                job.encoded = result
                self._open[job.handle].input_tokens = result.prompt.length
            elif station == "decode":
                self.statistics.last_image_time = time.time()
                self._send(job, Event("image", job.image, job.index, result))
                self._open[job.handle].images += 1
                self._finish(job)
            elif station == "prefill":
                job.answer, text = result
                assert job.inputs is not None
                self._open[job.handle].input_tokens = int(job.inputs.attention_mask.sum())
                job.inputs = None
                self._advance_answer(job, text)
            else:
                self._advance_answer(job, result)

    def _advance_answer(self, job: AnswerJob, text: str) -> None:
        assert job.answer is not None
        self.statistics.tokens += 1
        self._open[job.handle].units += 1
        if text:
            self._send(job, Event("text", text=text))
        if job.answer.ended:
            self._open[job.handle].ended_by_length = job.answer.ended_by_length
            self._finish(job)

    def _advance_steps(self, batch: Sequence[ImageJob], results: Sequence[Value]) -> None:
        self._fail_where_not_finite(batch, results)
        previews = []
        for job, latents in zip(batch, results, strict=True):
            if job.handle not in self._open:
                continue
            job.latents = latents
            job.index += 1
            self._open[job.handle].units += 1
            self._send(job, Event("progress", job.image, job.index))
            every = job.request.preview_every
            if every and job.index % every == 0 and job.index + 1 < len(job.times):
                previews.append(job)
        rows = self._max_rows("decode")
        for first in range(0, len(previews), rows):
            self._send_previews(previews[first : first + rows])

    def _send_previews(self, jobs: list[ImageJob]) -> None:
        """Sends previews; one that cannot be decoded is left out and harms nobody."""
        started = self._clock()
        try:
            decoded = self._compute("decode", jobs)
        except Exception as error:
            _LOG.warning("a preview of %d images failed: %s", len(jobs), one_line(error))
            middle = len(jobs) // 2
            for half in (jobs[:middle], jobs[middle:]) if middle else ():
                self._send_previews(half)
            return
        self.statistics.busy_seconds["preview"] += self._clock() - started
        for job, pixels in zip(jobs, decoded, strict=True):
            self._send(job, Event("preview", job.image, job.index, pixels))

    def _fail_where_not_finite(self, batch: Sequence[ImageJob], results: Sequence[Value]) -> None:
        """Fails the requests with latents that are not finite, not those that share their batch.

        Latents on a device are looked at before they are decoded: until then nothing has to leave it.
        """
        for job, latents in zip(batch, results, strict=True):
            try:
                if isinstance(latents, np.ndarray):
                    _finite(latents)
            except EngineError as error:
                if job.handle in self._open:
                    self._fail(job.handle, error)

    def _send(self, job: Job, event: Event) -> None:
        opened = self._open[job.handle]
        opened.first_event = opened.first_event or self._clock()
        job.handle.send(event)

    def _finish(self, job: Job) -> None:
        opened = self._open[job.handle]
        with self._work:
            opened.jobs.remove(job)
            self._count(opened.request, -1)
        if not opened.jobs and job.handle.cancelled:  # also by a listener that failed: its images are lost
            self._end(job.handle, "cancelled", CancelledError("the request was cancelled"))
        elif not opened.jobs:
            self._end(job.handle, "finished")

    def _drop_abandoned(self) -> None:
        """Removes the requests that were cancelled, missed their deadline, or could not be read."""
        now = self._clock()
        with self._lock:
            opened = [(handle, request.jobs[0]) for handle, request in self._open.items()]
        for handle, job in opened:
            if handle.cancelled:
                self._end(handle, "cancelled", CancelledError("the request was cancelled"))
            elif job.expires <= now:
                deadline = handle.request.deadline
                message = f"the request was not finished within its deadline of {deadline:g} s"
                self._end(handle, "expired", DeadlineError(message))
            elif job.error is not None:
                self._end(handle, "rejected" if isinstance(job.error, InputError) else "failed", job.error)

    def _fail(self, handle: Handle, error: Exception) -> None:
        self._end(handle, "failed", error)

    def _end(self, handle: Handle, outcome: Outcome, error: Exception | None = None) -> None:
        """Tells a request its end, and then forgets it: a request that was not told is never forgotten."""
        opened = self._open[handle]
        handle.send(Event("done", usage=self._usage(opened)) if error is None else Event("failed", error=error))
        for job in opened.jobs:
            job.error = None  # it holds frames that hold the job: the request would wait for garbage collection
        with self._work:
            del self._open[handle]
            self._count(opened.request, -len(opened.jobs))
            self._work.notify_all()
        self._record(opened, outcome, error)

    def _usage(self, opened: OpenRequest) -> Usage:
        _, rows, columns = self._stations.latent_shape
        output = opened.images * rows * columns if opened.request.kind == "draw" else opened.units
        return Usage(opened.input_tokens, output, opened.ended_by_length)

    def _record(self, opened: OpenRequest, outcome: Outcome, error: Exception | None = None) -> None:
        self._count_end(opened.record(outcome, self._clock(), error))

    def _count_end(self, record: RequestRecord) -> None:
        self.statistics.count_end(record, self._clock())
        try:
            self._on_end(record)
        except Exception as failure:
            _LOG.error("the end of a request could not be recorded: %s", one_line(failure))


def _finite(latents: Value) -> np.ndarray:
    """Returns an image's latents on the host; raises `EngineError` if they are not finite."""
    on_host = to_host(latents)
    check_finite(on_host[None])
    return on_host
