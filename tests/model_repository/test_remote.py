"""The gateway in front of a real Triton server: what it answers is what the pipeline makes."""

from __future__ import annotations

import time
from collections.abc import Iterator

import httpx2
import numpy as np
import openai
import pytest

from model_repository.client import Client
from model_repository.remote import TritonService
from model_repository.server import TritonServer
from runtime.errors import DrainingError, ServiceError
from runtime.pipeline import LatteFlowPipeline
from runtime.serving.requests import GenerationRequest
from tests.model_repository.conftest import LIMITS
from tests.runtime.gateway.conftest import Running, running
from tests.runtime.gateway.test_openai_client import image_message, pixels_of

STEPS = {"num_inference_steps": 4}


@pytest.fixture(scope="module")
def remote(server: TritonServer) -> Iterator[TritonService]:
    service = TritonService(Client(server.grpc_url))
    yield service
    service.close()


@pytest.fixture(scope="module")
def door(remote: TritonService) -> Iterator[Running]:
    with running(remote) as started:
        yield started


def test_the_server_says_what_it_serves(remote: TritonService) -> None:
    assert (remote.model.width, remote.model.height, remote.model.groups) == (32, 24, 2)
    assert remote.limits == LIMITS


def test_images_and_partial_images_come_through(door: Running, pipe: LatteFlowPipeline) -> None:
    client = door.client()
    answer = client.images.generate(prompt="a red circle", n=2, extra_body={"seed": 7, **STEPS})
    expected = pipe("a red circle", num_images_per_prompt=2, seed=7, num_inference_steps=4, output_type="np").images
    assert answer.data is not None
    for item, image in zip(answer.data, expected, strict=True):
        assert np.array_equal(pixels_of(item.b64_json), image)
    assert answer.usage is not None
    assert answer.usage.input_tokens == len(pipe.chat.prompt_tokens("a red circle"))
    assert answer.usage.output_tokens == 2 * 6 * 8
    events = list(client.images.generate(prompt="a", stream=True, partial_images=2, extra_body={"seed": 7, **STEPS}))
    assert [event.type.rpartition(".")[2] for event in events] == ["partial_image", "partial_image", "completed"]


def test_a_conversation_with_an_image_comes_through(door: Running, pipe: LatteFlowPipeline) -> None:
    turns = [*image_message("what is it?"), {"role": "assistant", "content": "a"}, {"role": "user", "content": "sure?"}]
    image = np.full((16, 16, 3), 90, np.uint8)
    first = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what is it?"}]}
    expected = pipe.ask(messages=[first, *turns[1:]], max_new_tokens=5)
    client = door.client()
    answer = client.chat.completions.create(model="latte-flow", messages=turns, max_tokens=5)  # type: ignore[arg-type]
    assert answer.choices[0].message.content == expected
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 5
    chunks = client.chat.completions.create(model="latte-flow", messages=turns, max_tokens=5, stream=True)  # type: ignore[call-overload]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected


@pytest.mark.parametrize(
    ("fields", "status"), [({"prompt": "<|im_end|>"}, 400), ({"prompt": "far " * 300}, 400), ({"n": 1000}, 400)]
)
def test_refusals_of_the_server_keep_their_status(door: Running, fields: dict[str, object], status: int) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        door.client().images.generate(**{"prompt": "a", **fields})  # type: ignore[call-overload]
    assert caught.value.status_code == status


def test_a_client_that_goes_away_cancels_its_request_on_the_server(door: Running, remote: TritonService) -> None:
    body = {"prompt": "slow", "num_inference_steps": 200, "n": 16}
    with pytest.raises(httpx2.TimeoutException):
        httpx2.post(f"{door.url}/v1/images/generations", json=body, timeout=0.1)
    client = Client(remote._client.url)
    give_up = time.monotonic() + 20
    while client.describe()["pending_images"] and time.monotonic() < give_up:
        time.sleep(0.05)
    assert client.describe()["pending_images"] == 0


def test_a_service_that_drains_takes_no_new_requests(server: TritonServer) -> None:
    service = TritonService(Client(server.grpc_url))
    assert service.drain(1)
    with pytest.raises(DrainingError):
        service.submit(GenerationRequest("a"), lambda handle, event: None)


def test_no_server_is_one_line() -> None:
    with pytest.raises(ServiceError, match=r"127\.0\.0\.1:9"):
        TritonService(Client("127.0.0.1:9"))
