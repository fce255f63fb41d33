"""`POST /v1/chat/completions`: answers about images, and drawing in a chat."""

from __future__ import annotations

import asyncio
import base64
import binascii
import time
import uuid
from collections.abc import Collection, Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx2

from runtime.answers import AnswerSettings
from runtime.chat import Message
from runtime.errors import InputError, one_line
from runtime.gateway.schema import ChatBody, ChatMessage, ImagePart
from runtime.images import MAX_FILE_BYTES, check_images
from runtime.serving.requests import AnswerRequest, Usage

FETCH_SECONDS = 10.0


def answer_request(body: ChatBody, conversation: tuple[Message, ...], client_id: str, request_id: str) -> AnswerRequest:
    """Returns the request for an answer."""
    settings = AnswerSettings(body.max_new_tokens, body.temperature, body.top_p, body.seed or 0, body.stops)
    return AnswerRequest(
        conversation,
        settings,
        priority=body.priority,
        deadline=body.deadline,
        client_id=client_id,
        request_id=request_id,
    )


async def conversation_of(messages: Sequence[ChatMessage], hosts: Collection[str]) -> tuple[Message, ...]:
    """Returns messages in the Hugging Face chat format; images are files, which are checked and not decoded.

    Args:
        hosts: those from which images may be fetched.

    Raises:
        InputError: an image cannot be read, or may not be fetched.
    """
    conversation: list[Message] = []
    images: list[bytes] = []
    for message in messages:
        parts: list[dict[str, Any]] = []
        if isinstance(message.content, str):
            parts.append({"type": "text", "text": message.content})
        of_list = message.content if isinstance(message.content, list) else []
        for part in (*of_list, *message.images):
            if isinstance(part, ImagePart):
                images.append(await read_url(part.image_url.url, hosts))
                parts.append({"type": "image", "image": images[-1]})
            else:
                parts.append({"type": "text", "text": part.text})
        role = "system" if message.role == "developer" else message.role
        plain = isinstance(message.content, str) and not message.images
        conversation.append({"role": role, "content": message.content if plain else parts})
    await asyncio.to_thread(check_images, images)
    return tuple(conversation)


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


async def read_url(url: str, hosts: Collection[str]) -> bytes:
    """Returns the file at a data URI, or at an http URL of an allowed host."""
    if url.startswith("data:"):
        header, comma, data = url.partition(",")
        if not comma or not header.endswith(";base64"):
            raise InputError("an image must be a data URI such as data:image/png;base64,…")
        try:
            return base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError) as error:
            raise InputError("the data URI of an image is not base64") from error
    return await _fetch(url, hosts)


async def _fetch(url: str, hosts: Collection[str]) -> bytes:
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError as error:
        raise InputError(f"an image's URL cannot be read: {one_line(error)}") from error
    if parts.scheme not in ("http", "https") or host not in hosts:
        allowed = f"only from {', '.join(sorted(hosts))}" if hosts else "from no host"
        raise InputError(f"images are fetched {allowed}; send a data URI (the operator can add --allow-image-host)")
    content = b""
    try:
        async with (
            httpx2.AsyncClient(timeout=FETCH_SECONDS, follow_redirects=False) as client,
            client.stream("GET", url) as response,
        ):
            if response.status_code != httpx2.codes.OK:
                raise InputError(f"{host} answered {response.status_code} for an image")
            async for piece in response.aiter_bytes():
                content += piece
                if len(content) > MAX_FILE_BYTES:
                    raise InputError(f"an image is larger than {MAX_FILE_BYTES} bytes; make it smaller")
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise InputError(f"an image could not be fetched from {host}: {one_line(error)}") from error
    return content


class Completion:
    """The parts of one answer that all its bodies share."""

    def __init__(self, model: str) -> None:
        self._same = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

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
        return {**self._same, "object": "chat.completion.chunk", "choices": [choice]}

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
