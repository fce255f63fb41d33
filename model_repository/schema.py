"""What a request to the model `latte_flow` holds, and what comes back: one table for config, model and client.

Names are those of diffusers' pipelines, so that a JSON body for Triton's `generate` endpoint reads
like a call. Every input has one value unless its dims say otherwise. A request has a `prompt` (it
draws) or a `question` (it answers).
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from runtime.answers import AnswerSettings
from runtime.chat import Message, user_message
from runtime.errors import InputError
from runtime.pictures import png_bytes
from runtime.requests import GenerationRequest

MODEL = "latte_flow"
Layout = Literal["in-process", "per-engine"]
Platform = Literal["python", "onnxruntime", "tensorrt"]
ImageFormat = Literal["raw", "png", "png_base64"]
IMAGE_FORMATS: tuple[ImageFormat, ...] = ("raw", "png", "png_base64")
MAX_TEXT_BYTES = 65_536
"""Of a prompt or a question; the model's limit in tokens is far below."""
MAX_IMAGE_BYTES = 20_000_000
MAX_IMAGES_ASKED = 8
INVALID, CANCELLED, UNAVAILABLE, INTERNAL = "INVALID_ARG", "CANCELLED", "UNAVAILABLE", "INTERNAL"
"""Triton's codes that errors have; a message begins with its own."""


@dataclass(frozen=True)
class Field:
    """One input or output tensor."""

    name: str
    dtype: str
    """As Triton names it: "BYTES", "INT32", …"""
    dims: tuple[int, ...]
    about: str


INPUTS = (
    Field("prompt", "BYTES", (1,), "what to draw"),
    Field("negative_prompt", "BYTES", (1,), "what guidance leads away from"),
    Field("num_inference_steps", "INT32", (1,), "steps of Euler's method, default 20"),
    Field("guidance_scale", "FP32", (1,), "default 3; 1 is without guidance"),
    Field("shift", "FP32", (1,), "of the time grid, default 1; 2 is good for few steps"),
    Field("seed", "INT64", (1,), "image i is drawn from seed + i, default 0"),
    Field("num_images", "INT32", (1,), "pictures of the prompt, default 1"),
    Field("image_format", "BYTES", (1,), "raw, png, or png_base64 for JSON; default raw"),
    Field("progress", "BOOL", (1,), "send an event after every step"),
    Field("preview_every", "INT32", (1,), "send a decoded preview after so many steps"),
    Field("priority", "INT32", (1,), "-2 to 2; a higher one is served first"),
    Field("deadline", "FP32", (1,), "seconds after which the request is given up"),
    Field("question", "BYTES", (1,), "what to answer"),
    Field("image", "BYTES", (-1,), "pictures that the question is about: PNG or JPEG files, or their base64"),
    Field("max_new_tokens", "INT32", (1,), "an answer is cut here, default 128"),
    Field("temperature", "FP32", (1,), "0, the default, is greedy"),
    Field("top_p", "FP32", (1,), "sample from the likeliest tokens of this probability"),
    Field("stream", "BOOL", (1,), "send an answer piece by piece"),
)
OUTPUTS = (
    Field("event", "BYTES", (1,), "progress, preview, text, and last done"),
    Field("image_index", "INT32", (1,), "which picture, of progress and preview"),
    Field("step", "INT32", (1,), "steps that it has behind it"),
    Field("images", "UINT8", (-1, -1, -1, 3), "raw pictures [n, height, width, 3]: all of them in done"),
    Field("png", "BYTES", (-1,), "the same as PNG files or their base64"),
    Field("text", "BYTES", (1,), "a piece of an answer, or in done the whole"),
)
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
    """Pictures of a prompt, and how to send them."""

    generation: GenerationRequest
    image_format: ImageFormat
    progress: bool


@dataclass(frozen=True)
class AskRequest:
    """A question about pictures, and how to send the answer."""

    conversation: tuple[Message, ...]
    settings: AnswerSettings
    stream: bool


