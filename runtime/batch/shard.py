"""One shard: rows in, results out. Everything else of a batch is files.

A result depends on the rows of its shard, the bundle and the options, and on nothing else: not on how long anything
took, and not on the shards before. Rounding differs with what shares a run of an engine, so that the same runs must
come in the same order for the same bytes. That is why the policy here looks at no clock, and why questions are read
where they are needed instead of by threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from runtime.batch.fetching import Fetched, fetch
from runtime.batch.rows import Row, body_of, question_of, request_of, urls_of
from runtime.errors import InputError
from runtime.gateway.errors import ApiError, api_error
from runtime.gateway.images import encode
from runtime.gateway.schema import ChatBody, ImagesBody
from runtime.images import drawing_metadata, png_bytes
from runtime.pipeline import LatteFlowPipeline
from runtime.rows import is_guided
from runtime.serving.jobs import Job, Station
from runtime.serving.policy import MaxRows
from runtime.serving.requests import AnyRequest, Event, GenerationRequest, Handle, Limits, Usage
from runtime.serving.scheduler import Scheduler
from runtime.serving.service import ServedModel
from runtime.serving.stations import PipelineStations

ENCODERS = 2
"""Threads that write PNGs while the engines run."""
NO_LIMIT = 2**40
"""Who runs a batch has no others to protect."""
MAX_STEPS = 10_000
"""Steps of an image: a number that is meant, whose time grid fits in memory."""
MAX_IMAGES = 1_000
"""Images of a row."""


@dataclass(frozen=True)
class ShardOptions:
    """How rows are run."""

    batch_size: int = 16
    """Number of guided images, or of answers, that share a run of an engine."""
    model_name: str = "latte-flow"
    """Name that OpenAI's bodies may give."""
    allowed_image_hosts: tuple[str, ...] = ()
    """Hosts from which images at http URLs are fetched."""

    @property
    def limits(self) -> Limits:
        """Limits of the scheduler."""
        return Limits(
            max_steps=MAX_STEPS,
            max_images_per_request=MAX_IMAGES,
            max_queued_images=NO_LIMIT,
            max_images_per_client=NO_LIMIT,
            max_rows_per_tick=2 * self.batch_size,
            max_queued_questions=NO_LIMIT,
            max_questions_per_client=NO_LIMIT,
            max_queued_bytes=NO_LIMIT,
            max_new_tokens=NO_LIMIT,
            max_answers_at_once=self.batch_size,
        )


@dataclass(frozen=True)
class Result:
    """What became of a row."""

    row: Row
    body: ImagesBody | ChatBody | None = None
    request: AnyRequest | None = None
    files: tuple[bytes, ...] = ()
    """The images, as files."""
    text: str = ""
    """The answer."""
    usage: Usage | None = None
    error: ApiError | None = None
    """Why the row failed."""


class InOrder:
    """Runs the station where the first unfinished job waits, with the jobs after it that fit.

    Jobs that were sorted by their number of steps go through all stations together, in full batches.
    """

    def choose(self, waiting: dict[Station, list[Job]], now: float, max_rows: MaxRows) -> tuple[Station, list[Job]]:
        """Returns the station that runs next and its batch."""
        station = min(waiting, key=lambda name: min(job.number for job in waiting[name]))
        batch: list[Job] = []
        rows = 0
        for job in sorted(waiting[station], key=lambda job: job.number):
            rows += job.rows
            if batch and rows > max_rows(station):
                break
            batch.append(job)
        return station, batch

    def observe(self, station: Station, rows: int, seconds: float) -> None:
        """Ignores costs."""


