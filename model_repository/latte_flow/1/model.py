"""The Triton model `latte_flow`: images and answers from one process, which has the VLM's weights in memory once.

The model is decoupled: a request has one response, or several with progress, previews or a streamed answer. The
scheduler makes the batches, step by step, so Triton's batcher is off.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from model_repository.outbox import Outbox
from model_repository.schema import (
    CANCELLED,
    INTERNAL,
    INVALID,
    UNAVAILABLE,
    AskRequest,
    read_request,
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
from runtime.serving.requests import Event, Limits
from runtime.serving.scheduler import Scheduler
from runtime.serving.stations import PipelineStations
from runtime.serving.worker import Worker

DRAIN_SECONDS = 60.0
LAST_WORDS_SECONDS = 2.0
"""Time for the errors of open requests to leave, when the process must end."""
BROKEN = 70
"""Exit code of a process that cannot go on."""
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
        self.scheduler = Scheduler(PipelineStations(self.pipeline), time.monotonic, Limits.from_parameters(parameters))
        self.metrics = Metrics(self.pipeline.manifest.schedule.num_groups)
        self.outbox = Outbox(end_process, lambda: self.metrics.update(self.scheduler))
        self.worker = Worker(self.scheduler, self._break_down)
        self.answers = ThreadPoolExecutor(max_workers=1, thread_name_prefix="answers")
        self.questions = 0

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            try:
                self._take(request, TritonSender(request.get_response_sender()))
            except Exception as error:
                pb_utils.Logger.log_error(f"latte_flow: a request was lost: {one_line(error)}")

    def _take(self, request: Any, sender: TritonSender) -> None:
        try:
            wanted = read_request({tensor.name(): tensor.as_numpy() for tensor in request.inputs()})
        except Exception as error:
            sender.fail(error)
            return
        if isinstance(wanted, AskRequest):
            try:
                self._ask(wanted, sender)
            except Exception as error:
                sender.fail(error)
            return
        delivery = self.outbox.open(sender, wanted)
        try:
            delivery.handle = self.scheduler.submit(wanted.generation, delivery.receive)
        except Exception as error:
            delivery.receive(None, Event("failed", error=error))

    def _ask(self, wanted: AskRequest, sender: TritonSender) -> None:
        if self.questions >= MAX_QUEUED_QUESTIONS:
            raise QueueFullError(f"{self.questions} questions are waiting already; try again later")
        self.questions += 1
        self.answers.submit(self._answer, wanted, sender)

    def _answer(self, wanted: AskRequest, sender: TritonSender) -> None:
        try:
            pieces = []
            for (piece,) in self.pipeline.answerer.stream([wanted.conversation], wanted.settings):
                if sender.is_cancelled():
                    raise CancelledError("the request was cancelled")
                pieces.append(piece)
                if wanted.stream and piece:
                    sender.send({"event": "text", "text": piece})
            sender.send({"event": "done", "text": "".join(pieces)}, last=True)
        except Exception as error:
            sender.fail(error)
        finally:
            self.questions -= 1

    def _break_down(self, error: BaseException) -> None:
        self.outbox.drain(LAST_WORDS_SECONDS)
        end_process(error)

    def finalize(self) -> None:
        """Returns when every request was told its end."""
        self.worker.drain(DRAIN_SECONDS)
        self.answers.shutdown(wait=True)
        self.outbox.drain(DRAIN_SECONDS)
        self.outbox.close()
        self.worker.close()
        self.pipeline.close()


def end_process(error: BaseException) -> None:
    """Ends this process, so that the server reports the model as broken instead of letting requests wait for ever."""
    pb_utils.Logger.log_error(f"latte_flow: ends with code {BROKEN}: {one_line(error)}")
    os._exit(BROKEN)


def warm_up(pipeline: LatteFlowPipeline) -> None:
    """Loads and runs every engine once, so that the first request is as fast as later ones."""
    images = pipeline("", num_inference_steps=pipeline.manifest.schedule.num_groups, seed=0, output_type="np").images
    pipeline.ask(images[0], "?", max_new_tokens=2)


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
            "last image": pb_utils.MetricFamily(
                "latte_flow_last_image_timestamp_seconds", "When the last image was drawn", pb_utils.MetricFamily.GAUGE
            ),
        }
        self._pending = self._families["pending"].Metric(labels={})
        self._last_image = self._families["last image"].Metric(labels={})
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
        self._last_image.set(statistics.last_image_time)

    def _set(self, family: str, label: str, value: str, total: float) -> None:
        key = (family, label, value)
        if key not in self._counters:
            self._counters[key] = (self._families[family].Metric(labels={label: value}), 0.0)
        metric, reported = self._counters[key]
        if total > reported:
            metric.increment(total - reported)
            self._counters[key] = (metric, total)


class TritonSender:
    """The response sender of one request."""

    def __init__(self, sender: Any) -> None:
        self._sender = sender
        self._lock = threading.Lock()
        self._is_open = True

    def send(self, outputs: Mapping[str, str | int | np.ndarray], *, last: bool = False) -> None:
        """Sends one response; text and numbers become tensors with one value."""
        tensors = []
        for name, value in outputs.items():
            if isinstance(value, str):
                value = np.array([value.encode()], dtype=np.object_)
            elif not isinstance(value, np.ndarray):
                value = np.array([value], dtype=np.int32)
            tensors.append(pb_utils.Tensor(name, value))
        self._send(pb_utils.InferenceResponse(tensors), last)

    def fail(self, error: Exception) -> None:
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
        self._send(pb_utils.InferenceResponse(error=failure), last=True)

    def is_cancelled(self) -> bool:
        """Returns whether the client has cancelled; a round trip to the server."""
        with self._lock:  # asking after the last response, or during it, ends the server
            return self._is_open and bool(self._sender.is_cancelled())

    def _send(self, response: Any, last: bool) -> None:
        with self._lock:
            self._is_open = not last
            self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if last else 0)
