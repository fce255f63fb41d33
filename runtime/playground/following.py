"""Requests of the playground, followed from a page: how far a drawing is, and an answer as it is written."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue

import numpy as np

from runtime.errors import ServiceError
from runtime.flow_time import time_grid
from runtime.serving.requests import AnswerRequest, AnyRequest, Event, GenerationRequest, Handle
from runtime.serving.service import Service

MOST_PREVIEWS = 12
"""Previews of an image; each is decoded."""
QUIET_SECONDS = 5.0
"""After so long without an event the service is asked whether it still works."""


class Sessions:
    """The open requests of each page, so that a button, or closing the page, cancels them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._handles: defaultdict[str, set[Handle]] = defaultdict(set)

    def add(self, session: str, handle: Handle) -> None:
        """Remembers a request until it is removed."""
        with self._lock:
            self._handles[session].add(handle)

    def remove(self, session: str, handle: Handle) -> None:
        """Forgets a request."""
        with self._lock:
            self._handles[session].discard(handle)
            if not self._handles[session]:
                del self._handles[session]

    def cancel(self, session: str) -> None:
        """Cancels all requests of a page before their next step."""
        with self._lock:
            for handle in self._handles.get(session, ()):
                handle.cancel()


@dataclass(frozen=True)
class Frame:
    """How far a drawing is."""

    step: int
    """Number of steps that the slowest image has finished."""
    steps: int
    group: int | None
    """The expert group that works now; None at the end."""
    images: tuple[np.ndarray, ...]
    """The newest preview of each image that has one, or the image itself, `[height, width, 3]` uint8."""
    trajectory: tuple[np.ndarray, ...]
    """The previews of the first image so far, and last the image."""
    fresh: bool
    """Whether there are images or previews that the frame before did not have."""
    done: bool


def _events(service: Service, request: AnyRequest, sessions: Sessions, session: str) -> Iterator[Event]:
    """Yields a request's events; "failed" is raised. Leaving early cancels the request."""
    queue: SimpleQueue[Event] = SimpleQueue()
    handle = service.submit(request, lambda _, event: queue.put(event))
    sessions.add(session, handle)
    try:
        while True:
            try:
                event = queue.get(timeout=QUIET_SECONDS)
            except Empty:
                service.check()
                continue
            if event.kind == "failed":
                raise event.error or ServiceError("the request failed without a reason")
            yield event
            if event.kind == "done":
                return
    finally:
        handle.cancel()  # which does nothing to a request that has ended
        sessions.remove(session, handle)


def draw(
    service: Service, request: GenerationRequest, sessions: Sessions, session: str, pause: float = 0.1
) -> Iterator[Frame]:
    """Yields frames of a drawing, and last the one with its images.

    Args:
        pause: seconds between two frames at least, since a page takes time to show each.

    Raises:
        LatteFlowError: the request was refused, failed, or was cancelled.
    """
    model, steps = service.model, request.num_inference_steps
    request = replace(request, preview_every=max(1, -(-steps // MOST_PREVIEWS)))
    times = time_grid(steps, request.shift)
    images: dict[int, np.ndarray] = {}
    finished = [0] * request.num_images
    trajectory: list[np.ndarray] = []
    shown, fresh = time.monotonic(), False
    for event in _events(service, request, sessions, session):
        if event.kind in ("progress", "preview", "image"):
            finished[event.image] = max(finished[event.image], event.step)
        if event.pixels is not None:
            images[event.image] = event.pixels
            fresh = True
            if event.image == 0:
                trajectory.append(event.pixels)
        if event.kind == "done" or time.monotonic() - shown >= pause:
            shown, step = time.monotonic(), min(finished)
            group = None if step == steps else model.schedule.group_of(times[step])
            so_far = tuple(images[index] for index in sorted(images))
            yield Frame(step, steps, group, so_far, tuple(trajectory), fresh, event.kind == "done")
            fresh = False


def answer(service: Service, request: AnswerRequest, sessions: Sessions, session: str) -> Iterator[str]:
    """Yields an answer as far as it is written.

    Raises:
        LatteFlowError: the request was refused, failed, or was cancelled.
    """
    text = ""
    for event in _events(service, request, sessions, session):
        if event.kind == "text":
            text += event.text
            yield text
    yield text
