"""Sends the events of requests as responses: images are encoded in a pool, and nothing else delays a response.

Three kinds of threads share the work, so that none waits for another: one sends what is ready, a pool encodes images
on all cores, and one asks in turn whether requests were cancelled, which costs a round trip to the server each time.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Protocol

import numpy as np

from model_repository.schema import AskRequest, DrawRequest, ImageFormat, encode_image, write_images
from runtime.errors import one_line
from runtime.serving.requests import Event, Handle, ServiceRequest
from runtime.serving.worker import OnDeath, start_thread

WATCH_SECONDS = 0.005
"""Pause between two looks at cancellations."""
CANCEL_SECONDS = 1.0
"""A request is asked about at least this often, whatever their number."""
REPORT_SECONDS = 0.25
_LOG = logging.getLogger("latte_flow")
Output = str | int | np.ndarray


class Sender(Protocol):
    """The way back to the client of one request."""

    def send(self, outputs: Mapping[str, Output], *, last: bool = False) -> None:
        """Sends one response."""

    def fail(self, error: Exception) -> None:
        """Sends the error that ends the request."""

    def is_cancelled(self) -> bool:
        """Returns whether the client has cancelled; a round trip to the server."""


@dataclass(frozen=True)
class _Part:
    """An event whose turn has not come, and its image while that is encoded."""

    event: Event
    file: Future[bytes] | None = None


class Delivery:
    """The responses to one request, in the order of its events. `receive` is the request's listener."""

    def __init__(self, outbox: Outbox, sender: Sender, wanted: DrawRequest | AskRequest) -> None:
        self.sender = sender
        self.handle: Handle | None = None
        self.parts: deque[_Part] = deque()
        self.images: dict[int, np.ndarray | bytes] = {}
        self.texts: list[str] = []
        self.is_open = True
        self.lock = threading.Lock()
        """Held while the server is asked about the request and while it is told the end; asking later crashes it."""
        self.request: ServiceRequest = wanted.generation if isinstance(wanted, DrawRequest) else wanted.answer
        self.image_format: ImageFormat = wanted.image_format if isinstance(wanted, DrawRequest) else "raw"
        self.streams = isinstance(wanted, AskRequest) and wanted.stream
        self._outbox = outbox
        self._progress = isinstance(wanted, DrawRequest) and wanted.progress

    def receive(self, handle: Handle | None, event: Event) -> None:
        """Takes an event. Returns at once."""
        if not self.is_open or (event.kind == "progress" and not self._progress):
            return
        file = None
        if event.pixels is not None and self.image_format != "raw":
            file = self._outbox.encode(event.pixels, self.image_format)
        self.parts.append(_Part(event, file))
        if file is None:
            self._outbox.look_at(self)
        else:
            file.add_done_callback(lambda _: self._outbox.look_at(self))


