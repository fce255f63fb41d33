"""Rows of a batch: what each asks for, and the request that it becomes.

A row is plain, with values named like the arguments of a call, or a request in OpenAI's batch format. Both become the
gateway's bodies, so that a batch takes what the gateway takes and refuses what it refuses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import ValidationError

from runtime.batch.fetching import Fetched, content_at
from runtime.batch.places import is_url
from runtime.chat import user_message
from runtime.errors import InputError, line_of
from runtime.flow_time import check_seeds
from runtime.gateway.chat import answer_request, content_of, conversation_of, image_urls, prompt_of
from runtime.gateway.images import generation_request
from runtime.gateway.schema import ChatBody, ImagesBody
from runtime.images import ImageInput, check_images
from runtime.serving.requests import AnswerRequest, AnyRequest, RequestKind
from runtime.serving.service import ServedModel

IMAGES_URL = "/v1/images/generations"
CHAT_URL = "/v1/chat/completions"
DRAWING = {
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "num_inference_steps": "num_inference_steps",
    "guidance_scale": "guidance_scale",
    "shift": "shift",
    "seed": "seed",
    "num_images_per_prompt": "n",
}
"""Columns of a row that draws, and the fields of `ImagesBody` that they become."""
ASKING = {
    "question": "messages",
    "max_new_tokens": "max_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "seed": "seed",
    "stop": "stop",
}
"""Columns of a row that asks, and the fields of `ChatBody` that they become."""
IMAGE_COLUMNS = ("image", "images")
COLUMNS = tuple(dict.fromkeys(("id", *DRAWING, *ASKING, *IMAGE_COLUMNS)))
_SEED_BYTES = 6
"""Of the hash of an id: every program reads such a number from JSON exactly."""


@dataclass(frozen=True)
class Row:
    """One row of the input. It can be pickled, and is all that a worker needs to know."""

    place: str
    """Where it is, for messages: "line 7"."""
    id: str
    values: Mapping[str, Any]
    """The values of a plain row, or the body of OpenAI's."""
    kept: Mapping[str, Any] = field(default_factory=dict)
    """Values that are only carried to the output."""
    url: str = ""
    """OpenAI's endpoint; nothing for a plain row."""
    error: str = ""
    """Why it cannot be run."""
    kind: RequestKind = "ask"
    """What it asks for, if it can be run."""


def kind_of(body: ImagesBody | ChatBody) -> RequestKind:
    """Returns what a body asks for."""
    return "draw" if isinstance(body, ImagesBody) or body.draws else "ask"


def body_of(row: Row) -> ImagesBody | ChatBody:
    """Returns a row's body; no image is opened.

    Raises:
        InputError: the row does not say what to do, or a value is of the wrong kind.
    """
    names: Mapping[str, str] = {}
    if row.url:
        if row.url not in (IMAGES_URL, CHAT_URL):
            raise InputError(f"url must be {IMAGES_URL} or {CHAT_URL}, got {row.url!r}")
        draws = row.url == IMAGES_URL
        body: dict[str, Any] = dict(row.values)
    else:
        draws = "prompt" in row.values
        names = DRAWING if draws else ASKING
        body = _plain_body(row, names)
    try:
        return (ImagesBody if draws else ChatBody).model_validate(body)
    except ValidationError as error:
        columns = {target: column for column, target in names.items()}
        first = error.errors()[0]
        loc = ("question",) if names and first["loc"][:1] == ("messages",) else first["loc"]
        raise InputError(line_of({**first, "loc": [columns.get(str(part), part) for part in loc]})) from error


