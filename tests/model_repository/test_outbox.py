"""The outbox with senders that are slow, broken or cancelled: nobody waits for another, and nobody is forgotten."""

from __future__ import annotations

import gc
import io
import threading
import time
import weakref
from collections.abc import Iterator, Mapping

import numpy as np
import pytest
from PIL import Image

import model_repository.outbox
from model_repository.outbox import Outbox, Output
from model_repository.schema import AskRequest, DrawRequest, ImageFormat
from runtime.errors import EngineError
from runtime.serving.requests import AnswerRequest, Event, GenerationRequest, Handle

PIXELS = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)


class FakeSender:
    """Keeps what is sent; its `is_cancelled` takes as long as a round trip to a busy server."""

    def __init__(self, round_trip: float = 0.0, broken: bool = False) -> None:
        self.sent: list[Mapping[str, Output]] = []
        self.error: Exception | None = None
        self.ended = threading.Event()
        self.ended_at = 0.0
        self.cancelled = False
        self.asked = 0
        self.asked_after_end = False
        self._round_trip = round_trip
        self._broken = broken

    def send(self, outputs: Mapping[str, Output], *, last: bool = False) -> None:
        if self._broken:
            raise RuntimeError("the client is gone")
        self.sent.append(outputs)
        self._end(last)

    def fail(self, error: Exception) -> None:
        self.error = error
        self._end(True)

    def _end(self, last: bool) -> None:
        if last:
            assert not self.ended.is_set(), "a request ended twice"
            self.ended_at = time.monotonic()
            self.ended.set()

    def is_cancelled(self) -> bool:
        assert not self.ended.is_set(), "a real server crashes when it is asked about a request that has ended"
        self.asked += 1
        time.sleep(self._round_trip)
        self.asked_after_end |= self.ended.is_set()
        return self.cancelled

    def events(self) -> list[object]:
        return [outputs["event"] for outputs in self.sent]


@pytest.fixture
def outbox() -> Iterator[Outbox]:
    deaths: list[BaseException] = []
    made = Outbox(deaths.append)
    yield made
    made.close()
    assert not deaths


def handle_of(image_format: ImageFormat = "raw", progress: bool = False) -> tuple[Handle, DrawRequest]:
    request = GenerationRequest("a")
    return Handle(request), DrawRequest(request, image_format, progress)


def test_answers_do_not_wait_for_the_polling_of_a_thousand_open_requests(outbox: Outbox) -> None:
    """Polling all of them takes 2 s; it used to come between any two answers."""
    deliveries = []
    for _ in range(1000):
        handle, wanted = handle_of()
        delivery = outbox.open(FakeSender(round_trip=0.002), wanted)
        outbox.attach(delivery, handle)
        deliveries.append(delivery)
    time.sleep(0.1)
    started = time.monotonic()
    for delivery in deliveries:
        delivery.receive(None, Event("image", 0, 20, PIXELS))
        delivery.receive(None, Event("done"))
    assert outbox.drain(10)
    assert time.monotonic() - started < 1.0
    assert all(delivery.sender.events() == ["done"] for delivery in deliveries)  # type: ignore[attr-defined]


def test_progress_that_nobody_asked_for_is_not_queued(outbox: Outbox) -> None:
    _, wanted = handle_of()
    delivery = outbox.open(FakeSender(), wanted)
    delivery.receive(None, Event("progress", 0, 1))
    assert not delivery.parts
    assert outbox._ready.empty()


def test_done_comes_after_images_and_previews_however_long_they_take_to_encode(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = model_repository.outbox.encode_image

    def slow_at_first(pixels: np.ndarray, image_format: ImageFormat) -> bytes:
        time.sleep(0.2 if pixels[0, 0, 0] == 0 else 0.0)
        return encode(pixels, image_format)

    monkeypatch.setattr(model_repository.outbox, "encode_image", slow_at_first)
    _, wanted = handle_of("png", progress=True)
    sender = FakeSender()
    delivery = outbox.open(sender, wanted)
    delivery.receive(None, Event("preview", 0, 2, PIXELS))
    delivery.receive(None, Event("progress", 0, 3))
    delivery.receive(None, Event("image", 1, 4, PIXELS + 1))
    delivery.receive(None, Event("image", 0, 4, PIXELS))
    delivery.receive(None, Event("done"))
    assert sender.ended.wait(10)
    assert sender.events() == ["preview", "progress", "done"]
    files = sender.sent[-1]["png"]
    assert isinstance(files, np.ndarray)
    for file, expected in zip(files, (PIXELS, PIXELS + 1), strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(file))), expected)


def test_images_are_encoded_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    outbox = Outbox(lambda error: None, encoders=2)
    together = threading.Barrier(2, timeout=10)

    def meet(pixels: np.ndarray, image_format: ImageFormat) -> bytes:
        together.wait()
        return b""

    monkeypatch.setattr(model_repository.outbox, "encode_image", meet)
    _, wanted = handle_of("png")
    sender = FakeSender()
    delivery = outbox.open(sender, wanted)
    for index in range(2):
        delivery.receive(None, Event("image", index, 1, PIXELS))
    delivery.receive(None, Event("done"))
    assert sender.ended.wait(10)
    outbox.close()


