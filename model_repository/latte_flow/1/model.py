"""The Triton model `latte_flow`: images and answers from one process, which has the VLM's weights in memory once.

The model is decoupled: a request has one response, or several with progress, previews or a streamed answer. The
scheduler makes the batches, step by step, so Triton's batcher is off.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import triton_python_backend_utils as pb_utils

from model_repository.outbox import Outbox
from model_repository.schema import (
    CANCELLED,
    CLIENT_HEADER,
    DEADLINE,
    DRAIN_SECONDS,
    INTERNAL,
    INVALID,
    MODEL,
    UNAVAILABLE,
    AnyWanted,
    AskRequest,
    CancelRequest,
    HeartbeatRequest,
    read_request,
)
from runtime.errors import (
    CancelledError,
    DeadlineError,
    InputError,
    LatteFlowError,
    ServiceError,
    one_line,
)
from runtime.manifest import load_manifest
from runtime.pipeline import LatteFlowPipeline
from runtime.serving.log import log_request, set_up_logging
from runtime.serving.metrics import Metrics
from runtime.serving.requests import Event, Limits
from runtime.serving.scheduler import Scheduler
from runtime.serving.service import ServedModel, warm_up
from runtime.serving.stations import PipelineStations
from runtime.serving.worker import Worker

LAST_WORDS_SECONDS = 2.0
"""Time for the errors of open requests to leave, when the process must end."""
BROKEN = 70
"""Exit code of a process that cannot go on."""
_LOG = logging.getLogger("latte_flow")


class TritonPythonModel:
    """One instance is the whole service."""

    def initialize(self, args: dict[str, str]) -> None:
        parameters = {
            name: value["string_value"] for name, value in json.loads(args["model_config"])["parameters"].items()
        }
        set_up_logging(parameters.get("log_format", "text"))
        bundle = Path(args["model_repository"]) / args["model_version"] / "bundle"
        if parameters["layout"] == "per-engine":
            # Imported here, because only this layout needs it.
            from model_repository.bls import BlsBackend

            self.pipeline = LatteFlowPipeline(bundle, load_manifest(bundle), BlsBackend())
            list(self.pipeline.engines.values())  # opens all now: later a new bundle may be in their files' place
        else:
            self.pipeline = LatteFlowPipeline.from_pretrained(
                bundle, parameters["provider"], json.loads(parameters.get("provider_options", "{}"))
            )
            warm_up(self.pipeline)
        limits = Limits.from_parameters(parameters)
        stations = PipelineStations(self.pipeline)
        self.scheduler = Scheduler(stations, time.monotonic, limits, on_end=log_request)
        self.metrics = Metrics(pb_utils.MetricFamily, self.pipeline.manifest.schedule.num_groups)
        self.outbox = Outbox(end_process, self._report)
        self.worker = Worker(self.scheduler, self._break_down)

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            try:
                self._take(request, TritonSender(request.get_response_sender()))
            except Exception as error:
                _LOG.error("a request was lost: %s", one_line(error), exc_info=error)

    def _take(self, request: Any, sender: TritonSender) -> None:
        try:
            wanted = self._read(request)
            if isinstance(wanted, HeartbeatRequest):
                self.worker.check()
                sender.send({"event": "done", "text": self._state()}, last=True)
                return
            if isinstance(wanted, CancelRequest):
                cancelled = self.outbox.cancel(wanted.request_id, wanted.client_id)
                sender.send({"event": "done", "text": json.dumps({"cancelled": cancelled})}, last=True)
                return
        except Exception as error:
            sender.fail(error)
            return
        delivery = self.outbox.open(sender, wanted)
        try:
            submitted = wanted.answer if isinstance(wanted, AskRequest) else wanted.generation
            self.outbox.attach(delivery, self.scheduler.submit(submitted, delivery.receive))
        except Exception as error:
            delivery.receive(None, Event("failed", error=error))

    def _read(self, request: Any) -> AnyWanted:
        tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        parameters = json.loads(request.parameters() or "{}")
        try:
            return read_request(tensors, parameters, request.request_id(), self.pipeline.manifest.sampling)
        except Exception as error:
            kind: Literal["draw", "ask"] = "draw" if "prompt" in tensors else "ask"
            client = str(parameters.get(CLIENT_HEADER, ""))
            self.scheduler.count_rejected(kind, request.request_id(), client, error)
            raise

    def _state(self) -> str:
        """What a heartbeat answers, as JSON: how the service does, what it serves, and what it accepts."""
        model = ServedModel.of(self.pipeline.manifest, MODEL)
        state = {
            "pending_images": self.scheduler.pending,
            "pending_questions": self.scheduler.pending_questions,
            "seconds_since_heartbeat": round(self.worker.seconds_since_heartbeat, 3),
            "model": {
                "height": model.height,
                "width": model.width,
                "boundaries": model.schedule.boundaries,
                "sampling": model.sampling.model_dump(),
            },
            "limits": asdict(self.scheduler.limits),
        }
        return json.dumps(state)

    def _report(self) -> None:
        self.metrics.update([self.scheduler], [self.worker], self.outbox.open_requests)

    def _break_down(self, error: BaseException) -> None:
        self.outbox.drain(LAST_WORDS_SECONDS)
        end_process(error)

    def finalize(self) -> None:
        """Returns when every request was told its end."""
        give_up = time.monotonic() + DRAIN_SECONDS
        drained = self.worker.drain(DRAIN_SECONDS)
        self.worker.close()
        if not drained:
            self.scheduler.abort(ServiceError("the service ended before it had finished the request"))
        self.outbox.drain(max(LAST_WORDS_SECONDS, give_up - time.monotonic()))
        self.outbox.close()
        self.pipeline.close()


def end_process(error: BaseException) -> None:
    """Ends this process, so that requests fail visibly instead of waiting for ever."""
    _LOG.critical("the service ends with code %d: %s", BROKEN, one_line(error))
    os._exit(BROKEN)


class TritonSender:
    """The response sender of one request. Asking about a request that has ended ends the server: see the outbox."""

    def __init__(self, sender: Any) -> None:
        self._sender = sender

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
        prefix = ""
        if isinstance(error, InputError):
            code = INVALID
        elif isinstance(error, CancelledError):
            code = CANCELLED
        elif isinstance(error, DeadlineError):
            code, prefix = UNAVAILABLE, DEADLINE
        elif isinstance(error, ServiceError):
            code = UNAVAILABLE
        if isinstance(error, LatteFlowError):
            message = one_line(error)
        else:
            _LOG.error("%s: %s", type(error).__name__, one_line(error), exc_info=error)
        failure = pb_utils.TritonError(f"{prefix or code}: {message}", getattr(pb_utils.TritonError, code))
        self._send(pb_utils.InferenceResponse(error=failure), last=True)

    def is_cancelled(self) -> bool:
        """Returns whether the client has cancelled; a round trip to the server."""
        return bool(self._sender.is_cancelled())

    def _send(self, response: Any, last: bool) -> None:
        self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if last else 0)