def missing_in(body: ImagesBody | ChatBody, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of defaults that a body leaves open, in its words. `quality` says the number of steps too."""
    names = DRAWING if kind_of(body) == "draw" else ASKING
    given = set(body.model_fields_set)
    if "quality" in given and body.quality != "auto":
        given.add("num_inference_steps")
    if "max_completion_tokens" in given:
        given.add("max_tokens")
    fields = {names[name]: value for name, value in defaults.items() if name in names}
    return {field: value for field, value in fields.items() if field not in given}


def _plain_body(row: Row, names: Mapping[str, str]) -> dict[str, Any]:
    if "prompt" not in row.values and "question" not in row.values:
        raise InputError("the row has neither a prompt (to draw) nor a question (to answer)")
    draws = names is DRAWING
    allowed = {*names, *(() if draws else IMAGE_COLUMNS)}
    if wrong := sorted(set(row.values) - allowed):
        verb = "draws" if draws else "asks"
        raise InputError(f"a row that {verb} has no {wrong[0]}; its columns are {', '.join(sorted(allowed))}")
    body = {names[name]: value for name, value in row.values.items() if name in names}
    if not draws:
        body["messages"] = [{"role": "user", "content": row.values["question"]}]
    return body


def urls_of(row: Row, body: ImagesBody | ChatBody) -> list[str]:
    """Returns the URLs from which a row's images have to be read first.

    Raises:
        InputError: something else than an image is there.
    """
    if isinstance(body, ImagesBody) or body.draws:
        return []
    if row.url:
        return [url for url in image_urls(body.messages) if not url.startswith("data:")]
    images = [image for image in images_of(row.values) if isinstance(image, str)]
    return [image for image in images if is_url(image) and not image.startswith("data:")]


def request_of(row: Row, body: ImagesBody | ChatBody, model: ServedModel, fetched: Fetched) -> AnyRequest:
    """Returns the request of a row. Where it has no seed, one follows from its id.

    Args:
        fetched: what is at the row's `urls_of`.

    Raises:
        InputError: an image cannot be used, or the model cannot do it.
    """
    if body.model not in (None, "", model.name):
        raise InputError(f"the model {body.model!r} is not here; use {model.name!r}, or give --model-name")
    if body.seed is None:
        body = body.model_copy(update={"seed": seed_of(row.id)})
    if isinstance(body, ImagesBody):
        request: AnyRequest = generation_request(body, body.prompt, model, "", row.id, body.n)
    elif body.draws:
        request = generation_request(body, prompt_of(body.messages), model, "", row.id)
    else:
        if row.url:
            urls = image_urls(body.messages)
            conversation = conversation_of(body.messages, [_content_at(url, fetched) for url in urls])
        else:
            images = [
                _content_at(image, fetched) if isinstance(image, str) and _is_elsewhere(image) else image
                for image in images_of(row.values)
            ]
            check_images(images)
            conversation = (user_message(images, row.values["question"]),)
        check_seeds((body.seed or 0,))
        request = answer_request(body, conversation, "", row.id)
    return replace(request, priority=0, deadline=None)  # results must not depend on time


def _is_elsewhere(image: str) -> bool:
    return image.startswith("data:") or is_url(image)


def _content_at(url: str, fetched: Fetched) -> bytes:
    return content_of(url) if url.startswith("data:") else content_at(url, fetched)


def images_of(values: Mapping[str, Any]) -> list[ImageInput]:
    """Returns the images of a plain row: paths, or the content of files.

    Raises:
        InputError: something else is there.
    """
    several = values.get("images") or ()
    if not isinstance(several, Sequence) or isinstance(several, (str, bytes)):
        raise InputError("images must be a list of paths")
    given = ([values["image"]] if values.get("image") is not None else []) + list(several)
    return [_image(value) for value in given]


def _image(value: Any) -> ImageInput:
    if isinstance(value, Mapping):  # as Hugging Face stores images
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if not isinstance(value, (str, bytes)) or not value:
        raise InputError(f"an image must be a path or the content of a file, got {type(value).__name__}")
    return value


def question_of(request: AnswerRequest) -> str:
    """Returns the text of the last message."""
    content = request.conversation[-1]["content"]
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part["type"] == "text")


def seed_of(name: str) -> int:
    """Returns the seed that follows from an id."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:_SEED_BYTES])