def test_a_request_whose_responses_fail_is_cancelled_and_harms_nobody(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle, wanted = handle_of("png")
    broken = outbox.open(FakeSender(broken=True), wanted)
    outbox.attach(broken, handle)
    fine_sender = FakeSender()
    fine = outbox.open(fine_sender, wanted)
    for delivery in (broken, fine):
        delivery.receive(None, Event("image", 0, 1, PIXELS))
        delivery.receive(None, Event("done"))
    assert fine_sender.ended.wait(10)
    assert outbox.drain(10)
    assert handle.cancelled
    assert isinstance(broken.sender, FakeSender)
    assert isinstance(broken.sender.error, RuntimeError)

    def cannot(pixels: np.ndarray, image_format: ImageFormat) -> bytes:
        raise ValueError("no such pixels")

    monkeypatch.setattr(model_repository.outbox, "encode_image", cannot)
    sender = FakeSender()
    delivery = outbox.open(sender, wanted)
    delivery.receive(None, Event("image", 0, 1, PIXELS))
    delivery.receive(None, Event("done"))
    assert sender.ended.wait(10)
    assert isinstance(sender.error, ValueError)


def test_a_cancelled_request_is_noticed_and_asked_no_more(outbox: Outbox) -> None:
    handle, wanted = handle_of()
    sender = FakeSender()
    delivery = outbox.open(sender, wanted)
    outbox.attach(delivery, handle)
    sender.cancelled = True
    give_up = time.monotonic() + 5
    while not handle.cancelled:
        assert time.monotonic() < give_up
        time.sleep(0.01)
    asked = sender.asked
    delivery.receive(handle, Event("failed", error=EngineError("cancelled")))
    assert sender.ended.wait(5)
    time.sleep(0.05)
    assert sender.asked == asked


def test_a_sender_is_let_go_with_its_last_response(outbox: Outbox) -> None:
    """The server keeps an unloaded model as long as a sender of it exists; it used to wait for garbage collection."""
    gc.disable()
    try:
        _, wanted = handle_of()
        for attached_late in (False, True):
            sender = FakeSender()
            gone = weakref.ref(sender)
            delivery = outbox.open(sender, wanted)
            handle = Handle(wanted.generation, delivery.receive)
            if not attached_late:
                outbox.attach(delivery, handle)
            handle.send(Event("image", 0, 1, PIXELS))
            handle.send(Event("done"))
            assert outbox.drain(10)
            if attached_late:
                outbox.attach(delivery, handle)
            del sender, delivery, handle
            give_up = time.monotonic() + 5
            while gone() is not None:
                assert time.monotonic() < give_up, gc.get_referrers(gone())
                time.sleep(0.01)
    finally:
        gc.enable()


def test_the_server_is_never_asked_about_a_request_that_has_ended(outbox: Outbox) -> None:
    """Server 2.51 crashed: the end was sent by one thread while another asked about the cancellation."""
    senders = []
    for _ in range(100):
        handle, wanted = handle_of()
        senders.append(FakeSender(round_trip=0.01))
        delivery = outbox.open(senders[-1], wanted)
        outbox.attach(delivery, handle)
        time.sleep(0.01)
        delivery.receive(handle, Event("failed", error=EngineError("no")))
    assert outbox.drain(10)
    assert sum(sender.asked for sender in senders) > 0
    assert not any(sender.asked_after_end for sender in senders)


def test_draining_waits_until_the_client_was_told(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(pixels: np.ndarray, image_format: ImageFormat) -> bytes:
        time.sleep(0.05)
        return b"file"

    monkeypatch.setattr(model_repository.outbox, "encode_image", slow)
    _, wanted = handle_of("png")
    senders = [FakeSender() for _ in range(16)]
    for sender in senders:
        delivery = outbox.open(sender, wanted)
        delivery.receive(None, Event("image", 0, 1, PIXELS))
        delivery.receive(None, Event("done"))
    assert not outbox.drain(0)
    assert outbox.drain(10)
    assert all(sender.events() == ["done"] for sender in senders)


def test_closing_at_once_sends_what_was_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    outbox = Outbox(lambda error: None)
    _, wanted = handle_of("png")
    senders = [FakeSender() for _ in range(16)]
    for sender in senders:
        delivery = outbox.open(sender, wanted)
        delivery.receive(None, Event("image", 0, 1, PIXELS))
        delivery.receive(None, Event("done"))
    outbox.close()
    assert all(sender.events() == ["done"] for sender in senders)


def test_an_answer_is_sent_whole_and_piece_by_piece_only_if_it_was_asked_for(outbox: Outbox) -> None:
    for stream, events in ((True, ["text", "text", "done"]), (False, ["done"])):
        sender = FakeSender()
        wanted = AskRequest(AnswerRequest(({"role": "user", "content": "a"},)), stream)
        delivery = outbox.open(sender, wanted)
        for text in ("it is", " red"):
            delivery.receive(None, Event("text", text=text))
        delivery.receive(None, Event("done"))
        assert sender.ended.wait(10)
        assert sender.events() == events
        last = sender.sent[-1]["text"]
        assert isinstance(last, np.ndarray)
        assert last[0] == b"it is red"


def test_a_failing_report_stops_nothing() -> None:
    calls: list[float] = []

    def report() -> None:
        calls.append(time.monotonic())
        raise RuntimeError("no metrics")

    deaths: list[BaseException] = []
    outbox = Outbox(deaths.append, report)
    give_up = time.monotonic() + 5
    while len(calls) < 2:
        assert time.monotonic() < give_up
        time.sleep(0.02)
    outbox.close()
    assert not deaths
