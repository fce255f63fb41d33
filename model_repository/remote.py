"""The service on a Triton server, as another front door sees it."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import Any

from model_repository.client import Client, Response, encoded
from runtime.chat import Message
from runtime.errors import DRAINING, DrainingError, LatteFlowError, QueueFullError, ServiceError, one_line
from runtime.flow_time import ExpertSchedule, SamplingDefaults
from runtime.serving.requests import (
    AnswerRequest,
    AnyRequest,
    Event,
    GenerationRequest,
    Handle,
    Limits,
    Listener,
)
from runtime.serving.service import ServedModel
from runtime.serving.worker import start_thread

MOST_STREAMS = 1024
"""Requests in flight; each has a thread and a stream."""


class TritonService:
    """Sends each request over a stream of its own, in a thread of its own; a `runtime.serving.service.Service`.

    Args:
        name: of the model.

    Raises:
        ServiceError: the server does not answer.
    """

    def __init__(self, client: Client, name: str = "latte-flow") -> None:
        state = client.describe()
        described = state["model"]
        schedule = ExpertSchedule(boundaries=tuple(described["boundaries"]))
        sampling = SamplingDefaults.model_validate(described["sampling"])
        self.model = ServedModel(name, described["height"], described["width"], schedule, sampling)
        self.limits = Limits(**state["limits"])
        self._client = client
        self._open: set[Handle] = set()
        self._changed = threading.Condition()
        self._draining = False

    def submit(self, request: AnyRequest, listener: Listener) -> Handle:
        """Sends a request; what the server refuses comes as a "failed" event. See `Service.submit`."""
        request.check(self.limits)
        handle = Handle(request, listener)
        with self._changed:
            if self._draining:
                raise DrainingError(f"{DRAINING} and takes no new requests; ask another one")
            if len(self._open) >= MOST_STREAMS:
                raise QueueFullError(f"{MOST_STREAMS} requests are in flight; try again in 1 s")
            self._open.add(handle)
        start_thread("stream", lambda: self._follow(handle), lambda error: None)
        return handle

    def _follow(self, handle: Handle) -> None:
        try:
            for response in self._client.responses(inputs_of(handle.request), lambda: handle.cancelled):
                for event in _events_of(response, handle.request):
                    handle.send(event)
        except LatteFlowError as error:
            handle.send(Event("failed", error=error))
        except Exception as error:
            handle.send(Event("failed", error=ServiceError(f"the request was lost: {one_line(error)}")))
            raise
        finally:
            with self._changed:
                self._open.discard(handle)
                self._changed.notify_all()

    def check(self) -> None:
        """Raises `ServiceError` unless the model's process answers."""
        if not self._client.answers():
            raise ServiceError(f"{self._client.url} does not answer")

    def drain(self, timeout: float) -> bool:
        """Refuses new requests and waits for those in flight; returns whether all ended in time."""
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: not self._open, timeout)

    def close(self) -> None:
        """Cancels what is in flight."""
        with self._changed:
            for handle in self._open:
                handle.cancel()
        self.drain(10.0)


def inputs_of(request: AnyRequest) -> dict[str, Any]:
    """Returns the inputs of the model `latte_flow` for a request."""
    inputs: dict[str, Any] = {"priority": request.priority}
    if request.deadline is not None:
        inputs["deadline"] = request.deadline
    if request.client_id:
        inputs["client_id"] = request.client_id
    return inputs | (_drawing(request) if isinstance(request, GenerationRequest) else _asking(request))


def _drawing(request: GenerationRequest) -> dict[str, Any]:
    names = ("prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "shift", "seed", "num_images")
    return {name: getattr(request, name) for name in (*names, "preview_every")}


def _asking(request: AnswerRequest) -> dict[str, Any]:
    images: list[bytes] = []
    messages = []
    for message in request.conversation:
        content = message["content"]
        parts = content if isinstance(content, str) else [_part(part, images) for part in content]
        messages.append({"role": message["role"], "content": parts})
    settings = request.settings
    inputs = {
        "messages": json.dumps(messages),
        "max_new_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "seed": settings.seed,
        "stream": True,
    }
    return inputs | ({"image": images} if images else {}) | ({"stop": settings.stop} if settings.stop else {})


def _part(part: Mapping[str, Any] | Message, images: list[bytes]) -> dict[str, Any]:
    if part["type"] == "text":
        return dict(part)
    images.append(encoded(part["image"]))
    return {"type": "image", "image": len(images) - 1}


def _events_of(response: Response, request: AnyRequest) -> list[Event]:
    if response.event == "text":
        return [Event("text", text=response.text or "")]
    if response.event == "preview" and response.images is not None:
        return [Event("preview", response.image_index or 0, response.step or 0, response.images[0])]
    if response.event != "done":
        return []
    images = () if response.images is None or isinstance(request, AnswerRequest) else response.images
    steps = request.num_inference_steps if isinstance(request, GenerationRequest) else 0
    return [*(Event("image", i, steps, pixels) for i, pixels in enumerate(images)), Event("done", usage=response.usage)]
