"""Requests to the model `latte_flow`, and its responses: one table for configuration, model and client.

The names are those of diffusers' pipelines, so that a JSON body for Triton's `generate` endpoint reads like a call.
Every input has one value unless its dims say otherwise. A request has a `prompt`, a `question`, `messages`, a
`heartbeat` or a `cancel`.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import numpy as np
from PIL import Image
from pydantic import BaseModel, Discriminator, TypeAdapter, ValidationError

from runtime.answers import DEFAULT_MAX_NEW_TOKENS, AnswerSettings
from runtime.chat import Message, user_message
from runtime.errors import InputError, line_of
from runtime.flow_time import Sampling, SamplingDefaults
from runtime.images import FORMATS, MAX_FILE_BYTES, check_file_size, check_number, png_bytes
from runtime.serving.requests import AnswerRequest, GenerationRequest

MODEL = "latte_flow"
DRAIN_SECONDS = 60
"""How long requests in flight may take to finish when a service ends. The server's exit timeout is the same."""
ENGINE_FILE = "engine.json"
"""The entry of an engine in the manifest, in its model's folder."""
Layout = Literal["in-process", "per-engine"]
Platform = Literal["python", "onnxruntime", "tensorrt"]
RequestKind = Literal["prompt", "question", "messages", "heartbeat", "cancel"]
ImageFormat = Literal["raw", "png", "png_base64"]
IMAGE_FORMATS: tuple[ImageFormat, ...] = ("raw", "png", "png_base64")
MAX_TEXT_BYTES = 65_536
"""Limit of a prompt or a question; the model's own limit in tokens is far lower."""
IMAGE_BEGINNINGS = (b"\x89PNG", b"\xff\xd8", b"RIFF", b"GIF8")
"""Of the files of an image's formats; anything else must be the base64 of one."""
INVALID, CANCELLED, UNAVAILABLE, INTERNAL = "INVALID_ARG", "CANCELLED", "UNAVAILABLE", "INTERNAL"
"""Triton's codes of errors; each message begins with its code."""
DEADLINE = "DEADLINE_EXCEEDED"
"""Begins the message of a request that was too late. Triton has no such code, so its code is `UNAVAILABLE`."""
CLIENT_HEADER = "x-client-id"
"""A header that the server forwards as a request's parameter. It says who asks, and goes before `client_id`."""


@dataclass(frozen=True)
class Field:
    """One input or output tensor."""

    name: str
    dtype: str
    """Triton's name of it: "BYTES", "INT32", …"""
    dims: tuple[int, ...]
    about: str
    requests: tuple[RequestKind, ...] = ()
    """The kinds of requests that take this input."""


DRAW: tuple[RequestKind, ...] = ("prompt",)
ASK: tuple[RequestKind, ...] = ("question", "messages")
INPUTS = (
    Field("prompt", "BYTES", (1,), "what to draw", DRAW),
    Field("negative_prompt", "BYTES", (1,), "what the image should not show", DRAW),
    Field("num_inference_steps", "INT32", (1,), "number of Euler steps; default: the model's", DRAW),
    Field("guidance_scale", "FP32", (1,), "1 disables guidance and halves the cost", DRAW),
    Field("shift", "FP32", (1,), "time-grid shift; try 2 with few steps", DRAW),
    Field("seed", "INT64", (1,), "default 0; image i is drawn from seed + i", (*DRAW, *ASK)),
    Field("num_images", "INT32", (1,), "number of images, default 1", DRAW),
    Field("image_format", "BYTES", (1,), "raw (the default), png, or png_base64 for JSON", DRAW),
    Field("progress", "BOOL", (1,), "send a response after every step", DRAW),
    Field("preview_every", "INT32", (1,), "number of steps between decoded previews", DRAW),
    Field("priority", "INT32", (1,), "-2 to 2; requests with a higher priority are served first", (*DRAW, *ASK)),
    Field("deadline", "FP32", (1,), "seconds after which the request fails", (*DRAW, *ASK)),
    Field("client_id", "BYTES", (1,), "who asks; a client's requests share its quota", (*DRAW, *ASK, "cancel")),
    Field("question", "BYTES", (1,), "what to answer", ("question",)),
    Field(
        "messages",
        "BYTES",
        (1,),
        "a conversation instead, as JSON in the Hugging Face chat format; a part {type: image, image: i} is image i",
        ("messages",),
    ),
    Field(
        "image", "BYTES", (-1,), f"images that the question is about: {', '.join(FORMATS)} files, or their base64", ASK
    ),
    Field("max_new_tokens", "INT32", (1,), f"largest number of tokens, default {DEFAULT_MAX_NEW_TOKENS}", ASK),
    Field("temperature", "FP32", (1,), "default 0, which takes the most likely token", ASK),
    Field("top_p", "FP32", (1,), "sample from the most likely tokens with this probability", ASK),
    Field("stop", "BYTES", (-1,), "texts that end the answer", ASK),
    Field("stream", "BOOL", (1,), "send the answer piece by piece", ASK),
    Field("heartbeat", "BOOL", (1,), "ask only whether the service works; answered at once", ("heartbeat",)),
    Field("cancel", "BYTES", (1,), "the id of an open request of the same client, which ends", ("cancel",)),
)
OUTPUTS = (
    Field("event", "BYTES", (1,), "progress, preview, text, and last done"),
    Field("image_index", "INT32", (1,), "index of the image, in progress and preview"),
    Field("step", "INT32", (1,), "number of finished steps"),
    Field("images", "UINT8", (-1, -1, -1, 3), "raw images [n, height, width, 3]; all of them in done"),
    Field("png", "BYTES", (-1,), "images as PNG files or their base64"),
    Field("text", "BYTES", (1,), "a piece of an answer; the whole answer in done"),
    Field("input_tokens", "INT32", (1,), "tokens of the prompt or the conversation, in done"),
    Field("output_tokens", "INT32", (1,), "latents of the images, or tokens of the answer, in done"),
    Field("finish_reason", "BYTES", (1,), "stop, or length for an answer that a limit cut off, in done"),
)
COMMON = ("priority", "deadline", "client_id")
"""Inputs of every request that waits in a queue."""
_BY_NAME = {field.name: field for field in INPUTS}
NUMPY_DTYPES = {
    "BYTES": np.object_,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP32": np.float32,
    "BOOL": np.bool_,
    "UINT8": np.uint8,
}


