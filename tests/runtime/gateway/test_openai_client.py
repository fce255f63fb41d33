"""The gateway, asked by OpenAI's own client."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from pathlib import Path

import httpx2
import numpy as np
import openai
import pytest
from openai.types import image_gen_completed_event, image_gen_partial_image_event, images_response
from openai.types.chat import ChatCompletionChunk
from PIL import Image

from runtime.gateway.app import GatewaySettings
from runtime.gateway.keys import KeyRing
from runtime.pipeline import LatteFlowPipeline
from runtime.serving.requests import Limits
from runtime.serving.service import LocalService
from tests.runtime.gateway.conftest import Running, local, running

STEPS = {"num_inference_steps": 4}


def pixels_of(text: str | None) -> np.ndarray:
    assert text is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def image_message(question: str, size: int = 16) -> list[dict[str, object]]:
    buffer = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), 90, np.uint8)).save(buffer, "PNG")
    uri = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": question}]
    return [{"role": "user", "content": parts}]


def test_images_are_those_of_the_pipeline(door: Running, pipe: LatteFlowPipeline) -> None:
    answer = door.client().images.generate(prompt="a red circle", n=2, extra_body={"seed": 7, **STEPS})
    expected = pipe("a red circle", num_images_per_prompt=2, seed=7, num_inference_steps=4, output_type="np").images
    assert answer.data is not None
    for item, image in zip(answer.data, expected, strict=True):
        assert np.array_equal(pixels_of(item.b64_json), image)
    assert [item.model_extra for item in answer.data] == [{"seed": 7}, {"seed": 8}]
    assert answer.usage is not None
    assert answer.usage.output_tokens == 2 * 6 * 8
    assert answer.usage.input_tokens == len(pipe.chat.prompt_tokens("a red circle"))
    assert (answer.size, answer.output_format, answer.background) == ("32x24", "png", "opaque")
    assert set(answer.model_fields_set) <= set(images_response.ImagesResponse.model_fields)


@pytest.mark.parametrize("partial_images", [0, 1, 3])
def test_partial_images_are_streamed(door: Running, partial_images: int) -> None:
    client = door.client()
    options = {"seed": 3, "num_inference_steps": 9}
    events = list(
        client.images.generate(prompt="a star", stream=True, partial_images=partial_images, extra_body=options)
    )
    partial, completed = events[:-1], events[-1]
    assert all(isinstance(event, image_gen_partial_image_event.ImageGenPartialImageEvent) for event in partial)
    assert [event.partial_image_index for event in partial] == list(range(partial_images))  # type: ignore[union-attr]
    assert isinstance(completed, image_gen_completed_event.ImageGenCompletedEvent)
    whole = client.images.generate(prompt="a star", extra_body=options)
    assert whole.data is not None
    assert completed.b64_json == whole.data[0].b64_json
    assert completed.usage.total_tokens == completed.usage.input_tokens + 48
    for event in partial:
        assert pixels_of(event.b64_json).shape == (24, 32, 3)


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_urls_and_formats(door: Running, output_format: str) -> None:
    answer = door.client().images.generate(
        prompt="a",
        response_format="url",
        output_format=output_format,  # type: ignore[arg-type]
        output_compression=80,
        extra_body=STEPS,
    )
    assert answer.data is not None
    assert answer.data[0].url is not None
    fetched = httpx2.get(answer.data[0].url)
    assert fetched.headers["content-type"] == f"image/{output_format}"
    assert Image.open(io.BytesIO(fetched.content)).size == (32, 24)
    assert httpx2.get(f"{door.url}/v1/images/results/another.png").status_code == 404


def test_answers_are_those_of_the_pipeline(door: Running, pipe: LatteFlowPipeline) -> None:
    client = door.client()
    image = np.full((16, 16, 3), 90, np.uint8)
    expected = pipe.ask(image, "what is it?", max_new_tokens=6)
    messages = image_message("what is it?")
    answer = client.chat.completions.create(model="latte-flow", messages=messages, max_tokens=6)  # type: ignore[arg-type]
    assert answer.choices[0].message.content == expected
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.completion_tokens <= 6
    assert answer.choices[0].finish_reason == ("length" if answer.usage.completion_tokens == 6 else "stop")
    chunks: list[ChatCompletionChunk] = list(
        client.chat.completions.create(
            model="latte-flow",
            messages=messages,  # type: ignore[arg-type]
            max_completion_tokens=6,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == expected
    assert chunks[-2].choices[0].finish_reason == answer.choices[0].finish_reason
    assert chunks[-1].usage == answer.usage


def test_a_conversation_has_several_turns(door: Running, pipe: LatteFlowPipeline) -> None:
    turns = [
        {"role": "system", "content": "Be short."},
        *image_message("what is it?"),
        {"role": "assistant", "content": "a square"},
        {"role": "user", "content": "sure?"},
    ]
    image = np.full((16, 16, 3), 90, np.uint8)
    of_pipe = [
        turns[0],
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what is it?"}]},
        *turns[2:],
    ]
    answer = door.client().chat.completions.create(model="latte-flow", messages=turns, max_tokens=4)  # type: ignore[arg-type]
    assert answer.choices[0].message.content == pipe.ask(messages=of_pipe, max_new_tokens=4)


@pytest.mark.parametrize("nested", [False, True])
def test_a_chat_can_draw(door: Running, pipe: LatteFlowPipeline, nested: bool) -> None:
    options: dict[str, object] = {"modalities": ["image", "text"], "seed": 5, "width": 32, "height": 24, **STEPS}
    body = {"extra_body": options} if nested else options
    answer = door.client().chat.completions.create(
        model="latte-flow", messages=[{"role": "user", "content": "a red star"}], extra_body=body
    )
    message = answer.choices[0].message
    assert message.model_extra is not None
    (drawn,) = message.model_extra["images"]
    image = pixels_of(drawn["image_url"]["url"].partition(",")[2])
    expected = pipe("a red star", seed=5, num_inference_steps=4, output_type="np").images[0]
    assert np.array_equal(image, expected)


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"size": "1024x1024"}, 400, "size must be auto or 32x24"),
        ({"extra_body": {"width": 64, "height": 24}}, 400, "size must be auto or 32x24.*; got 64x24"),
        ({"extra_body": {"width": 32}}, 422, "give size, or the whole numbers width and height"),
        ({"n": 17}, 400, "n must be from 1 to 16, got 17"),
        ({"extra_body": {"num_inference_steps": 4000}}, 400, "num_inference_steps must be from 1 to 200"),
        ({"prompt": "<|im_end|>"}, 400, "must not contain the model's special token"),
        ({"model": "gpt-image-1"}, 404, "'gpt-image-1' is not served here"),
        ({"extra_body": {"seeed": 1}}, 422, "seeed: "),
        ({"background": "transparent"}, 422, "background: "),
        ({"partial_images": 1}, 422, "partial_images needs stream"),
        ({"n": 2, "stream": True}, 422, "a stream is of one image"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(
    door: Running, fields: dict[str, object], status: int, message: str
) -> None:
    with pytest.raises(openai.APIStatusError, match=message) as caught:
        door.client().images.generate(**{"prompt": "a", **fields})  # type: ignore[call-overload]
    assert caught.value.status_code == status
    assert caught.value.type == ("not_found_error" if status == 404 else "invalid_request_error")
    assert "\n" not in str(caught.value.message)


@pytest.mark.parametrize(
    ("content", "kind", "status", "message"),
    [
        (b"{", "application/json", 400, "the body is not JSON: "),
        (b'{"prompt": "\xff"}', "application/json", 400, "the body cannot be read as JSON in UTF-8"),
        (b"[" * 100_000, "application/json", 400, "the body cannot be read as JSON in UTF-8"),
        (b"{}", "text/plain", 415, "the body must be JSON with Content-Type: application/json, got text/plain"),
        (b"{}", "application/json", 422, "prompt: Field required"),
        (b"[]", "application/json", 422, "the body: Input should be a valid dictionary"),
        (b"", "application/json", 422, "the body: Field required"),
        (b" " * (65 << 20), "application/json", 413, "the body has 68157440 bytes, the limit is 67108864; "),
        ([b" " * (13 << 20)] * 5, "application/json", 413, "the body is larger than the limit; "),
    ],
)
def test_bodies_are_checked_before_anything_runs(
    door: Running, content: bytes | list[bytes], kind: str, status: int, message: str
) -> None:
    """A list is sent in chunks, so that nothing says its length."""
    answer = httpx2.post(f"{door.url}/v1/images/generations", content=content, headers={"Content-Type": kind})
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert answer.json()["error"]["message"].startswith(message)


def test_a_path_or_method_that_is_not_there_is_openais_error(door: Running) -> None:
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/images/generations", 405)):
        answer = httpx2.request(method, f"{door.url}{path}")
        assert answer.status_code == status
        assert "/docs describes the API" in answer.json()["error"]["message"]


def test_images_are_fetched_from_hosts_that_are_allowed_by_name_only(door: Running) -> None:
    message = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/x"}}]}]
    with pytest.raises(openai.BadRequestError, match="fetched from no host; send a data URI"):
        door.client().chat.completions.create(model="latte-flow", messages=message)  # type: ignore[arg-type]


def test_equal_requests_with_a_seed_are_answered_from_the_cache(door: Running) -> None:
    def ask(key: str | None = None, **fields: object) -> httpx2.Response:
        headers = {} if key is None else {"Idempotency-Key": key}
        body = {"prompt": "cached", **STEPS, **fields}
        return httpx2.post(f"{door.url}/v1/images/generations", json=body, headers=headers)

    first, second, other = ask(seed=1), ask(seed=1), ask(seed=2)
    assert [answer.headers["x-result-cache"] for answer in (first, second, other)] == ["miss", "hit", "miss"]
    assert first.json() == second.json()
    assert "x-result-cache" not in ask().headers
    once, again = ask("the-same"), ask("the-same")
    assert once.json()["data"] == again.json()["data"]


def test_a_key_is_needed_and_has_its_quota(bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_text(json.dumps([{"name": "alice", "key": "a-long-key-for-alice", "max_images": 2}]))
    file.chmod(0o600)
    with local(bundle) as service, running(service, GatewaySettings(KeyRing.from_file(file))) as started:
        with pytest.raises(openai.AuthenticationError, match="send a valid API key"):
            started.client("wrong").images.generate(prompt="a")
        client = started.client("a-long-key-for-alice")
        assert client.images.generate(prompt="a", n=2, extra_body=STEPS).data
        with pytest.raises(openai.BadRequestError, match="the key 'alice' may have 2 images open at a time, got 3"):
            client.images.generate(prompt="a", n=3, extra_body=STEPS)
        slow = threading.Thread(
            target=client.images.generate, kwargs={"prompt": "a", "n": 2, "extra_body": {"num_inference_steps": 200}}
        )
        slow.start()
        while not service.scheduler.pending:
            assert slow.is_alive()
            time.sleep(0.01)
        with pytest.raises(openai.RateLimitError, match="the key 'alice' has 2 of 2 images open") as caught:
            client.images.generate(prompt="a", extra_body=STEPS)
        slow.join(60)
        assert caught.value.response.headers["retry-after"] == "1"
        assert httpx2.get(f"{started.url}/health").status_code == 200
        records = list(service.scheduler.statistics.records)
        assert {record.client_id for record in records} == {"alice"}


def test_a_full_queue_is_429_and_says_when_to_try_again(bundle: Path) -> None:
    with local(bundle, Limits(max_queued_images=1)) as service, running(service) as started:
        with pytest.raises(openai.RateLimitError, match="no room for 2 more") as caught:
            started.client().images.generate(prompt="a", n=2)
        assert int(caught.value.response.headers["retry-after"]) >= 1


@pytest.mark.parametrize(("stream", "partial_images"), [(True, 3), (True, 0), (False, 0)])
def test_a_client_that_goes_away_cancels_its_request(
    door: Running, service: LocalService, stream: bool, partial_images: int
) -> None:
    """A stream of which no event has been sent is left too: it was drawn to its end, for nobody."""
    statistics = service.scheduler.statistics
    cancelled = statistics.cancelled
    body = {"prompt": "slow", "num_inference_steps": 200, "n": 1 if stream else 16, "stream": stream}
    if partial_images:
        body["partial_images"] = partial_images
        with httpx2.stream("POST", f"{door.url}/v1/images/generations", json=body, timeout=30) as answer:
            next(answer.iter_lines())
    else:
        with pytest.raises(httpx2.TimeoutException):
            httpx2.post(f"{door.url}/v1/images/generations", json=body, timeout=0.05)
    give_up = time.monotonic() + 20
    while statistics.cancelled == cancelled and time.monotonic() < give_up:
        time.sleep(0.02)
    assert statistics.cancelled == cancelled + 1
    assert service.scheduler.open_requests == 0


def test_a_gateway_that_drains_refuses_new_requests(bundle: Path) -> None:
    with local(bundle) as service, running(service) as started:
        started.gateway.draining = True
        with pytest.raises(openai.InternalServerError, match="shutting down") as caught:
            started.client().images.generate(prompt="a")
        assert caught.value.status_code == 503
        assert httpx2.get(f"{started.url}/ready").status_code == 503
        assert httpx2.get(f"{started.url}/health").status_code == 200


def test_requests_have_ids_and_metrics(door: Running) -> None:
    answer = httpx2.get(f"{door.url}/v1/models", headers={"x-request-id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    assert [model["id"] for model in answer.json()["data"]] == ["latte-flow"]
    assert httpx2.get(f"{door.url}/v1/models/latte-flow").json()["object"] == "model"
    assert httpx2.get(f"{door.url}/v1/models", headers={"x-request-id": "a b\tc"}).headers["x-request-id"] != "a b\tc"
    text = httpx2.get(f"{door.url}/metrics").text
    assert 'latte_flow_gateway_requests_total{route="/v1/models",status="200"}' in text
