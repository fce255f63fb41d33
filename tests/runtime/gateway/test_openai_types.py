"""The gateway's bodies, held against the types of OpenAI's own package: a new field there fails a test here."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints, is_typeddict

import httpx2
import pytest
from openai.types import Image as DrawnImage
from openai.types import ImageGenCompletedEvent, ImageGenPartialImageEvent, ImagesResponse, Model
from openai.types import image_generate_params as images
from openai.types.chat import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionContentPartImageParam,
    ChatCompletionContentPartTextParam,
    ChatCompletionStreamOptionsParam,
    ChatCompletionUserMessageParam,
)
from openai.types.chat import completion_create_params as chats
from openai.types.chat.chat_completion_content_part_image_param import ImageURL
from openai.types.shared import ErrorObject
from PIL import Image
from pydantic import BaseModel, TypeAdapter, ValidationError

from runtime.gateway.schema import (
    Body,
    ChatBody,
    ChatMessage,
    DrawingOptions,
    ImagePart,
    ImagesBody,
    ImageUrl,
    StreamOptions,
    TextPart,
)
from tests.runtime.gateway.conftest import Running

STREAMED_IMAGE = images.ImageGenerateParamsStreaming
STREAMED_CHAT = chats.CompletionCreateParamsStreaming
BODIES: dict[type[Body], tuple[Any, dict[str, Any]]] = {
    ImagesBody: (STREAMED_IMAGE, {"prompt": "a"}),
    ChatBody: (STREAMED_CHAT, {"messages": [{"role": "user", "content": "a"}]}),
}
OTHER_MODELS = [
    (ChatCompletionStreamOptionsParam, StreamOptions),
    (ChatCompletionContentPartTextParam, TextPart),
    (ChatCompletionContentPartImageParam, ImagePart),
    (ImageURL, ImageUrl),
]
NEVER_SENT = {
    ImagesResponse: {"safety_identifier", "svg_usage"},
    DrawnImage: {"revised_prompt"},
    ImageGenCompletedEvent: {"safety_identifier"},
    ChatCompletion: {"metadata", "moderation", "service_tier", "system_fingerprint"},
}
"""Fields of OpenAI's answers, all of them optional, that tell of what there is not here."""


def fields_of(params: Any) -> dict[str, Any]:
    return get_type_hints(params)


def values_of(kind: Any) -> Iterator[Any]:
    """Yields values of a type of OpenAI's: every literal, null where it may be, and one of everything else."""
    arguments = get_args(kind)
    if get_origin(kind) is Literal:
        yield from arguments
    elif kind in (int, float, str, bool, type(None)):
        yield {int: 1, float: 0.5, str: "a", bool: True, type(None): None}[kind]
    elif is_typeddict(kind):
        yield {name: next(values_of(inner)) for name, inner in fields_of(kind).items()}
    elif get_origin(kind) is list or "Iterable" in str(get_origin(kind)) or "Sequence" in str(get_origin(kind)):
        yield []
        yield from ([value] for value in values_of(arguments[0]))
    elif get_origin(kind) is dict:
        yield {"1": next(values_of(arguments[1]))}
    else:
        for argument in arguments:
            yield from values_of(argument)


FIELDS = [
    pytest.param(body, name, kind, id=f"{body.__name__}.{name}")
    for body, (params, _) in BODIES.items()
    for name, kind in fields_of(params).items()
]


@pytest.mark.parametrize(("body", "name", "kind"), FIELDS)
def test_every_field_of_openais_is_taken_or_refused_by_its_name(body: type[Body], name: str, kind: Any) -> None:
    assert name in body.model_fields
    needed = BODIES[body][1]
    for value in values_of(kind):
        context = {"stream": True} if name == "partial_images" else {}
        context |= {"output_format": "jpeg"} if name == "output_compression" else {}
        try:
            body.model_validate(needed | context | {name: value})
        except ValidationError as error:
            first = error.errors()[0]
            assert first["loc"][0] == name or name in first["msg"], (value, first)
            assert "\n" not in first["msg"]
            assert value is not None
            assert first["type"] != "extra_forbidden"


@pytest.mark.parametrize(("theirs", "ours"), OTHER_MODELS)
def test_smaller_models_have_openais_fields(theirs: Any, ours: type[BaseModel]) -> None:
    assert set(fields_of(theirs)) <= set(ours.model_fields)


def test_no_field_but_the_extensions_is_ours_alone() -> None:
    extensions = set(DrawingOptions.model_fields) - set(fields_of(STREAMED_IMAGE))
    assert set(ImagesBody.model_fields) - set(fields_of(STREAMED_IMAGE)) == extensions
    assert set(ChatBody.model_fields) - set(fields_of(STREAMED_CHAT)) == (set(DrawingOptions.model_fields) - {"seed"})


