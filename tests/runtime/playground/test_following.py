"""What a page follows of its requests, on the real service."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from runtime.errors import CancelledError
from runtime.flow_time import SamplingDefaults
from runtime.pipeline import LatteFlowPipeline
from runtime.playground.calls import command_line, curl, python_call
from runtime.playground.following import Sessions, answer, draw
from runtime.playground.page import difference_of, psnr
from runtime.serving.requests import AnswerRequest, GenerationRequest
from runtime.serving.service import LocalService

SAMPLING = SamplingDefaults()


@pytest.fixture(scope="module")
def service(bundle: Path) -> Iterator[LocalService]:
    with LocalService(LatteFlowPipeline.from_pretrained(bundle)) as opened:
        yield opened


def test_frames_show_the_steps_the_experts_and_last_the_images(service: LocalService, pipe: LatteFlowPipeline) -> None:
    request = GenerationRequest("a red star", num_inference_steps=10, num_images=2, seed=3)
    frames = list(draw(service, request, Sessions(), "one", pause=0))
    steps = [frame.step for frame in frames]
    assert steps == sorted(steps)
    assert all(frame.group == pipe.manifest.schedule.group_of(frame.step / 10) for frame in frames if frame.step < 10)
    assert {frame.group for frame in frames} == {0, 1, None}
    assert [frame.done for frame in frames] == [False] * (len(frames) - 1) + [True]
    expected = pipe("a red star", num_inference_steps=10, num_images_per_prompt=2, seed=3, output_type="np").images
    assert np.array_equal(np.stack(frames[-1].images), expected)
    assert np.array_equal(frames[-1].trajectory[-1], expected[0])
    assert len(frames[-1].trajectory) == 10
    assert any(len(frame.trajectory) > 1 and not frame.done for frame in frames)


def test_a_page_cancels_its_own_requests_only(service: LocalService) -> None:
    sessions = Sessions()
    long = GenerationRequest("a", num_inference_steps=200, num_images=16)
    mine = draw(service, long, sessions, "mine", pause=0)
    next(mine)
    sessions.cancel("another")
    next(mine)
    sessions.cancel("mine")
    with pytest.raises(CancelledError):
        list(mine)
    left = draw(service, long, sessions, "left", pause=0)
    next(left)
    left.close()
    assert sessions._handles == {}
    assert service.drain(20)


def test_an_answer_grows(bundle: Path, pipe: LatteFlowPipeline) -> None:
    with LocalService(LatteFlowPipeline.from_pretrained(bundle)) as service:
        conversation = ({"role": "user", "content": "what is it?"},)
        texts = list(answer(service, AnswerRequest(conversation), Sessions(), "one"))
        assert texts[-1] == pipe.ask(None, "what is it?")
        assert all(texts[-1].startswith(text) for text in texts)


def test_the_calls_that_are_shown_draw_the_same(pipe: LatteFlowPipeline, bundle: Path) -> None:
    request = GenerationRequest('it\'s a "star"', num_inference_steps=3, seed=5, num_images=2, negative_prompt="blue")
    words = shlex.split(command_line(request, SAMPLING, "my bundle"))
    assert words[:4] == ["latte-flow", "generate", "my bundle", 'it\'s a "star"']
    assert words[-1] == "--num-images-per-prompt=2"
    dashed = shlex.split(command_line(GenerationRequest("-5 stars", seed=5), SAMPLING, "bundle"))
    assert dashed == ["latte-flow", "generate", "bundle", "--seed=5", "--", "-5 stars"]
    names: dict[str, object] = {}
    exec(python_call(request, SAMPLING, str(bundle)), names)
    images: list[object] = names["images"]  # type: ignore[assignment]
    options = {"num_inference_steps": 3, "seed": 5, "num_images_per_prompt": 2, "negative_prompt": "blue"}
    expected = pipe(request.prompt, **options, output_type="np").images  # type: ignore[arg-type]
    assert np.array_equal(np.stack([np.asarray(image) for image in images]), expected)
    assert '"n": 2' in curl(request, SAMPLING, "http://127.0.0.1:1/")
    names["pipe"].close()  # type: ignore[attr-defined]


def test_two_images_are_compared() -> None:
    black, grey = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 16, np.uint8)
    assert psnr(black, black) == "infinite: the images are equal"
    assert psnr(black, grey) == "24.0 dB"
    assert np.array_equal(difference_of(black, grey), np.full((4, 4, 3), 128, np.uint8))
