"""The Triton model `latte_flow`: images and answers from one process, which has the VLM's weights in memory once.

The model is decoupled: a request has one response, or several with progress, previews or a streamed answer. The
scheduler makes the batches, step by step, so Triton's batcher is off.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from model_repository.schema import (
    CANCELLED,
    INTERNAL,
    INVALID,
    UNAVAILABLE,
    AskRequest,
    DrawRequest,
    read_request,
    write_images,
)
from runtime.errors import (
    CancelledError,
    DeadlineError,
    InputError,
    LatteFlowError,
    QueueFullError,
    ServiceError,
    one_line,
)
from runtime.manifest import load_manifest
from runtime.pipeline import LatteFlowPipeline
from runtime.serving.requests import Event, Handle, Limits
from runtime.serving.scheduler import Scheduler, Worker
from runtime.serving.stations import PipelineStations

CANCEL_POLL_SECONDS = 0.01
DRAIN_SECONDS = 60.0
MAX_QUEUED_QUESTIONS = 64


class TritonPythonModel:
    """One instance is the whole service."""

    def initialize(self, args: dict[str, str]) -> None:
        parameters = {
            name: value["string_value"] for name, value in json.loads(args["model_config"])["parameters"].items()
        }
        bundle = Path(args["model_repository"]) / args["model_version"] / "bundle"
        if parameters["layout"] == "per-engine":
            # Imported here, because only this layout needs it.
            from model_repository.bls import BlsBackend

            self.pipeline = LatteFlowPipeline(bundle, load_manifest(bundle), BlsBackend())
        else:
            self.pipeline = LatteFlowPipeline.from_pretrained(bundle, provider=parameters["provider"])
            warm_up(self.pipeline)
        limits = Limits(**{field.name: int(parameters[field.name]) for field in fields(Limits)})
        self.scheduler = Scheduler(PipelineStations(self.pipeline), time.monotonic, limits)
        self.worker = Worker(self.scheduler)
        self.metrics = Metrics(self.pipeline.manifest.schedule.num_groups)
        self.outbox = Outbox(self.scheduler, self.metrics)
        self.answers = ThreadPoolExecutor(max_workers=1, thread_name_prefix="answers")
        self.questions = 0

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:
                wanted = read_request({tensor.name(): tensor.as_numpy() for tensor in request.inputs()})
                if isinstance(wanted, DrawRequest):
                    self.outbox.add(wanted, self.scheduler.submit(wanted.generation, self.outbox.receive), sender)
                else:
                    self._ask(wanted, sender)
            except Exception as error:
                send_error(sender, error)

    def _ask(self, wanted: AskRequest, sender: Any) -> None:
        if self.questions >= MAX_QUEUED_QUESTIONS:
            raise QueueFullError(f"{self.questions} questions are waiting already; try again later")
        self.questions += 1
        self.answers.submit(self._answer, wanted, sender)

    def _answer(self, wanted: AskRequest, sender: Any) -> None:
        try:
            pieces = []
            for (piece,) in self.pipeline.answerer.stream([wanted.conversation], wanted.settings):
                if sender.is_cancelled():
                    raise CancelledError("the request was cancelled")
                pieces.append(piece)
                if wanted.stream and piece:
                    send(sender, {"event": "text", "text": piece})
            send(sender, {"event": "done", "text": "".join(pieces)}, last=True)
        except Exception as error:
            send_error(sender, error)
        finally:
            self.questions -= 1

    def finalize(self) -> None:
        self.worker.drain(DRAIN_SECONDS)
        self.answers.shutdown(wait=True)
        self.outbox.close()
        self.worker.close()
        self.pipeline.close()


def warm_up(pipeline: LatteFlowPipeline) -> None:
    """Loads and runs every engine once, so that the first request is as fast as later ones."""
    images = pipeline("", num_inference_steps=pipeline.manifest.schedule.num_groups, seed=0, output_type="np").images
    pipeline.ask(images[0], "?", max_new_tokens=2)


class Outbox:
    """Sends the scheduler's events as responses and passes cancellations on, from a thread of its own."""

    def __init__(self, scheduler: Scheduler, metrics: Metrics) -> None:
        self._scheduler = scheduler
        self._metrics = metrics
        self._events: SimpleQueue[tuple[Handle, Event]] = SimpleQueue()
        self._open: dict[Handle, tuple[DrawRequest, Any, dict[int, np.ndarray]]] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="outbox", daemon=True)
        self._thread.start()

    def receive(self, handle: Handle, event: Event) -> None:
        self._events.put((handle, event))

    def add(self, wanted: DrawRequest, handle: Handle, sender: Any) -> None:
        with self._lock:
            self._open[handle] = (wanted, sender, {})

    def _work(self) -> None:
        looked = 0.0
        while not self._stop.is_set():
            try:
                handle, event = self._events.get(timeout=CANCEL_POLL_SECONDS)
            except Empty:
                pass
            else:
                self._send(handle, event)
            now = time.monotonic()
            if now - looked > CANCEL_POLL_SECONDS:
                looked = now
                with self._lock:
                    waiting = list(self._open.items())
                for handle, (_, sender, _) in waiting:
                    if sender.is_cancelled():
                        handle.cancel()
                self._metrics.update(self._scheduler)

    def _send(self, handle: Handle, event: Event) -> None:
        with self._lock:
            known = self._open.get(handle)
        if known is None:
            # The event came before `add`, which follows `submit` at once.
            self._events.put((handle, event))
            return
        wanted, sender, done = known
        if event.kind == "image" and event.pixels is not None:
            done[event.image] = event.pixels
        elif event.kind == "preview" and event.pixels is not None:
            name, value = write_images(event.pixels[None], wanted.image_format)
            send(sender, {"event": "preview", "image_index": event.image, "step": event.step, name: value})
        elif event.kind == "progress" and wanted.progress:
            send(sender, {"event": "progress", "image_index": event.image, "step": event.step})
        elif event.kind in ("done", "failed"):
            with self._lock:
                del self._open[handle]
            if event.error is not None:
                send_error(sender, event.error)
            else:
                name, value = write_images(np.stack([done[i] for i in sorted(done)]), wanted.image_format)
                send(sender, {"event": "done", name: value}, last=True)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