def test_a_null_is_a_field_that_was_left_out() -> None:
    for body, (params, needed) in BODIES.items():
        optional = [name for name, kind in fields_of(params).items() if type(None) in get_args(kind)]
        assert len(optional) > 10
        assert body.model_validate(needed | dict.fromkeys(optional)) == body.model_validate(needed)
    message = {"role": "assistant", "content": None, "refusal": None, "images": None, "tool_calls": None}
    assert ChatMessage.model_validate(message) == ChatMessage(role="assistant")
    nested = ChatBody.model_validate({**BODIES[ChatBody][1], "seed": None, "extra_body": {"seed": 3}})
    assert nested.seed == 3


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"tools": [{"type": "function"}]}, "tools: not supported here; leave it out"),
        ({"frequency_penalty": 0.5}, "frequency_penalty: not supported here; leave it out"),
        ({"response_format": {"type": "json_object"}}, "response_format: not supported here; leave it out"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role: Input should be 'system', "),
        (
            {"messages": [{"role": "user", "content": [{"type": "file", "file": {}}]}]},
            "messages.0.content.0: Input tag 'file' found",
        ),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content: Input should be a valid string"),
    ],
)
def test_what_openai_has_and_the_model_has_not_is_refused_in_one_line(
    door: Running, fields: dict[str, Any], line: str
) -> None:
    answer = httpx2.post(f"{door.url}/v1/chat/completions", json=BODIES[ChatBody][1] | fields)
    assert answer.status_code == 422
    error = ErrorObject.model_validate(answer.json()["error"])
    assert error.message.startswith(line)
    assert error.param is not None
    assert line.startswith(error.param)


def checked(kind: type[BaseModel], data: Any, extensions: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    """Fails if OpenAI's type refuses the data, knows a part of it by no name, or misses one."""

    def walk(value: Any) -> None:
        if isinstance(value, list):
            for item in value:
                walk(item)
        if isinstance(value, BaseModel):
            assert set(value.model_extra or ()) <= extensions
            for name in value.model_fields_set:
                walk(getattr(value, name, None))

    parsed = kind.model_validate(data, strict=True)
    walk(parsed)
    assert set(kind.model_fields) - parsed.model_fields_set == NEVER_SENT.get(kind, set())


def events_of(door: Running, path: str, body: dict[str, Any]) -> list[tuple[str | None, str]]:
    """Returns the events of a stream: their names and data."""
    answer = httpx2.post(f"{door.url}{path}", json=body | {"stream": True}, timeout=60)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = []
    for block in answer.text.split("\n\n")[:-1]:
        fields = dict(line.split(": ", 1) for line in block.splitlines())
        assert set(fields) <= {"event", "data"}
        events.append((fields.get("event"), fields["data"]))
    return events


DRAW = {"prompt": "a", "num_inference_steps": 4, "seed": 1}


@pytest.mark.parametrize("response_format", ["b64_json", "url"])
@pytest.mark.parametrize("quality", ["auto", "low", "hd"])
def test_images_are_of_openais_type(door: Running, response_format: str, quality: str) -> None:
    body = DRAW | {"response_format": response_format, "quality": quality, "n": 2}
    answer = httpx2.post(f"{door.url}/v1/images/generations", json=body, timeout=60).json()
    checked(ImagesResponse, answer, {"seed"})
    for item in answer["data"]:
        assert set(item) == {response_format, "seed"}
        checked_item = DrawnImage.model_validate(item, strict=True)
        assert (checked_item.url is None) == (response_format == "b64_json")


def test_events_of_images_are_of_openais_types(door: Running) -> None:
    events = events_of(door, "/v1/images/generations", DRAW | {"partial_images": 2})
    kinds = [ImageGenPartialImageEvent, ImageGenPartialImageEvent, ImageGenCompletedEvent]
    for kind, (name, data) in zip(kinds, events, strict=True):
        event = json.loads(data)
        checked(kind, event, {"seed"})
        assert event["type"] == name


@pytest.mark.parametrize("draws", [False, True])
def test_chats_are_of_openais_types(door: Running, draws: bool) -> None:
    body: dict[str, Any] = {**BODIES[ChatBody][1], "max_tokens": 3}
    extensions = {"images"} if draws else set()
    if draws:
        body |= {"modalities": ["image", "text"], "num_inference_steps": 4}
    path = "/v1/chat/completions"
    answer = httpx2.post(f"{door.url}{path}", json=body, timeout=60).json()
    checked(ChatCompletion, answer, extensions)
    events = events_of(door, path, body | {"stream_options": {"include_usage": True}})
    assert events[-1] == (None, "[DONE]")
    for name, data in events[:-1]:
        assert name is None
        chunk = ChatCompletionChunk.model_validate_json(data, strict=True)
        assert "usage" in chunk.model_fields_set
        assert set(chunk.model_extra or ()) == set()
        for choice in chunk.choices:
            assert set(choice.delta.model_extra or ()) <= extensions
    assert json.loads(events[-2][1])["usage"] == answer["usage"]
    assert [json.loads(data)["choices"][0]["finish_reason"] for _, data in events[-3:-2]] != [None]
    without = events_of(door, path, body)
    assert all("usage" not in json.loads(data) for _, data in without[:-1])


def test_models_are_of_openais_type(door: Running) -> None:
    listed = httpx2.get(f"{door.url}/v1/models").json()
    assert listed["object"] == "list"
    for model in [*listed["data"], httpx2.get(f"{door.url}/v1/models/latte-flow").json()]:
        assert set(Model.model_fields) - Model.model_validate(model, strict=True).model_fields_set == {"shutdown_date"}


def test_a_message_that_openais_client_would_send_is_read(door: Running) -> None:
    """Every part of a user's message in OpenAI's own type."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(buffer, "PNG")
    uri = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    message: ChatCompletionUserMessageParam = {
        "role": "user",
        "name": "alice",
        "content": [
            {"type": "image_url", "image_url": {"url": uri, "detail": "original"}},
            {"type": "text", "text": "what is it?"},
        ],
    }
    TypeAdapter(ChatCompletionUserMessageParam).validate_python(message)
    body = {"messages": [message], "max_tokens": 2}
    answer = httpx2.post(f"{door.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
