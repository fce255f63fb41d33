"""Requests to a service, and the events that report on them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from queue import SimpleQueue
from typing import ClassVar, Literal, Self

import numpy as np

from runtime.answers import AnswerSettings
from runtime.chat import Message, images_in
from runtime.errors import InputError, one_line
from runtime.flow_time import (
    DEFAULT_GUIDANCE_SCALE,
    DEFAULT_SHIFT,
    DEFAULT_STEPS,
    check_guidance_scale,
    check_seeds,
)
from runtime.images import bytes_of

Listener = Callable[["Handle", "Event"], None]
RequestKind = Literal["draw", "ask"]
PRIORITIES = range(-2, 3)
HALF_OF_THE_QUEUE = -1
"""A quota that was not set: half of the queue, but room for one request of the largest size."""
_LOG = logging.getLogger("latte_flow")


@dataclass(frozen=True)
class Limits:
    """What a service accepts. The limits are parameters in the served model's configuration."""

    max_steps: int = 200
    max_images_per_request: int = 16
    max_queued_images: int = 1024
    """Images in the scheduler, waiting or running. More are refused rather than delayed without end."""
    max_rows_per_tick: int = 32
    """Rows in an expert's batch; a guided image has two. Plans may set a lower limit."""
    max_images_per_client: int = HALF_OF_THE_QUEUE
    """Images of one client in the scheduler; by default half of the queue, so that no client locks out the others.
    Requests without a client id count as one client's."""
    max_queued_questions: int = 256
    """Questions in the scheduler, waiting or being answered."""
    max_questions_per_client: int = HALF_OF_THE_QUEUE
    max_queued_bytes: int = 256 * 2**20
    """Bytes of the images of questions in the scheduler; half of it for each client."""
    max_new_tokens: int = 1024
    """Tokens of an answer."""
    max_answers_at_once: int = 8
    """Answers that are written together. Plans may set a lower limit."""
    max_tick_seconds: int = 120
    """A tick that takes longer makes the heartbeat fail."""
    priority_clients: str = "*"
    """Ids of the clients that may set a priority, separated by commas; "*" for everyone, "" for nobody."""

    def __post_init__(self) -> None:
        if self.max_images_per_client == HALF_OF_THE_QUEUE:
            half = max(self.max_queued_images // 2, min(self.max_images_per_request, self.max_queued_images))
            object.__setattr__(self, "max_images_per_client", half)
        if self.max_questions_per_client == HALF_OF_THE_QUEUE:
            object.__setattr__(self, "max_questions_per_client", max(1, self.max_queued_questions // 2))
        for name, value in asdict(self).items():
            if isinstance(value, int) and value < 1:
                raise InputError(f"the limit {name} must be at least 1, got {value}")

    def may_set_priority(self, client_id: str) -> bool:
        """Returns whether a client may set a priority."""
        return self.priority_clients == "*" or client_id in filter(None, self.priority_clients.split(","))

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> Self:
        """Reads limits from texts by name; limits that are not given have their defaults.

        Raises:
            InputError: a value is not a number, or is out of range.
        """
        values: dict[str, int | str] = {}
        for limit in fields(cls):
            text = parameters.get(limit.name)
            if text is None:
                continue
            if isinstance(limit.default, int) and not text.isdecimal():
                raise InputError(f"the limit {limit.name} must be a whole number, got {text!r}")
            values[limit.name] = int(text) if isinstance(limit.default, int) else text
        return cls(**values)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class ServiceRequest:
    """What every request may say.

    Args:
        priority: −2 to 2; requests with a higher priority are served first.
        deadline: seconds from the submission after which the request fails; None for no deadline.
        client_id: who asks; a client's requests share its quota and its weight. Requests without one share a quota.
        request_id: the request's name in the log.
    """

    priority: int = 0
    deadline: float | None = None
    client_id: str = ""
    request_id: str = ""

    def check(self, limits: Limits) -> None:
        """Raises `InputError` for a value that cannot work or exceeds a limit."""
        if self.priority not in PRIORITIES:
            raise InputError(f"priority must be from {PRIORITIES[0]} to {PRIORITIES[-1]}, got {self.priority}")
        if self.priority and not limits.may_set_priority(self.client_id):
            who = f"client {self.client_id!r}" if self.client_id else "a client without an id"
            raise InputError(f"{who} may not set a priority here; leave it out")
        if self.deadline is not None and not (np.isfinite(self.deadline) and self.deadline > 0):
            raise InputError(f"deadline must be a positive number of seconds, got {self.deadline}")


@dataclass(frozen=True)
class GenerationRequest(ServiceRequest):
    """A request for images of one prompt.

    Args:
        prompt: what to draw.
        negative_prompt: what the images should not show.
        num_inference_steps: number of Euler steps.
        guidance_scale: s in v = v_u + s·(v_c − v_u); 1 disables guidance and halves the cost.
        shift: time-grid shift; above 1 the steps are shorter near the noise.
        seed: image i is drawn from seed + i.
        num_images: number of images.
        preview_every: number of steps between decoded previews; 0 sends none.
    """

    kind: ClassVar[RequestKind] = "draw"
    prompt: str
    negative_prompt: str = ""
    num_inference_steps: int = DEFAULT_STEPS
    guidance_scale: float = DEFAULT_GUIDANCE_SCALE
    shift: float = DEFAULT_SHIFT
    seed: int = 0
    num_images: int = 1
    preview_every: int = 0

    @property
    def num_jobs(self) -> int:
        """Number of units of work."""
        return self.num_images

    def check(self, limits: Limits) -> None:
        """Raises `InputError` for a value that cannot work or exceeds a limit."""
        super().check(limits)
        _check_range("num_inference_steps", self.num_inference_steps, limits.max_steps)
        _check_range("num_images", self.num_images, limits.max_images_per_request)
        check_guidance_scale(self.guidance_scale)
        check_seeds((self.seed, self.seed + self.num_images - 1))
        if self.preview_every < 0:
            raise InputError(f"preview_every must be 0 or more steps, got {self.preview_every}")


@dataclass(frozen=True)
class AnswerRequest(ServiceRequest):
    """A request for an answer to a conversation, in the Hugging Face chat format."""

    kind: ClassVar[RequestKind] = "ask"
    conversation: tuple[Message, ...]
    settings: AnswerSettings = field(default_factory=AnswerSettings)

    @property
    def num_jobs(self) -> int:
        """Number of units of work."""
        return 1

    @cached_property
    def image_bytes(self) -> int:
        """Bytes that its images have in memory, before they are decoded."""
        return sum(bytes_of(image) for image in images_in(self.conversation))

    def check(self, limits: Limits) -> None:
        """Raises `InputError` for a value that cannot work or exceeds a limit."""
        super().check(limits)
        _check_range("max_new_tokens", self.settings.max_new_tokens, limits.max_new_tokens)
        if (size := self.image_bytes) > (most := limits.max_queued_bytes // 2):
            raise InputError(f"the images of a question have {size} bytes, the limit is {most}; make them smaller")


AnyRequest = GenerationRequest | AnswerRequest


def _check_range(name: str, value: int, largest: int) -> None:
    if not 1 <= value <= largest:
        raise InputError(f"{name} must be from 1 to {largest}, got {value}")


@dataclass(frozen=True)
class Usage:
    """What a finished request took."""

    input_tokens: int
    """Tokens of the prompt, or of the conversation with its images, in the chat template."""
    output_tokens: int
    """Latents of all images, or tokens of the answer, the last included."""
    ended_by_length: bool = False
    """Whether an answer was cut off by a limit instead of ending by itself."""


@dataclass(frozen=True)
class Event:
    """Progress of an image, a preview, a finished image, a piece of an answer, or the end of a request."""

    kind: Literal["progress", "preview", "image", "text", "done", "failed"]
    image: int = 0
    """Index of the image in the request."""
    step: int = 0
    """Number of steps that the image has finished."""
    pixels: np.ndarray | None = None
    """`[height, width, 3]` uint8, for "preview" and "image"."""
    text: str = ""
    """The new text, for "text"."""
    error: Exception | None = None
    """The reason, for "failed"."""
    usage: Usage | None = None
    """For "done"."""


class Handle:
    """A submitted request, from its owner's side. Safe to use from any thread."""

    def __init__(self, request: AnyRequest, listener: Listener | None = None) -> None:
        self.request = request
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._listener = listener
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Cancels the request before the next tick. Events that were sent already stay valid."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def send(self, event: Event) -> None:
        """Sends an event to the owner. Only the scheduler calls this. A listener that raises loses its request."""
        if self._listener is None:
            self._events.put(event)
            return
        try:
            self._listener(self, event)
        except Exception as error:
            _LOG.error("a listener failed on %s: %s", event.kind, one_line(error), exc_info=error)
            self.cancel()

    def events(self, timeout: float | None = None) -> Iterator[Event]:
        """Yields events as they come; the last is "done" or "failed".

        Args:
            timeout: seconds to wait for each event; after that `queue.Empty` is raised.
        """
        while True:
            event = self._events.get(timeout=timeout)
            yield event
            if event.kind in ("done", "failed"):
                return

    def answer(self, timeout: float | None = None) -> str:
        """Waits for the answer to a question.

        Raises:
            LatteFlowError: the request failed, was cancelled, or missed its deadline.
        """
        pieces = []
        for event in self.events(timeout):
            if event.kind == "failed" and event.error is not None:
                raise event.error
            pieces.append(event.text)
        return "".join(pieces)

    def result(self, timeout: float | None = None) -> list[np.ndarray]:
        """Waits for the images, `[height, width, 3]` uint8 each.

        Raises:
            LatteFlowError: the request failed, was cancelled, or missed its deadline.
        """
        images: dict[int, np.ndarray] = {}
        for event in self.events(timeout):
            if event.kind == "image" and event.pixels is not None:
                images[event.image] = event.pixels
            elif event.kind == "failed" and event.error is not None:
                raise event.error
        return [images[index] for index in sorted(images)]
