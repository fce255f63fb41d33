"""Questions in the scheduler: on a script, and on engines."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.answers import Answer, AnswerSettings
from runtime.backends import Value
from runtime.batch.shard import AtOnce
from runtime.chat import ChatInputs, user_message
from runtime.errors import CancelledError, DeadlineError, EngineError, InputError, QueueFullError
from runtime.pipeline import LatteFlowPipeline
from runtime.serving.jobs import AnswerJob
from runtime.serving.requests import AnswerRequest, Event, GenerationRequest, Handle, Limits, Usage
from runtime.serving.scheduler import READ_AHEAD, Scheduler
from runtime.serving.stations import PipelineStations
from runtime.serving.worker import Worker
from tests.runtime.serving.test_scheduler import ScriptedStations, request, run


class Countdown:
    """An answer that ends after so many tokens."""

    def __init__(self, tokens: int) -> None:
        self.left = tokens

    @property
    def ended(self) -> bool:
        return self.left == 0

    ended_by_length = ended


SEVEN_TOKENS = ChatInputs(
    np.zeros((1, 7), np.int64), np.ones((1, 7), bool), np.zeros((3, 1, 7), np.int64), np.array([7]), None
)


class AnsweringStations(ScriptedStations):
    """Counts down in words."""

    def check(self, request: object) -> None:
        """Takes everything."""

    def read(self, request: AnswerRequest) -> ChatInputs:
        if request.conversation[0]["content"] == "unreadable":
            raise InputError("no image")
        return SEVEN_TOKENS

    def prefill(self, job: AnswerJob) -> tuple[Answer, str]:
        self._note("prefill", [str(job.request.conversation[0]["content"])])
        return Countdown(job.request.settings.max_new_tokens), "begin"  # type: ignore[return-value]

    def write(self, jobs: Sequence[AnswerJob]) -> list[str]:
        names = [str(job.request.conversation[0]["content"]) for job in jobs]
        self._note("write", names)
        if any("broken" in name for name in names):
            raise EngineError("engine vlm failed")
        for job in jobs:
            job.answer.left -= 1  # type: ignore[union-attr]
        return [f" {job.answer.left}" for job in jobs]  # type: ignore[union-attr]


def question(text: str = "a", tokens: int = 3, **options: Any) -> AnswerRequest:
    return AnswerRequest(({"role": "user", "content": text},), AnswerSettings(max_new_tokens=tokens), **options)


def make(limits: Limits | None = None) -> tuple[Scheduler, AnsweringStations]:
    stations = AnsweringStations()
    return Scheduler(stations, stations.clock, limits, readers=AtOnce()), stations


def test_an_answer_is_written_piece_by_piece() -> None:
    scheduler, stations = make()
    handle = scheduler.submit(question())
    run(scheduler)
    assert [(event.kind, event.text) for event in handle.events(0)] == [
        ("text", "begin"),
        ("text", " 2"),
        ("text", " 1"),
        ("text", " 0"),
        ("done", ""),
    ]
    assert [station for station, _ in stations.log] == ["prefill", "write", "write", "write"]


def test_the_end_says_what_the_request_took() -> None:
    scheduler, _ = make()
    handles = [scheduler.submit(question(tokens=3)), scheduler.submit(request("image", num_images=2))]
    run(scheduler)
    assert [list(handle.events(0))[-1].usage for handle in handles] == [Usage(7, 4, True), Usage(5, 2)]


def test_answers_join_and_leave_the_same_runs() -> None:
    scheduler, stations = make(Limits(max_answers_at_once=2))
    handles = [scheduler.submit(question(name, tokens)) for name, tokens in (("a", 2), ("b", 6), ("c", 3))]
    image = scheduler.submit(request("image"))
    run(scheduler)
    assert all(handle.answer(0).startswith("begin") for handle in handles)
    assert len(image.result(0)) == 1
    batches = [names for station, names in stations.log if station == "write"]
    assert max(map(len, batches)) == 2
    assert {tuple(sorted(names)) for names in batches} >= {("a", "b"), ("b", "c")}


def test_a_question_has_deadline_cancel_priority_and_a_cap() -> None:
    scheduler, stations = make(Limits(max_answers_at_once=1, max_new_tokens=100))
    late = scheduler.submit(question("late", 100, deadline=0.05))
    gone = scheduler.submit(question("gone"))
    plain, urgent = scheduler.submit(question("plain")), scheduler.submit(question("urgent", priority=2))
    gone.cancel()
    run(scheduler)
    with pytest.raises(DeadlineError, match=r"0\.05 s"):
        late.result(0)
    with pytest.raises(CancelledError):
        gone.result(0)
    assert plain.answer(0) == urgent.answer(0) == "begin 2 1 0"
    begun = [names[0] for station, names in stations.log if station == "prefill"]
    assert "gone" not in begun
    assert begun.index("urgent") < begun.index("plain")
    with pytest.raises(InputError, match="max_new_tokens must be from 1 to 100, got 101"):
        scheduler.submit(question(tokens=101))


def test_what_goes_wrong_with_a_question_is_its_own() -> None:
    scheduler, _ = make(Limits(max_queued_questions=4, max_questions_per_client=4))
    handles = [scheduler.submit(question(text)) for text in ("a", "unreadable", "broken", "b")]
    with pytest.raises(QueueFullError, match="4 of 4 questions"):
        scheduler.submit(question())
    run(scheduler)
    assert handles[0].answer(0) == handles[3].answer(0) == "begin 2 1 0"
    with pytest.raises(InputError, match="no image"):
        handles[1].answer(0)
    with pytest.raises(EngineError):
        handles[2].answer(0)
    statistics = scheduler.statistics
    assert (scheduler.pending_questions, statistics.finished, statistics.rejected, statistics.failed) == (0, 2, 2, 1)


def test_few_questions_are_read_ahead_the_urgent_ones_first() -> None:
    """All queued questions used to be read at once, and their decoded images filled the memory."""
    scheduler, stations = make(Limits(max_answers_at_once=1))
    read: list[str] = []
    original = stations.read
    stations.read = lambda wanted: read.append(wanted.conversation[0]["content"]) or original(wanted)  # type: ignore
    handles = [scheduler.submit(question(f"{i}", priority=2 * (i == 9))) for i in range(10)]
    assert read == []
    answered = 0
    while scheduler.tick():
        answered = sum(handle not in scheduler._open for handle in handles)
        assert len(read) <= answered + 1 + READ_AHEAD
    assert answered == 10
    assert read == ["9", *(f"{i}" for i in range(9))]


def test_a_question_that_cannot_be_read_is_let_go_at_once() -> None:
    """It waited for garbage collection, and so did the old model after a reload, which Triton keeps until then."""
    scheduler, _ = make()
    gc.disable()
    try:
        gone = weakref.ref(scheduler.submit(question("unreadable"), lambda handle, event: None))
        run(scheduler)
        assert gone() is None
    finally:
        gc.enable()


def test_a_worker_waits_for_questions_that_are_being_read_without_spinning() -> None:
    stations = AnsweringStations()
    may_read = threading.Event()
    read = stations.read
    stations.read = lambda wanted: may_read.wait(10) and read(wanted)  # type: ignore
    scheduler = Scheduler(stations, time.monotonic)
    ticks = []
    tick = scheduler.tick
    scheduler.tick = lambda: bool(ticks.append(0)) or tick()  # type: ignore
    worker = Worker(scheduler)
    handle = scheduler.submit(question())
    time.sleep(0.3)
    assert len(ticks) < 20
    may_read.set()
    assert handle.answer(10) == "begin 2 1 0"
    worker.close()


# ---- on engines -------------------------------------------------------------------------------------


@pytest.fixture(params=["cpu", "tensorrt"])
def service_pipe(plan_bundle: Path, request: pytest.FixtureRequest) -> Iterator[LatteFlowPipeline]:
    """On ONNX Runtime, and on doubles of CUDA and TensorRT."""
    with LatteFlowPipeline.from_pretrained(plan_bundle, request.param) as pipe:
        yield pipe


def image_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (64, 64 + 16 * (seed % 3), 3), np.uint8)


def test_drawing_and_answering_corrupt_neither(pipe: LatteFlowPipeline, service_pipe: LatteFlowPipeline) -> None:
    """With answers in a thread of their own, TensorRT's prompts overwrote the keys and values of answers."""
    texts = ["what is it?", "what colour is the circle on the left?", "is it red?", "how many?"]
    settings = [AnswerSettings(max_new_tokens=5 + 3 * i, temperature=0.7 * (i % 2), seed=i) for i in range(4)]
    expected = [
        pipe.ask(image_of(i), texts[i], max_new_tokens=s.max_new_tokens, temperature=s.temperature, seed=s.seed)
        for i, s in enumerate(settings)
    ]
    drawn = pipe("a red star", num_inference_steps=4, seed=3, output_type="np").images
    scheduler = Scheduler(PipelineStations(service_pipe), time.monotonic, Limits(max_answers_at_once=3))
    worker = Worker(scheduler)
    answers: dict[int, Handle] = {}
    images: list[Handle] = []
    for turn in range(12):
        if turn % 3 == 0:
            i = turn // 3
            conversation = (user_message([image_of(i)], texts[i]),)
            answers[i] = scheduler.submit(AnswerRequest(conversation, settings[i]))
        wanted = GenerationRequest("a red star", f"blue {turn}" if turn % 2 else "", num_inference_steps=4, seed=3)
        images.append(scheduler.submit(wanted))
        time.sleep(0.01)
    assert [answers[i].answer(60) for i in range(4)] == expected
    for handle in images[::2]:
        assert np.abs(handle.result(60)[0].astype(int) - drawn[0].astype(int)).max() <= 1
    worker.close()