@dataclass(frozen=True)
class DrawRequest:
    """A request for images, and how to send them."""

    generation: GenerationRequest
    image_format: ImageFormat
    progress: bool


@dataclass(frozen=True)
class AskRequest:
    """A question about images, and how to send the answer."""

    answer: AnswerRequest
    stream: bool


@dataclass(frozen=True)
class HeartbeatRequest:
    """A request that waits in no queue."""


@dataclass(frozen=True)
class CancelRequest:
    """A request that ends another one of the same client."""

    request_id: str
    client_id: str


AnyWanted = DrawRequest | AskRequest | HeartbeatRequest | CancelRequest


def engine_model(engine: str) -> str:
    """Returns the name of an engine's own Triton model, in the layout per-engine."""
    return f"{MODEL}_{engine}"


def read_request(
    tensors: Mapping[str, np.ndarray],
    parameters: Mapping[str, Any] = {},
    request_id: str = "",
    sampling: SamplingDefaults = SamplingDefaults(),
) -> AnyWanted:
    """Makes a request of its input tensors.

    Args:
        parameters: of the request; a header that says who asks is one of them.
        request_id: the client's name for the request.
        sampling: how the model is sampled where the request says nothing.

    Raises:
        InputError: an input is unknown or wrong, or there is not exactly one of prompt, question, heartbeat and cancel.
    """
    values = {name: _value(name, array) for name, array in tensors.items()}
    kinds: list[RequestKind] = [kind for kind in get_args(RequestKind) if kind in values]
    if len(kinds) != 1:
        raise InputError("a request needs either a prompt, to draw, or a question or messages, to be answered")
    (kind,) = kinds
    fitting = {field.name for field in INPUTS if kind in field.requests}
    if strange := sorted(set(values) - fitting):
        raise InputError(
            f"a request with a {kind} takes no {', '.join(strange)}; it takes {', '.join(sorted(fitting))}"
        )
    if kind == "heartbeat":
        return HeartbeatRequest()
    common = {"request_id": request_id} | {name: values.pop(name) for name in COMMON if name in values}
    if CLIENT_HEADER in parameters:
        common["client_id"] = str(parameters[CLIENT_HEADER])
    if kind == "cancel":
        if not values["cancel"]:
            raise InputError("cancel must be the id of a request, got an empty text")
        return CancelRequest(values["cancel"], common.get("client_id", ""))
    return _draw_request(values, common, sampling) if kind == "prompt" else _ask_request(values, common)


