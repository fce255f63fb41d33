"""Requests to a service, and what their owners are told."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Literal

import numpy as np

from runtime.errors import InputError

Listener = Callable[["Handle", "Event"], None]
PRIORITIES = range(-2, 3)


@dataclass(frozen=True)
class Limits:
    """What a service accepts: one place, reported to clients."""

    max_steps: int = 200
    max_images_per_request: int = 16
    max_queued_images: int = 256
    """Images in the scheduler, waiting or running; more are refused, not delayed without end."""
    max_rows_per_tick: int = 32
    """Rows of an expert's batch; a guided image is two."""


@dataclass(frozen=True)
class GenerationRequest:
    """Pictures of one prompt.

    Args:
        prompt: what to draw.
        negative_prompt: what guidance leads away from.
        num_inference_steps: Euler steps.
        guidance_scale: s in v = v_u + s·(v_c − v_u); 1 runs no unconditional row.
        shift: of the time grid; above 1 the steps are shorter near the noise.
        seed: image i is drawn from seed + i.
        num_images: pictures of the prompt.
        preview_every: steps between decoded previews; 0 sends none.
        priority: −2 to 2; a higher one is served first where not all can be.
        deadline: seconds from the submission after which the request is given up; None never.
    """

    prompt: str
    negative_prompt: str = ""
    num_inference_steps: int = 20
    guidance_scale: float = 3.0
    shift: float = 1.0
    seed: int = 0
    num_images: int = 1
    preview_every: int = 0
    priority: int = 0
    deadline: float | None = None

    def check(self, limits: Limits) -> None:
        """Raises `InputError` for a value that cannot work or is over a limit."""
        for name, value, largest in (
            ("num_inference_steps", self.num_inference_steps, limits.max_steps),
            ("num_images", self.num_images, limits.max_images_per_request),
        ):
            if not 1 <= value <= largest:
                raise InputError(f"{name} must be from 1 to {largest}, got {value}")
        if not np.isfinite(self.guidance_scale):
            raise InputError(f"guidance_scale must be a finite number, got {self.guidance_scale}")
        if self.seed < 0:
            raise InputError(f"a seed must not be negative, got {self.seed}")
        if self.preview_every < 0:
            raise InputError(f"preview_every must be 0 or more steps, got {self.preview_every}")
        if self.priority not in PRIORITIES:
            raise InputError(f"priority must be from {PRIORITIES[0]} to {PRIORITIES[-1]}, got {self.priority}")
        if self.deadline is not None and not (np.isfinite(self.deadline) and self.deadline > 0):
            raise InputError(f"deadline must be a positive number of seconds, got {self.deadline}")


@dataclass(frozen=True)
class Event:
    """What a request's handle tells: progress of an image, a preview, an image that is done, or the end."""

    kind: Literal["progress", "preview", "image", "done", "failed"]
    image: int = 0
    """Which image of the request."""
    step: int = 0
    """Steps that the image has behind it."""
    pixels: np.ndarray | None = None
    """`[height, width, 3]` uint8, of "preview" and "image"."""
    error: Exception | None = None
    """Of "failed"."""


class Handle:
    """A submitted request, as its owner sees it. Safe to use from any thread."""

    def __init__(self, request: GenerationRequest, listener: Listener | None = None) -> None:
        self.request = request
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._listener = listener
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Frees the request's places before the next tick. What is done already stays told."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def tell(self, event: Event) -> None:
        """Called by the scheduler."""
        if self._listener is None:
            self._events.put(event)
        else:
            self._listener(self, event)

    def events(self, timeout: float | None = None) -> Iterator[Event]:
        """Events as they come; the last is "done" or "failed".

        Args:
            timeout: seconds to wait for the next event; `queue.Empty` after that.
        """
        while True:
            event = self._events.get(timeout=timeout)
            yield event
            if event.kind in ("done", "failed"):
                return

    def result(self, timeout: float | None = None) -> list[np.ndarray]:
        """The images, `[height, width, 3]` uint8 each.

        Raises:
            LatteFlowError: the request failed, was cancelled or ran out of time.
        """
        images: dict[int, np.ndarray] = {}
        for event in self.events(timeout):
            if event.kind == "image" and event.pixels is not None:
                images[event.image] = event.pixels
            elif event.kind == "failed" and event.error is not None:
                raise event.error
        return [images[index] for index in sorted(images)]
