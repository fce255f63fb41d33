"""Answers about images: the images go through `vision_encoder`, the conversation through `vlm`, token by token.

Between tokens the keys and values stay where the engine left them; only the logits of the last token come to the
host, where a token is chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from runtime.backends import Session, Value, to_host
from runtime.chat import ChatInputs, ChatProcessor, Message
from runtime.errors import InputError
from runtime.image_processor import ImagePatches
from runtime.language import LanguageModel
from runtime.manifest import Understanding

DEFAULT_MAX_NEW_TOKENS = 128
PATCHES_PER_RUN = 4096
"""Images are encoded together up to this many patches, because attention costs the square of their number."""


@dataclass(frozen=True)
class AnswerSettings:
    """How tokens are chosen.

    Args:
        max_new_tokens: largest number of tokens of an answer.
        temperature: 0 takes the most likely token; otherwise logits are divided by it.
        top_p: sample from the most likely tokens that together have this probability (arXiv 1904.09751).
        seed: seed of the sampling; rows of a batch use seed, seed + 1, …
        stop: texts that end an answer; the answer stops before the first of them.
    """

    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not (np.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"temperature must be a number of at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.seed < 0:
            raise InputError(f"a seed must not be negative, got {self.seed}")
        if "" in self.stop:
            raise InputError("a stop text is empty; leave it out")


class Answerer:
    """Answers conversations with a bundle's engines."""

    def __init__(self, engines: Mapping[str, Session], chat: ChatProcessor, understanding: Understanding) -> None:
        self._engines = engines
        self.chat = chat
        self._understanding = understanding
        self.language = LanguageModel(engines)

    def answer(self, conversations: Sequence[Sequence[Message]], settings: AnswerSettings) -> list[str]:
        """Returns the answer to each conversation."""
        texts = [""] * len(conversations)
        for pieces in self.stream(conversations, settings):
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
        return texts

    def stream(self, conversations: Sequence[Sequence[Message]], settings: AnswerSettings) -> Iterator[list[str]]:
        """Yields the new text of every answer after each token; "" where there is none."""
        inputs = self.chat.encode_conversations(conversations)
        writers = [_Writer(self.chat.tokenizer, settings.stop) for _ in conversations]
        done = np.zeros(len(conversations), bool)
        for tokens in self.tokens(inputs, settings):
            pieces = [""] * len(conversations)
            for row in np.flatnonzero(~done):
                if tokens[row] in self._understanding.eos_token_ids:
                    done[row] = True
                else:
                    pieces[row] = writers[row].add(int(tokens[row]))
                    done[row] = writers[row].stopped
            yield pieces
            if done.all():
                break
        yield [writer.finish() for writer in writers]

    def tokens(self, inputs: ChatInputs, settings: AnswerSettings) -> Iterator[np.ndarray]:
        """Yields the next token of every row, `[B]` int64, until `max_new_tokens` or the model's limit.

        Rows continue past their end tokens: the caller decides when all have ended.
        """
        rows, length = inputs.input_ids.shape
        generators = [np.random.default_rng([settings.seed + row]) for row in range(rows)]
        embeds = None if inputs.images is None else self.encode_images(inputs.images)
        mask = inputs.attention_mask
        output = self.language.forward(inputs.input_ids, mask, inputs.position_ids, embeds)
        count = min(settings.max_new_tokens, self._understanding.max_context_tokens - length)
        for index in range(count):
            logits = output.logits.numpy()
            chosen = np.array(
                [choose_token(*pair, settings) for pair in zip(logits, generators, strict=True)], np.int64
            )
            yield chosen
            if index + 1 < count:
                mask = np.concatenate([mask, np.ones((rows, 1), bool)], axis=1)
                positions = np.broadcast_to((inputs.next_position + index)[None, :, None], (3, rows, 1))
                output = self.language.forward(chosen[:, None], mask, positions, past=output.kv)

    def encode_images(self, images: ImagePatches) -> Value:
        """Returns the embeddings of all image tokens, `[T, hidden]` float32; large images are encoded one by one."""
        embeds: list[Value] = []
        for part in _in_runs(images):
            feed = {
                "pixel_values": part.pixel_values,
                "position_ids": part.position_ids,
                "image_ids": part.image_ids,
            }
            embeds.append(self._engines["vision_encoder"].run(feed)["image_embeds"])
        return embeds[0] if len(embeds) == 1 else np.concatenate([to_host(embed) for embed in embeds])


def _in_runs(images: ImagePatches) -> Iterator[ImagePatches]:
    merged = images.pixel_values.shape[1]
    first, patches = 0, 0
    for index, tokens in enumerate(images.tokens):
        if index > first and patches + tokens * merged > PATCHES_PER_RUN:
            yield images.of_images(slice(first, index))
            first, patches = index, 0
        patches += tokens * merged
    yield images.of_images(slice(first, len(images.grids)))


def choose_token(logits: np.ndarray, generator: np.random.Generator, settings: AnswerSettings) -> int:
    """Returns one token, chosen from the logits of a row, `[vocabulary]` float32."""
    if settings.temperature == 0:
        return int(np.argmax(logits))
    scaled = logits.astype(np.float64) / settings.temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    before = np.cumsum(probabilities[order]) - probabilities[order]
    kept = order[before < settings.top_p]
    shares = probabilities[kept] / probabilities[kept].sum()
    return int(generator.choice(kept, p=shares))


class _Writer:
    """Decodes tokens to text, and holds back text that may be the beginning of a stop text."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._stop = stop
        self._tokens: list[int] = []
        self._decoded = 0
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Takes one more token; returns the text that is certain now."""
        self._tokens.append(token)
        decoded = self._decoder.step(self._tokenizer, token) or ""
        self._decoded += len(decoded)
        self._held += decoded
        ends = [self._held.find(stop) for stop in self._stop if stop in self._held]
        if ends:
            self.stopped = True
            text, self._held = self._held[: min(ends)], ""
            return text
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text

    def finish(self) -> str:
        """Returns the text that was held back: an incomplete stop text, or the bytes of an incomplete character."""
        text, self._held = self._held, ""
        return text if self.stopped else text + self._tokenizer.decode(self._tokens)[self._decoded :]


def _overlap(text: str, stop: str) -> int:
    """Returns how many of the last characters of `text` are the beginning of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