class Metrics:
    """The scheduler's statistics on Triton's metrics endpoint."""

    COUNTED = ("submitted", "finished", "failed", "cancelled", "rejected", "expired")

    def __init__(self, groups: int) -> None:
        counter = pb_utils.MetricFamily.COUNTER
        self._families = {
            "requests": pb_utils.MetricFamily("latte_flow_requests", "Requests by outcome", counter),
            "steps": pb_utils.MetricFamily("latte_flow_steps", "Steps of images by expert group", counter),
            "batches": pb_utils.MetricFamily("latte_flow_batches", "Runs of experts by images in the batch", counter),
            "seconds": pb_utils.MetricFamily(
                "latte_flow_seconds", "Time in experts, and waiting in the queue", counter
            ),
            "pending": pb_utils.MetricFamily("latte_flow_pending_images", "Images now", pb_utils.MetricFamily.GAUGE),
        }
        self._pending = self._families["pending"].Metric(labels={})
        self._counters: dict[tuple[str, str, str], tuple[Any, float]] = {}
        """Each metric with its current value, since reading it costs a call to the server."""
        for group in range(groups):
            self._set("steps", "group", str(group), 0)
        for name in self.COUNTED:
            self._set("requests", "outcome", name, 0)

    def update(self, scheduler: Scheduler) -> None:
        statistics = scheduler.statistics
        for name in self.COUNTED:
            self._set("requests", "outcome", name, getattr(statistics, name))
        for group, steps in list(statistics.steps_of_group.items()):
            self._set("steps", "group", str(group), steps)
        for size, runs in list(statistics.batch_sizes.items()):
            self._set("batches", "images", str(size), runs)
        self._set("seconds", "where", "experts", statistics.step_seconds)
        self._set("seconds", "where", "queue", statistics.queue_seconds)
        self._pending.set(scheduler.pending)

    def _set(self, family: str, label: str, value: str, total: float) -> None:
        key = (family, label, value)
        if key not in self._counters:
            self._counters[key] = (self._families[family].Metric(labels={label: value}), 0.0)
        metric, reported = self._counters[key]
        if total > reported:
            metric.increment(total - reported)
            self._counters[key] = (metric, total)


def send(sender: Any, outputs: Mapping[str, str | int | np.ndarray], *, last: bool = False) -> None:
    """Sends one response; text and numbers become tensors with one value."""
    tensors = []
    for name, value in outputs.items():
        if isinstance(value, str):
            value = np.array([value.encode()], dtype=np.object_)
        elif not isinstance(value, np.ndarray):
            value = np.array([value], dtype=np.int32)
        tensors.append(pb_utils.Tensor(name, value))
    flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if last else 0
    sender.send(pb_utils.InferenceResponse(tensors), flags=flags)


def send_error(sender: Any, error: Exception) -> None:
    """Sends the last response of a request that failed: a code and one line, without a traceback."""
    code, message = INTERNAL, "internal error; see the server's log"
    if isinstance(error, InputError):
        code = INVALID
    elif isinstance(error, (CancelledError, DeadlineError)):
        code = CANCELLED
    elif isinstance(error, ServiceError):
        code = UNAVAILABLE
    if isinstance(error, LatteFlowError):
        message = one_line(error)
    else:
        pb_utils.Logger.log_error(f"latte_flow: {type(error).__name__}: {one_line(error)}")
    failure = pb_utils.TritonError(f"{code}: {message}", getattr(pb_utils.TritonError, code))
    sender.send(pb_utils.InferenceResponse(error=failure), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