def test_a_question_is_cancelled_between_the_runs_of_its_prefill(pipe: LatteFlowPipeline) -> None:
    scheduler = Scheduler(PipelineStations(pipe), time.monotonic, readers=AtOnce())
    seen: list[str] = []

    def listener(handle: Handle, event: Event) -> None:
        seen.append(event.kind)

    handle = scheduler.submit(AnswerRequest((user_message([image_of(0)], "what?"),)), listener)
    encode = pipe.answerer.encode_images

    def cancel_meanwhile(*arguments: Any) -> Value:
        embeds = encode(*arguments)
        handle.cancel()
        return embeds

    pipe.answerer.encode_images = cancel_meanwhile  # type: ignore[method-assign]
    try:
        run(scheduler)
    finally:
        del pipe.answerer.encode_images
    assert seen == ["failed"]
    assert scheduler.statistics.cancelled == 1
    assert scheduler.statistics.busy_seconds["prefill"] == 0


def test_the_images_of_questions_have_a_quota_in_bytes() -> None:
    def about(size: int, client_id: str) -> AnswerRequest:
        return AnswerRequest((user_message([bytes(size)], "what?"),), client_id=client_id)

    scheduler, _ = make(Limits(max_queued_bytes=4000))
    with pytest.raises(InputError, match="have 2001 bytes, the limit is 2000; make them smaller"):
        scheduler.submit(about(2001, "one"))
    handle = scheduler.submit(about(1500, "one"))
    with pytest.raises(QueueFullError, match="client 'one' has 1500 of 2000 bytes of images in the queue"):
        scheduler.submit(about(501, "one"))
    scheduler.submit(about(1900, "two"))
    with pytest.raises(QueueFullError, match="the queue has 3400 of 4000 bytes"):
        scheduler.submit(about(601, "three"))
    handle.cancel()
    scheduler.tick()
    scheduler.submit(about(2000, "three"))
