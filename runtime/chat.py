"""Text and images to tokens, as Qwen2-VL's processor in transformers does it, without transformers or torch.

Prompts and conversations take the same way: through the model's chat template, then the tokenizer. A prompt is a
conversation of one user message.

A message is a dict in the Hugging Face chat format: a role, and content that is text or a list of parts,
`{"type": "text", "text": …}` or `{"type": "image", "image": …}`.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from runtime.errors import BundleError, InputError, one_line
from runtime.image_processor import ImagePatches, ImageProcessor
from runtime.images import ImageInput
from runtime.manifest import Manifest

Message = Mapping[str, Any]
TOKENIZER_FILE = "tokenizer.json"
TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class ChatInputs:
    """Conversations as a batch, ready for the engines."""

    input_ids: np.ndarray
    """`[B, T]` int64, padded on the right."""
    attention_mask: np.ndarray
    """`[B, T]` bool."""
    position_ids: np.ndarray
    """M-RoPE positions, `[3, B, T]` int64."""
    next_position: np.ndarray
    """Position of the first new token, `[B]` int64."""
    images: ImagePatches | None
    """The images of all conversations, in order."""


class ChatProcessor:
    """The chat template, tokenizer and image processor of a bundle."""

    def __init__(self, bundle: Path, manifest: Manifest) -> None:
        """Reads the bundle's tokenizer and template after checking that they were not altered.

        Raises:
            BundleError: one of them is missing, altered or broken.
        """
        path = manifest.tokenizer_file(bundle, TOKENIZER_FILE)
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise BundleError(f"{path} is not a tokenizer: {one_line(error)}") from error
        added = self.tokenizer.get_added_tokens_decoder()
        named = {self.tokenizer.token_to_id(text): text for text in manifest.prompt.special_tokens}
        self._special = named | {index: token.content for index, token in added.items() if token.special}
        has_config = any(entry.path == TOKENIZER_CONFIG_FILE for entry in manifest.tokenizer_files)
        self._variables = _template_variables(
            manifest.tokenizer_file(bundle, TOKENIZER_CONFIG_FILE) if has_config else None
        )
        self._template = compile_template(manifest.tokenizer_file(bundle, TEMPLATE_FILE).read_text(encoding="utf-8"))
        self._bundle = bundle
        self._manifest = manifest

    @cached_property
    def image_processor(self) -> ImageProcessor:
        """The bundle's image processor, read when the first image comes."""
        return ImageProcessor.from_bundle(self._bundle, self._manifest)

    def prompt_tokens(self, prompt: str) -> list[int]:
        """Returns the token ids of one prompt in the chat template.

        Raises:
            InputError: the prompt is not text, contains a special token, or is too long for the model.
        """
        if not isinstance(prompt, str):
            raise InputError(f"a prompt must be text, got {type(prompt).__name__}")
        self._refuse_special_tokens("prompt", prompt)
        ids = self._encode([{"role": "user", "content": prompt}])
        limit = self._manifest.prompt.max_tokens
        if len(ids) > limit:
            raise InputError(
                f"a prompt has {len(ids)} tokens in its chat template, the model's limit is {limit}; shorten it"
            )
        return ids

    def prompt_head(self) -> list[int]:
        """Returns the token ids that the chat template puts before every prompt."""
        pairs = zip(*(self._encode([{"role": "user", "content": prompt}]) for prompt in "ab"), strict=False)
        return [one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]

    def encode_conversations(self, conversations: Sequence[Sequence[Message]]) -> ChatInputs:
        """Returns conversations as a batch; each ends where the assistant's answer begins.

        Raises:
            InputError: a conversation cannot be read, or is too long for the model.
        """
        images_of = [self._checked_images(conversation) for conversation in conversations]
        encoded = [self._encode(conversation) for conversation in conversations]
        for tokens, of_one in zip(encoded, images_of, strict=True):
            self._check_length(tokens, of_one)
        # Images are decoded now that all conversations are known to fit.
        images = [image for of_one in images_of for image in of_one]
        patches = self.image_processor(images) if images else None
        grids = list(patches.grids) if patches is not None else []
        rows: list[list[int]] = []
        positions: list[np.ndarray] = []
        for tokens, of_one in zip(encoded, images_of, strict=True):
            ids, position = self._with_images(tokens, grids[: len(of_one)])
            rows.append(ids)
            positions.append(position)
            grids = grids[len(of_one) :]
        input_ids, mask = self.pad(rows)
        position_ids = np.zeros((3, *input_ids.shape), np.int64)
        for i, position in enumerate(positions):
            position_ids[:, i, : position.shape[1]] = position
        following = np.array([position.max() + 1 for position in positions], np.int64)
        return ChatInputs(input_ids, mask, position_ids, following, patches)

    def _encode(self, conversation: Sequence[Message]) -> list[int]:
        """Renders the chat template and tokenises the result.

        Raises:
            InputError: the template refuses the conversation, or its texts give a special token.
        """
        ids = self._render(conversation)
        # A token can come of several parts, or of what the template or the tokenizer makes of a text. So the special
        # tokens must be those of the same conversation with other words.
        found = self._special_counts(ids)
        expected = self._special_counts(self._render(_in_other_words(conversation)))
        if found != expected:
            ((token, _), *_) = ((found - expected) or (expected - found)).items()
            raise InputError(
                f"the texts of a message must not give the model's special token {self._special[token]} together; "
                "change them"
            )
        return ids

    def _render(self, conversation: Sequence[Message]) -> list[int]:
        try:
            text = self._template.render(messages=conversation, add_generation_prompt=True, **self._variables)
        except TemplateError as error:
            raise InputError(f"the model's chat template refuses the conversation: {one_line(error)}") from error
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _special_counts(self, ids: Sequence[int]) -> Counter[int]:
        return Counter(token for token in ids if token in self._special)

    def _checked_images(self, conversation: Sequence[Message]) -> list[ImageInput]:
        """Checks the form and the texts of a conversation; returns its images."""
        parts = _parts_of(conversation)
        for part in parts:
            if part["type"] == "text":
                self._refuse_special_tokens("message", part["text"])
        return [part["image"] for part in parts if part["type"] == "image"]

    def _check_length(self, tokens: Sequence[int], images: Sequence[ImageInput]) -> None:
        """Checks that a conversation with its images, which are not decoded, leaves room for an answer."""
        of_images = self.image_processor.count_tokens(images) if images else 0
        count = len(tokens) - len(images) + of_images
        limit = self._manifest.understanding.max_context_tokens
        if count >= limit:
            raise InputError(
                f"a conversation has {count} tokens, {of_images} of them for {len(images)} images; the model's limit "
                f"is {limit} with the answer; shorten the text or give fewer or smaller images"
            )

    def _with_images(self, tokens: Sequence[int], grids: Sequence[tuple[int, int]]) -> tuple[list[int], np.ndarray]:
        """Returns token ids with each image token repeated for its image's tokens, and M-RoPE positions `[3, T]`."""
        understanding = self._manifest.understanding
        ids: list[int] = []
        positions: list[np.ndarray] = []
        following, image = 0, 0
        for token in tokens:
            if token == understanding.image_token_id and image < len(grids):
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
        return ids, np.concatenate(positions, axis=1)

    def pad(self, rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Returns rows of tokens as one array `[B, T]` int64, padded on the right, and its mask `[B, T]` bool."""
        lengths = np.array([len(row) for row in rows])
        mask = np.arange(lengths.max()) < lengths[:, None]
        ids = np.full(mask.shape, self._manifest.prompt.pad_token_id, np.int64)
        ids[mask] = np.concatenate(rows)
        return ids, mask

    def _refuse_special_tokens(self, noun: str, text: str) -> None:
        for token in self._special.values():
            if token in text:
                raise InputError(f"a {noun} must not contain the model's special token {token}; remove it")


def _in_other_words(conversation: Sequence[Message]) -> list[Message]:
    """Returns a conversation of the same form, each of whose texts is one letter, or empty as before."""

    def letter(text: str) -> str:
        return "a" if text.strip() else ""

    def other(part: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**part, "text": letter(part["text"])} if part["type"] == "text" else part

    return [
        {**message, "content": letter(content) if isinstance(content, str) else [other(part) for part in content]}
        for message in conversation
        for content in (message["content"],)
    ]


def compile_template(source: str) -> Template:
    """Compiles a chat template with the functions that transformers gives it, in a sandbox.

    Raises:
        BundleError: it is not a template.
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


def _template_variables(tokenizer_config: Path | None) -> dict[str, Any]:
    """Returns what transformers passes to a chat template besides the messages: special tokens, no tools, no documents.

    Raises:
        BundleError: the file is broken.
    """
    try:
        config = {} if tokenizer_config is None else json.loads(tokenizer_config.read_text(encoding="utf-8"))
        tokens = {name: value for name, value in config.items() if name.endswith("_token") and value is not None}
    except (ValueError, AttributeError) as error:
        raise BundleError(f"{tokenizer_config} is not a tokenizer's config: {one_line(error)}") from error
    texts = {name: value["content"] if isinstance(value, dict) else value for name, value in tokens.items()}
    return {"tools": None, "documents": None, **{n: text for n, text in texts.items() if isinstance(text, str)}}


def user_message(images: Sequence[ImageInput], question: str) -> Message:
    """Returns a user's message: the images, then the question.

    Raises:
        InputError: the question is not text, or is empty.
    """
    if not isinstance(question, str):
        raise InputError(f"a question must be text, got {type(question).__name__}")
    if not question.strip():
        raise InputError("the question is empty; ask something")
    parts = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": question}]}


def images_in(conversation: Sequence[Message]) -> list[ImageInput]:
    """Returns the images of a conversation, whose form need not be right."""
    contents = [message.get("content") for message in conversation if isinstance(message, Mapping)]
    parts = [part for content in contents if isinstance(content, (list, tuple)) for part in content]
    return [part["image"] for part in parts if isinstance(part, Mapping) and "image" in part]


def _parts_of(conversation: Sequence[Message]) -> list[Mapping[str, Any]]:
    """Returns the parts of all messages after checking their form."""
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
