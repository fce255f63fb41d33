"""`POST /v1/chat/completions`: answers about images, and drawing in a chat.

Needs no web server: batches take and write the same bodies.
"""

from __future__ import annotations

import base64
import binascii
import time
import uuid
from collections.abc import Sequence
from typing import Any

from runtime.answers import AnswerSettings
from runtime.chat import Message
from runtime.errors import InputError
from runtime.gateway.schema import ChatBody, ChatMessage, ImagePart, TextPart
from runtime.images import check_images
from runtime.serving.requests import AnswerRequest, Usage


def answer_request(body: ChatBody, conversation: tuple[Message, ...], client_id: str, request_id: str) -> AnswerRequest:
    """Returns the request for an answer."""
    settings = AnswerSettings(body.max_new_tokens, body.temperature, body.top_p, body.seed or 0, tuple(body.stop))
    return AnswerRequest(
        conversation,
        settings,
        priority=body.priority,
        deadline=body.deadline,
        client_id=client_id,
        request_id=request_id,
    )


def image_urls(messages: Sequence[ChatMessage]) -> list[str]:
    """Returns the URLs of all images, in order."""
    return [part.image_url.url for message in messages for part in _parts(message) if isinstance(part, ImagePart)]


def conversation_of(messages: Sequence[ChatMessage], files: Sequence[bytes]) -> tuple[Message, ...]:
    """Returns messages in the Hugging Face chat format.

    Args:
        files: the images at `image_urls(messages)`; they are checked and not decoded.

    Raises:
        InputError: an image cannot be used.
    """
    conversation: list[Message] = []
    images = iter(files)
    for message in messages:
        parts: list[dict[str, Any]] = []
        if isinstance(message.content, str):
            parts.append({"type": "text", "text": message.content})
        for part in _parts(message):
            if isinstance(part, ImagePart):
                parts.append({"type": "image", "image": next(images)})
            else:
                parts.append({"type": "text", "text": part.text})
        role = "system" if message.role == "developer" else message.role
        plain = isinstance(message.content, str) and not message.images
        conversation.append({"role": role, "content": message.content if plain else parts})
    check_images(files)
    return tuple(conversation)


def _parts(message: ChatMessage) -> list[TextPart | ImagePart]:
    of_list = message.content if isinstance(message.content, list) else []
    return [*of_list, *message.images]


def prompt_of(messages: Sequence[ChatMessage]) -> str:
    """Returns what to draw: the text of the last message.

    Raises:
        InputError: it is not the user's, shows an image, or says nothing.
    """
    last = messages[-1]
    if last.role != "user":
        raise InputError(f"the last message must be the user's, got the {last.role}'s")
    parts = last.content if isinstance(last.content, list) else []
    if last.images or any(isinstance(part, ImagePart) for part in parts):
        raise InputError(
            'the model cannot draw from an image; describe it in words, or leave "image" out of modalities'
        )
    texts = [part.text for part in parts if not isinstance(part, ImagePart)]
    prompt = last.content if isinstance(last.content, str) else "\n".join(texts)
    if not prompt.strip():
        raise InputError("the last message says nothing to draw")
    return prompt


def content_of(uri: str) -> bytes:
    """Returns the file in a data URI."""
    header, comma, data = uri.partition(",")
    if not uri.startswith("data:") or not comma or not header.endswith(";base64"):
        raise InputError("an image must be a data URI such as data:image/png;base64,…")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError("the data URI of an image is not base64") from error


class Completion:
    """The parts of one answer that all its bodies share.

    Args:
        name: the answer's own part of its id; by default one that no other has.
        created: in seconds since 1970; by default now.
        reports_usage: whether a stream ends with the usage; all other chunks have none then.
    """

    def __init__(
        self, model: str, name: str | None = None, created: int | None = None, reports_usage: bool = False
    ) -> None:
        name = uuid.uuid4().hex if name is None else name
        created = int(time.time()) if created is None else created
        self._same = {"id": f"chatcmpl-{name}", "created": created, "model": model}
        self._no_usage: dict[str, None] = {"usage": None} if reports_usage else {}

    def body(self, message: dict[str, Any], usage: Usage) -> dict[str, Any]:
        """Returns the whole answer."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "refusal": None} | message,
            "finish_reason": finish_reason(usage),
            "logprobs": None,
        }
        return {**self._same, "object": "chat.completion", "choices": [choice], "usage": usage_body(usage)}

    def chunk(self, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        """Returns a piece of a streamed answer."""
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return {**self._same, "object": "chat.completion.chunk", "choices": [choice], **self._no_usage}

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """Returns the chunk after the last, for those who want to know the usage."""
        return {**self._same, "object": "chat.completion.chunk", "choices": [], "usage": usage_body(usage)}


def finish_reason(usage: Usage) -> str:
    """Returns why an answer ended."""
    return "length" if usage.ended_by_length else "stop"


def usage_body(usage: Usage) -> dict[str, int]:
    """Returns the usage of an answer, as OpenAI reports it."""
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
    }


def drawn_message(uris: Sequence[str]) -> dict[str, Any]:
    """Returns a message with images instead of text."""
    images = [{"type": "image_url", "image_url": {"url": uri}} for uri in uris]
    return {"content": None, "images": images}
