"""Conversations to tokens, as Qwen2-VL's processor of transformers makes them, without transformers or torch.

A message is a dict in the Hugging Face chat format: a role, and content that is text or a list of
parts, `{"type": "text", "text": …}` or `{"type": "image", "image": …}`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from runtime.errors import BundleError, InputError, one_line
from runtime.images import ImagePatches, ImageProcessor, Picture
from runtime.manifest import Manifest, check_file
from runtime.prompts import refuse_special_tokens

Message = Mapping[str, Any]
TEMPLATE_FILE = "chat_template.jinja"
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class ChatInputs:
    """Conversations side by side, ready for the engines."""

    input_ids: np.ndarray
    """`[B, T]` int64, padded on the right."""
    attention_mask: np.ndarray
    """`[B, T]` bool."""
    position_ids: np.ndarray
    """M-RoPE positions, `[3, B, T]` int64."""
    next_position: np.ndarray
    """The position of the first new token, `[B]` int64."""
    images: ImagePatches | None
    """All images in order."""


class ChatProcessor:
    """Chat template, tokenizer and image processor of a bundle."""

    def __init__(self, tokenizer: Tokenizer, template: Template, images: ImageProcessor, manifest: Manifest) -> None:
        self.tokenizer = tokenizer
        self._template = template
        self._images = images
        self._understanding = manifest.understanding
        self._prompt = manifest.prompt

    @classmethod
    def from_bundle(cls, bundle: Path, manifest: Manifest, tokenizer: Tokenizer) -> ChatProcessor:
        """Reads the bundle's template and processor, once they are known to be unaltered.

        Raises:
            BundleError: the bundle has none.
        """
        files = {entry.path: entry for entry in manifest.tokenizer_files}
        if TEMPLATE_FILE not in files:
            raise BundleError(f"{bundle} holds no {TEMPLATE_FILE}, so it cannot answer; export the checkpoint again")
        template = compile_template(check_file(bundle, files[TEMPLATE_FILE]).read_text(encoding="utf-8"))
        return cls(tokenizer, template, ImageProcessor.from_bundle(bundle, manifest), manifest)

    def __call__(self, conversations: Sequence[Sequence[Message]]) -> ChatInputs:
        """Conversations, each ending where the assistant's answer begins.

        Raises:
            InputError: a conversation that cannot be read, or that is longer than the model's limit.
        """
        texts: list[str] = []
        pictures: list[Picture] = []
        images_of: list[int] = []
        for conversation in conversations:
            parts = _parts_of(conversation)
            found = [part["image"] for part in parts if part["type"] == "image"]
            for part in parts:
                if part["type"] == "text":
                    refuse_special_tokens("message", part["text"], self._prompt)
            texts.append(self._render(conversation))
            images_of.append(len(found))
            pictures += found
        images = self._images(pictures) if pictures else None
        grids = list(images.grids) if images is not None else []
        rows = []
        for text, count in zip(texts, images_of, strict=True):
            rows.append(self._row(text, grids[:count]))
            grids = grids[count:]
        return self._side_by_side(rows, images)

    def _render(self, conversation: Sequence[Message]) -> str:
        try:
            return self._template.render(messages=conversation, add_generation_prompt=True)
        except TemplateError as error:
            raise InputError(f"the model's chat template refuses the conversation: {one_line(error)}") from error

    def _row(self, text: str, grids: Sequence[tuple[int, int]]) -> tuple[list[int], np.ndarray]:
        """Token ids with each image's place as wide as its tokens, and their M-RoPE positions `[3, T]`."""
        image_token = self._understanding.image_token_id
        ids: list[int] = []
        positions: list[np.ndarray] = []
        following, image = 0, 0
        for token in self.tokenizer.encode(text, add_special_tokens=False).ids:
            if token == image_token and image < len(grids):
                rows, columns = grids[image]
                row, column = np.divmod(np.arange(rows * columns), columns)
                positions.append(following + np.stack([np.zeros_like(row), row, column]))
                ids += [token] * (rows * columns)
                following += max(rows, columns)
                image += 1
            else:
                ids.append(token)
                positions.append(np.full((3, 1), following))
                following += 1
        limit = self._understanding.max_context_tokens
        if len(ids) >= limit:
            of_images = sum(rows * columns for rows, columns in grids)
            raise InputError(
                f"a conversation has {len(ids)} tokens, {of_images} of them for {len(grids)} images; the model's limit "
                f"is {limit} with the answer; shorten the text or give fewer or smaller images"
            )
        return ids, np.concatenate(positions, axis=1)

    def _side_by_side(self, rows: list[tuple[list[int], np.ndarray]], images: ImagePatches | None) -> ChatInputs:
        width = max(len(ids) for ids, _ in rows)
        input_ids = np.full((len(rows), width), self._prompt.pad_token_id, np.int64)
        mask = np.zeros((len(rows), width), bool)
        position_ids = np.zeros((3, len(rows), width), np.int64)
        for i, (ids, positions) in enumerate(rows):
            input_ids[i, : len(ids)] = ids
            mask[i, : len(ids)] = True
            position_ids[:, i, : len(ids)] = positions
        following = np.array([positions.max() + 1 for _, positions in rows], np.int64)
        return ChatInputs(input_ids, mask, position_ids, following, images)


def compile_template(source: str) -> Template:
    """A chat template with what transformers gives it, in a sandbox: a template comes with a checkpoint.

    Raises:
        BundleError: it is no template.
    """

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, **{"ensure_ascii": False} | options)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda style: datetime.now().strftime(style)
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise BundleError(f"the bundle's chat template is broken: {one_line(error)}") from error


def user_message(pictures: Sequence[Picture], question: str) -> Message:
    """One user turn: the pictures, then the question.

    Raises:
        InputError: the question is no text, or empty.
    """
    if not isinstance(question, str):
        raise InputError(f"a question must be text, got {type(question).__name__}")
    if not question.strip():
        raise InputError("the question is empty; ask something")
    images = [{"type": "image", "image": picture} for picture in pictures]
    return {"role": "user", "content": [*images, {"type": "text", "text": question}]}


def _parts_of(conversation: Sequence[Message]) -> list[Mapping[str, Any]]:
    """The parts of all messages, once their form is known to be right."""
    if not conversation:
        raise InputError("a conversation needs at least one message")
    parts: list[Mapping[str, Any]] = []
    for message in conversation:
        if not isinstance(message, Mapping) or message.get("role") not in ROLES or "content" not in message:
            raise InputError(f"a message needs a role ({', '.join(ROLES)}) and a content, got {message!r:.80}")
        content = message["content"]
        if isinstance(content, str):
            parts.append({"type": "text", "text": content})
            continue
        for part in content:
            if not isinstance(part, Mapping) or part.get("type") not in ("text", "image") or part["type"] not in part:
                raise InputError(
                    'a part of a message must be {"type": "text", "text": …} or {"type": "image", "image": …}, '
                    f"got {part!r:.80}"
                )
            parts.append(part)
    if conversation[-1]["role"] != "user":
        raise InputError(f"the last message must be the user's, got the {conversation[-1]['role']}'s")
    return parts
