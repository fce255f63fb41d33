"""`POST /v1/images/generations`: from the body to a request, and from its images to OpenAI's responses and events.

Needs no web server: batches take and write the same bodies.
"""

from __future__ import annotations

import base64
import io
import secrets
import time
from typing import Any

import numpy as np
from PIL import Image

from runtime.errors import InputError
from runtime.gateway.schema import DrawingOptions, ImagesBody, OutputFormat
from runtime.serving.requests import GenerationRequest, Usage
from runtime.serving.service import ServedModel

DEFAULT_COMPRESSION = 100
"""As OpenAI's: the best quality."""
MEDIA_TYPES: dict[OutputFormat, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
RANDOM_SEEDS = 2**32
QUALITY_FACTORS = {"low": 0.5, "high": 2, "hd": 2}
"""Number of steps by quality, as a multiple of the default."""


def generation_request(
    options: DrawingOptions, prompt: str, model: ServedModel, client_id: str, request_id: str, n: int = 1
) -> GenerationRequest:
    """Returns the request for images; a seed is chosen where none is given.

    Raises:
        InputError: the model draws no images of that size, or cannot be sampled like this.
    """
    size = f"{model.width}x{model.height}"
    if options.size not in ("auto", size):
        raise InputError(f"size must be auto or {size}, the size that {model.name} was trained for; got {options.size}")
    sampling = model.sampling.choose(
        options.num_inference_steps or model.sampling.scaled_steps(QUALITY_FACTORS.get(options.quality, 1)),
        options.guidance_scale,
        options.shift,
        options.negative_prompt,
    )
    return GenerationRequest(
        prompt,
        options.negative_prompt,
        *sampling,
        secrets.randbelow(RANDOM_SEEDS) if options.seed is None else options.seed,
        n,
        priority=options.priority,
        deadline=options.deadline,
        client_id=client_id,
        request_id=request_id,
    )


def encode(pixels: np.ndarray, options: DrawingOptions) -> bytes:
    """Returns an image `[height, width, 3]` uint8 as a file."""
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    compression = DEFAULT_COMPRESSION if options.output_compression is None else options.output_compression
    if options.output_format == "png":
        image.save(buffer, "PNG")
    else:
        image.save(buffer, options.output_format.upper(), quality=compression)
    return buffer.getvalue()


def preview_every(steps: int, partial_images: int) -> int:
    """Returns the number of steps between previews, so that at least so many come before the end, spread evenly."""
    return max(1, steps // (partial_images + 1)) if partial_images else 0


def base64_text(file: bytes) -> str:
    """Returns a file as base64."""
    return base64.b64encode(file).decode("ascii")


def data_uri(file: bytes, output_format: OutputFormat) -> str:
    """Returns a file as a data URI."""
    return f"data:{MEDIA_TYPES[output_format]};base64,{base64_text(file)}"


def usage_body(usage: Usage) -> dict[str, Any]:
    """Returns the usage of an image request, as OpenAI reports it: a latent is an image token."""
    return {
        "input_tokens": usage.input_tokens,
        "input_tokens_details": {"image_tokens": 0, "text_tokens": usage.input_tokens},
        "output_tokens": usage.output_tokens,
        "output_tokens_details": {"image_tokens": usage.output_tokens, "text_tokens": 0},
        "total_tokens": usage.input_tokens + usage.output_tokens,
    }


def said(options: DrawingOptions, model: ServedModel) -> dict[str, str]:
    """Returns what every response and event repeats of the request."""
    qualities = {"hd": "high", "standard": "medium", "auto": "medium"}
    return {
        "size": f"{model.width}x{model.height}",
        "output_format": options.output_format,
        "quality": qualities.get(options.quality, options.quality),
        "background": "opaque",
    }


def response_body(
    body: ImagesBody,
    model: ServedModel,
    seed: int,
    items: list[dict[str, str]],
    usage: Usage,
    created: int | None = None,
) -> dict[str, Any]:
    """Returns the response: each item has `b64_json` or `url`, and the seed that draws the same image again.

    Args:
        created: in seconds since 1970; by default now.
    """
    data = [item | {"seed": seed + index} for index, item in enumerate(items)]
    created = int(time.time()) if created is None else created
    return {"created": created, "data": data, **said(body, model), "usage": usage_body(usage)}


def event_body(
    body: ImagesBody, model: ServedModel, seed: int, file: bytes, index: int | None, usage: Usage | None
) -> dict[str, Any]:
    """Returns one event of a stream: a partial image where there is an index, or the completed one."""
    name = "completed" if index is None else "partial_image"
    event: dict[str, Any] = {
        "type": f"image_generation.{name}",
        "b64_json": base64_text(file),
        "created_at": int(time.time()),
        **said(body, model),
        "seed": seed,
    }
    if index is not None:
        event["partial_image_index"] = index
    if usage is not None:
        event["usage"] = usage_body(usage)
        del event["usage"]["output_tokens_details"]  # OpenAI's events are without it
    return event