class AtOnce(Executor):
    """Runs what is submitted before `submit` returns."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        """Runs a function."""
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments, **named))
        except Exception as error:
            future.set_exception(error)
        return future


class PendingResult:
    """A row that was run, while its images are still being encoded."""

    def __init__(self, row: Row) -> None:
        self.row = row
        self.body: ImagesBody | ChatBody | None = None
        self.request: AnyRequest | None = None
        self.error: Exception | None = None
        self.usage: Usage | None = None
        self._files: dict[int, Future[bytes]] = {}
        self._texts: list[str] = []

    def take(self, event: Event, start_encoding: Callable[[int, np.ndarray], Future[bytes]]) -> None:
        """Takes an event of its request."""
        if event.kind == "image" and event.pixels is not None:
            self._files[event.image] = start_encoding(event.image, event.pixels)
        elif event.kind == "text":
            self._texts.append(event.text)
        self.usage = event.usage or self.usage
        self.error = event.error or self.error

    def result(self) -> Result:
        """Waits for the images."""
        if self.error is not None:
            return Result(self.row, self.body, self.request, error=api_error(self.error))
        files = tuple(self._files[index].result() for index in sorted(self._files))
        return Result(self.row, self.body, self.request, files, "".join(self._texts), self.usage)


def run_shard(pipeline: LatteFlowPipeline, rows: Sequence[Row], options: ShardOptions) -> list[Result]:
    """Returns the results of rows, in their order: all that a worker elsewhere has to call."""
    with ThreadPoolExecutor(ENCODERS) as encoders:
        return [pending.result() for pending in start_shard(pipeline, rows, options, encoders)]


def start_shard(
    pipeline: LatteFlowPipeline,
    rows: Sequence[Row],
    options: ShardOptions,
    encoders: Executor,
    on_end: Callable[[], None] = lambda: None,
) -> list[PendingResult]:
    """Runs the engines for rows. The last images may still be encoded when it returns.

    Args:
        on_end: called for each row that is finished or has failed.
    """
    model = ServedModel.of(pipeline.manifest, options.model_name)
    bundle_hash = pipeline.manifest.bundle_hash()
    pipeline.prompts.cache.clear()  # a prompt that was encoded beside others differs by rounding
    scheduler = Scheduler(PipelineStations(pipeline), time.monotonic, options.limits, InOrder(), readers=AtOnce())
    all_pending = [PendingResult(row) for row in rows]
    urls = [url for pending in all_pending for url in _open_row(pending)]
    fetched = fetch(urls, options.allowed_image_hosts)
    for pending in all_pending:
        _prepare(pending, model, fetched)
    ready = [pending for pending in all_pending if pending.request is not None]
    for pending in sorted(ready, key=lambda pending: _order(pending.request)):
        _submit(scheduler, pending, encoders, bundle_hash, on_end)
    for pending in all_pending:
        if pending.error is not None:
            on_end()
    while scheduler.open_requests:
        scheduler.tick()
    scheduler.close()
    return all_pending


def _open_row(pending: PendingResult) -> list[str]:
    """Reads what a row asks for, and returns the URLs of its images."""
    try:
        if pending.row.error:
            raise InputError(pending.row.error)
        pending.body = body_of(pending.row)
        return urls_of(pending.row, pending.body)
    except InputError as error:
        pending.error = error
        return []


def _prepare(pending: PendingResult, model: ServedModel, fetched: Fetched) -> None:
    if pending.body is None or pending.error is not None:
        return
    try:
        pending.request = request_of(pending.row, pending.body, model, fetched)
    except InputError as error:
        pending.error = error


def _submit(
    scheduler: Scheduler, pending: PendingResult, encoders: Executor, bundle_hash: str, on_end: Callable[[], None]
) -> None:
    body, request = pending.body, pending.request
    assert body is not None
    assert request is not None

    def start_encoding(index: int, pixels: np.ndarray) -> Future[bytes]:
        assert isinstance(request, GenerationRequest)
        return encoders.submit(_file_of, pixels, body, request, index, bundle_hash)

    def listen(handle: Handle, event: Event) -> None:
        pending.take(event, start_encoding)
        if event.kind in ("done", "failed"):
            on_end()

    try:
        scheduler.submit(request, listen)
    except InputError as error:
        pending.error = error


def _file_of(
    pixels: np.ndarray, body: ImagesBody | ChatBody, request: GenerationRequest, index: int, bundle_hash: str
) -> bytes:
    if body.output_format != "png":
        return encode(pixels, body)
    metadata = drawing_metadata(
        request.prompt,
        negative_prompt=request.negative_prompt,
        seed=request.seed + index,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        shift=request.shift,
        bundle_hash=bundle_hash,
    )
    return png_bytes(Image.fromarray(pixels), metadata)


def _order(request: AnyRequest | None) -> tuple[float, ...]:
    """Returns a key that puts requests side by side whose runs have the same length."""
    if isinstance(request, GenerationRequest):
        guided = is_guided(request.guidance_scale)
        return (0, request.num_inference_steps, request.shift, guided, len(request.prompt))
    assert request is not None
    return (1, request.settings.max_new_tokens, len(question_of(request)))