def _value(name: str, array: np.ndarray) -> Any:
    if name not in _BY_NAME:
        raise InputError(f"unknown input {name!r}; known are {', '.join(_BY_NAME)}")
    field = _BY_NAME[name]
    if array.ndim != 1 or (field.dims == (1,) and array.size != 1):
        raise InputError(f"{name} must have shape {list(field.dims)}, got {list(array.shape)}")
    if field.dims == (-1,):
        return list(array)
    value = array[0]
    return _text(name, value) if field.dtype == "BYTES" else value.item()


def _text(name: str, value: Any) -> str:
    raw = value if isinstance(value, bytes) else str(value).encode()
    if len(raw) > MAX_TEXT_BYTES:
        raise InputError(f"{name} has {len(raw)} bytes, the limit is {MAX_TEXT_BYTES}; shorten it")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 text") from error


def _draw_request(values: dict[str, Any], common: dict[str, Any], sampling: SamplingDefaults) -> DrawRequest:
    image_format = values.pop("image_format", "raw")
    if image_format not in IMAGE_FORMATS:
        raise InputError(f"image_format must be one of {', '.join(IMAGE_FORMATS)}, got {image_format!r}")
    progress = values.pop("progress", False)
    chosen = sampling.choose(
        **{name: values.pop(name) for name in Sampling._fields if name in values},
        negative_prompt=values.get("negative_prompt", ""),
    )
    return DrawRequest(GenerationRequest(**values, **chosen._asdict(), **common), image_format, progress)


def _ask_request(values: dict[str, Any], common: dict[str, Any]) -> AskRequest:
    stream = values.pop("stream", False)
    files = values.pop("image", [])
    check_number(len(files))
    images = [_image_file(content) for content in files]
    if "messages" in values:
        conversation = _conversation(values.pop("messages"), images)
    else:
        conversation = (user_message(images, values.pop("question")),)
    stop = tuple(_text("stop", text) for text in values.pop("stop", []))
    return AskRequest(AnswerRequest(conversation, AnswerSettings(**values, stop=stop), **common), stream)


def _conversation(text: str, images: Sequence[bytes]) -> tuple[Message, ...]:
    """Reads a conversation whose image parts are indices, each of an image that is used once."""
    try:
        messages = _MESSAGES.validate_json(text)
    except ValidationError as error:
        reason = line_of(error.errors()[0], "the text")
        raise InputError(f"messages must be a JSON list of messages, each with role and content: {reason}") from error
    left = dict(enumerate(images))
    conversation: list[Message] = []
    for message in messages:
        parts: list[dict[str, Any]] = []
        for part in message.content if isinstance(message.content, list) else []:
            if isinstance(part, _TextPart):
                parts.append({"type": "text", "text": part.text})
            elif part.image not in left:
                raise InputError(f"messages show image {part.image}, which is not there or shown already")
            else:
                parts.append({"type": "image", "image": left.pop(part.image)})
        content = message.content if isinstance(message.content, str) else parts
        conversation.append({"role": message.role, "content": content})
    if left:
        raise InputError(f"messages do not show image {min(left)}; give as many images as they show")
    return tuple(conversation)


class _TextPart(BaseModel):
    type: Literal["text"]
    text: str


class _ImagePart(BaseModel):
    type: Literal["image"]
    image: int


class _Message(BaseModel):
    role: Literal["system", "user", "assistant"]
    content: str | list[Annotated[_TextPart | _ImagePart, Discriminator("type")]]


_MESSAGES = TypeAdapter(list[_Message])


def _image_file(content: bytes | str) -> bytes:
    """Returns an image's file. It is opened by the scheduler's readers, since even that can take long."""
    raw = content if isinstance(content, bytes) else content.encode()
    if not raw.startswith(IMAGE_BEGINNINGS):
        check_file_size(len(raw), MAX_FILE_BYTES * 4 // 3 + 4)
        try:
            raw = base64.b64decode(raw, validate=True)
        except binascii.Error as error:
            raise InputError(f"an image must be a {', '.join(FORMATS)} file, or its base64") from error
    check_file_size(len(raw))
    return raw


def encode_image(pixels: np.ndarray, image_format: ImageFormat) -> bytes:
    """Returns an image `[height, width, 3]` uint8 as a PNG file, or its base64."""
    file = png_bytes(Image.fromarray(pixels))
    return base64.b64encode(file) if image_format == "png_base64" else file


def write_images(images: Sequence[np.ndarray | bytes]) -> tuple[str, np.ndarray]:
    """Returns name and value of the output tensor for images: all `[height, width, 3]` uint8, or all encoded."""
    if isinstance(images[0], np.ndarray):
        return "images", np.stack(images)
    return "png", np.array(images, dtype=np.object_)