def engine_model(engine: str) -> str:
    """The Triton model of an engine, in the layout with one for each."""
    return f"{MODEL}_{engine}"


def read_request(tensors: Mapping[str, np.ndarray]) -> DrawRequest | AskRequest:
    """A request of its input tensors.

    Raises:
        InputError: one is unknown, of a wrong shape or value, or prompt and question are both there or both not.
    """
    values = {name: _value(name, array) for name, array in tensors.items()}
    if ("prompt" in values) == ("question" in values):
        raise InputError("a request needs either a prompt, to draw, or a question, to be answered")
    drawing = "prompt" in values
    split = [field.name for field in INPUTS].index("question")
    fitting = {field.name for field in (INPUTS[:split] if drawing else (*INPUTS[split:], _BY_NAME["seed"]))}
    if strange := sorted(set(values) - fitting):
        kind = "prompt" if drawing else "question"
        raise InputError(
            f"a request with a {kind} takes no {', '.join(strange)}; it takes {', '.join(sorted(fitting))}"
        )
    return _draw_request(values) if drawing else _ask_request(values)


def _value(name: str, array: np.ndarray) -> Any:
    if name not in _BY_NAME:
        raise InputError(f"unknown input {name!r}; known are {', '.join(_BY_NAME)}")
    field = _BY_NAME[name]
    if array.ndim != 1 or (field.dims == (1,) and array.size != 1):
        raise InputError(f"{name} must have shape {list(field.dims)}, got {list(array.shape)}")
    if field.dims == (-1,):
        return list(array)
    value = array[0]
    if field.dtype != "BYTES":
        return value.item()
    raw = value if isinstance(value, bytes) else str(value).encode()
    if len(raw) > MAX_TEXT_BYTES:
        raise InputError(f"{name} has {len(raw)} bytes, the limit is {MAX_TEXT_BYTES}; shorten it")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 text") from error


def _draw_request(values: dict[str, Any]) -> DrawRequest:
    image_format = values.pop("image_format", "raw")
    if image_format not in IMAGE_FORMATS:
        raise InputError(f"image_format must be one of {', '.join(IMAGE_FORMATS)}, got {image_format!r}")
    progress = values.pop("progress", False)
    return DrawRequest(GenerationRequest(**values), image_format, progress)


def _ask_request(values: dict[str, Any]) -> AskRequest:
    stream = values.pop("stream", False)
    pictures = [_picture(content) for content in values.pop("image", [])]
    if len(pictures) > MAX_IMAGES_ASKED:
        raise InputError(f"a question may be about {MAX_IMAGES_ASKED} images, got {len(pictures)}")
    message = user_message(pictures, values.pop("question"))
    return AskRequest((message,), AnswerSettings(**values), stream)


def _picture(content: bytes | str) -> Image.Image:
    raw = content if isinstance(content, bytes) else content.encode()
    if len(raw) > MAX_IMAGE_BYTES:
        raise InputError(f"an image has {len(raw)} bytes, the limit is {MAX_IMAGE_BYTES}; make it smaller")
    if not raw.startswith((b"\x89PNG", b"\xff\xd8")):
        try:
            raw = base64.b64decode(raw, validate=True)
        except binascii.Error as error:
            raise InputError("an image must be a PNG or JPEG file, or its base64") from error
    try:
        return Image.open(io.BytesIO(raw), formats=("PNG", "JPEG"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError("an image must be a PNG or JPEG file, or its base64; this one cannot be opened") from error


def write_images(pixels: np.ndarray, image_format: ImageFormat) -> tuple[str, np.ndarray]:
    """The output tensor of pictures `[n, height, width, 3]` uint8: its name and value."""
    if image_format == "raw":
        return "images", pixels
    files = [png_bytes(Image.fromarray(image)) for image in pixels]
    if image_format == "png_base64":
        files = [base64.b64encode(file) for file in files]
    return "png", np.array(files, dtype=np.object_)