class Outbox:
    """Owns the open deliveries and the threads that serve them.

    Args:
        on_death: called if one of its threads ends by an error.
        report: called a few times a second; it may raise.
        encoders: number of threads that encode images; None for one for each core.
    """

    def __init__(
        self, on_death: OnDeath, report: Callable[[], None] = lambda: None, encoders: int | None = None
    ) -> None:
        self._report = report
        self._open: set[Delivery] = set()
        self._changed = threading.Condition()
        self._ready: SimpleQueue[Delivery | None] = SimpleQueue()
        self._in_turn: deque[Delivery] = deque()
        self._encoders = ThreadPoolExecutor(encoders or os.cpu_count(), thread_name_prefix="encoder")
        self._stop = threading.Event()
        self._sending = start_thread("sending", self._send_what_is_ready, on_death)
        self._watching = start_thread("watching", self._watch, on_death)

    def open(self, sender: Sender, wanted: DrawRequest | AskRequest) -> Delivery:
        """Registers a request before it is submitted, so that no event can come too early."""
        delivery = Delivery(self, sender, wanted)
        with self._changed:
            self._open.add(delivery)
        self._in_turn.append(delivery)
        return delivery

    def attach(self, delivery: Delivery, handle: Handle) -> None:
        """Says which request a delivery is of, so that it can be cancelled.

        A delivery that is closed already takes none: the two would keep each other in memory, and with them the
        sender, without which the server does not unload the model.
        """
        with self._changed:
            if delivery.is_open:
                delivery.handle = handle

    def cancel(self, request_id: str, client_id: str) -> int:
        """Cancels the open requests with an id, of one client only; returns their number."""
        with self._changed:
            handles = [
                delivery.handle
                for delivery in self._open
                if delivery.request.request_id == request_id and delivery.request.client_id == client_id
            ]
        found = [handle for handle in handles if handle is not None]
        for handle in found:
            handle.cancel()
        return len(found)

    @property
    def open_requests(self) -> int:
        """Number of requests that were not told their end."""
        return len(self._open)

    def encode(self, pixels: np.ndarray, image_format: ImageFormat) -> Future[bytes]:
        """Starts to encode an image."""
        return self._encoders.submit(encode_image, pixels, image_format)

    def look_at(self, delivery: Delivery) -> None:
        """Says that a part of a delivery may be ready."""
        self._ready.put(delivery)

    def drain(self, timeout: float) -> bool:
        """Waits at most `timeout` seconds until every request was told its end; returns whether all were."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._open, timeout)

    def close(self) -> None:
        """Sends what is ready and ends the threads."""
        self._encoders.shutdown(wait=True)
        self._ready.put(None)
        self._stop.set()
        self._sending.join()
        self._watching.join()

    def _send_what_is_ready(self) -> None:
        while (delivery := self._ready.get()) is not None:
            self._send_parts(delivery)
            # The server keeps a request, and its model, as long as its sender is referenced.
            del delivery

    def _send_parts(self, delivery: Delivery) -> None:
        try:
            parts = delivery.parts
            while delivery.is_open and parts and (parts[0].file is None or parts[0].file.done()):
                self._send(delivery, parts.popleft())
        except Exception as error:
            _LOG.error("a response could not be sent: %s", one_line(error), exc_info=error)
            self._give_up(delivery, error)

    def _send(self, delivery: Delivery, part: _Part) -> None:
        event, sender = part.event, delivery.sender
        image = event.pixels if part.file is None else part.file.result()
        if event.kind == "image" and image is not None:
            delivery.images[event.image] = image
        elif event.kind == "preview" and image is not None:
            name, value = write_images([image])
            sender.send({"event": "preview", "image_index": event.image, "step": event.step, name: value})
        elif event.kind == "progress":
            sender.send({"event": "progress", "image_index": event.image, "step": event.step})
        elif event.kind == "text":
            delivery.texts.append(event.text)
            if delivery.streams:
                sender.send({"event": "text", "text": event.text})
        elif event.kind == "done":
            if delivery.images:
                name, value = write_images([delivery.images[index] for index in sorted(delivery.images)])
            else:
                name, value = "text", np.array(["".join(delivery.texts).encode()], dtype=np.object_)
            with delivery.lock:
                sender.send({"event": "done", name: value} | _usage(event), last=True)
                self._close(delivery)
        elif event.kind == "failed":
            with delivery.lock:
                sender.fail(event.error or RuntimeError("failed without a reason"))
                self._close(delivery)

    def _give_up(self, delivery: Delivery, error: Exception) -> None:
        """Ends a request whose responses cannot be sent; the others go on."""
        if (handle := delivery.handle) is not None:
            handle.cancel()
        with delivery.lock:
            try:
                if delivery.is_open:
                    delivery.sender.fail(error)
            except Exception as again:
                _LOG.error("nor could its error: %s", one_line(again))
            self._close(delivery)

    def _close(self, delivery: Delivery) -> None:
        with self._changed:
            delivery.is_open = False
            delivery.handle = None  # which has the delivery as its listener; see `attach`
            self._open.discard(delivery)
            self._changed.notify_all()
        delivery.parts.clear()
        delivery.images.clear()

    def _watch(self) -> None:
        reported = time.monotonic()
        while not self._stop.wait(WATCH_SECONDS):
            share = 1 + int(len(self._in_turn) * WATCH_SECONDS / CANCEL_SECONDS)
            for _ in range(len(self._in_turn)):
                share -= self._look_for_cancellation(self._in_turn.popleft())
                if share <= 0:
                    break
            if time.monotonic() - reported > REPORT_SECONDS:
                reported = time.monotonic()
                try:
                    self._report()
                except Exception as error:
                    _LOG.error("the metrics could not be updated: %s", one_line(error), exc_info=error)

    def _look_for_cancellation(self, delivery: Delivery) -> bool:
        """Passes a cancellation on; returns False if nobody had to be asked."""
        try:
            with delivery.lock:
                if not delivery.is_open:
                    return False
                handle = delivery.handle
                cancelled = handle is not None and delivery.sender.is_cancelled()
        except Exception as error:
            _LOG.error("cannot ask whether a request was cancelled: %s", one_line(error))
            return True
        if handle is not None and cancelled:
            handle.cancel()
        else:
            self._in_turn.append(delivery)
        return True


def _usage(event: Event) -> dict[str, Output]:
    if (usage := event.usage) is None:
        return {}
    reason = "length" if usage.ended_by_length else "stop"
    return {"input_tokens": usage.input_tokens, "output_tokens": usage.output_tokens, "finish_reason": reason}
