"""Answers about images: the images go through `vision_encoder`, the conversation through `vlm`, token by token.

Between tokens the keys and values stay where the engine left them, as long as the same answers are written. Greedy
answers read the token that the engine chose; else the logits of the last token come to the host, where one is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from runtime.backends import KeyValues, Session, Value, to_host
from runtime.chat import ChatInputs, ChatProcessor, Message
from runtime.errors import EngineError, InputError
from runtime.image_processor import ImagePatches
from runtime.language import LanguageModel, LanguageOutput
from runtime.manifest import Understanding
from runtime.rows import PrefixRow, pad_rows, row_of

MakeKeyValues = Callable[[tuple[Value, ...], np.ndarray], KeyValues]
"""Takes the keys and values of a run and their mask, `[B, T]` bool."""
DEFAULT_MAX_NEW_TOKENS = 128
SORTED_FIRST = 1024
"""Number of the most likely tokens that are looked at before all are."""
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


@dataclass(eq=False)
class Answer:
    """An answer that is being written."""

    settings: AnswerSettings
    generator: np.random.Generator
    writer: _Writer
    position: int
    """M-RoPE position of the next token."""
    left: int
    """Number of tokens that may still come."""
    kv: PrefixRow | None = None
    """Keys and values of its tokens so far, on the host; stale while it is in the batch on the device."""
    token: int = 0
    """Its last token, whose keys and values the next run makes."""
    ended: bool = False
    ended_by_length: bool = False
    """Whether it was cut off by a limit instead of ending by itself."""

    def add(self, token: int, end_tokens: Sequence[int]) -> str:
        """Takes the next token; returns the text that is certain now."""
        self.token = token
        self.left -= 1
        is_end = self.token in end_tokens
        piece = "" if is_end else self.writer.add(self.token)
        self.ended_by_length = self.left == 0 and not (is_end or self.writer.stopped)
        self.ended = is_end or self.writer.stopped or self.left == 0
        return piece + self.writer.finish() if self.ended else piece


class Answerer:
    """Answers conversations with a bundle's engines.

    Answers that are written at the same time share the runs of `vlm`, and may begin and end at different times.
    """

    def __init__(
        self,
        engines: Mapping[str, Session],
        chat: ChatProcessor,
        understanding: Understanding,
        language: LanguageModel,
        key_values: MakeKeyValues,
    ) -> None:
        self._engines = engines
        self.chat = chat
        self._understanding = understanding
        self.language = language
        self.key_values = key_values
        self._batch: tuple[Answer, ...] = ()
        self._kv: KeyValues | None = None
        """Keys and values of the batch, on the device."""

    def answer(self, conversations: Sequence[Sequence[Message]], settings: AnswerSettings) -> list[str]:
        """Returns the answer to each conversation."""
        texts = [""] * len(conversations)
        for pieces in self.stream(conversations, settings):
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
        return texts

    def stream(self, conversations: Sequence[Sequence[Message]], settings: AnswerSettings) -> Iterator[list[str]]:
        """Yields the new text of every answer after each token; "" where there is none."""
        answers, pieces = self.begin(self.chat.encode_conversations(conversations), settings)
        yield pieces
        while going := [answer for answer in answers if not answer.ended]:
            texts = dict(zip(map(id, going), self.write(going), strict=True))
            yield [texts.get(id(answer), "") for answer in answers]

    def begin(
        self, inputs: ChatInputs, settings: AnswerSettings, between_runs: Callable[[], None] = lambda: None
    ) -> tuple[list[Answer], list[str]]:
        """Reads conversations and chooses the first token of each answer; returns the answers and their texts so far.

        Args:
            between_runs: called between runs of engines; what it raises ends the call.
        """
        embeds = None if inputs.images is None else self.encode_images(inputs.images, between_runs)
        between_runs()
        mask = inputs.attention_mask
        self._leave_batch()
        output = self.language.forward(inputs.input_ids, mask, inputs.position_ids, embeds)
        left = min(settings.max_new_tokens, self._understanding.max_context_tokens - mask.shape[1])
        answers = [
            Answer(
                settings,
                np.random.default_rng([settings.seed + row]),
                _Writer(self.chat.tokenizer, settings.stop),
                int(inputs.next_position[row]),
                left,
            )
            for row in range(len(mask))
        ]
        self._batch, self._kv = tuple(answers), self.key_values(output.kv, mask)
        return answers, self._add_tokens(answers, _Choice(answers, output))

    def write(self, answers: Sequence[Answer]) -> list[str]:
        """Adds a token to every answer, in one run; returns the new text of each.

        The answers of the last call stay on the device; if others are given, keys and values go through the host.
        """
        if tuple(answers) != self._batch:
            self._arrange(answers)
        kv = self._kv
        assert kv is not None
        ids = np.array([[answer.token] for answer in answers], np.int64)
        positions = np.array([[answer.position] for answer in answers], np.int64)
        positions = np.broadcast_to(positions, (3, len(answers), 1))
        output = self.language.forward(ids, kv.mask, positions, past=kv.past)
        choice = _Choice(answers, output)  # before anything changes, so that a failed call can be made again
        kv.add(output.kv)
        for answer in answers:
            answer.position += 1
        return self._add_tokens(answers, choice)

    def _add_tokens(self, answers: Sequence[Answer], choice: _Choice) -> list[str]:
        end_tokens = self._understanding.eos_token_ids
        return [answer.add(token, end_tokens) for answer, token in zip(answers, choice.tokens(), strict=True)]

    def _arrange(self, answers: Sequence[Answer]) -> None:
        """Makes these answers the batch."""
        self._leave_batch()
        kv, mask = pad_rows([answer.kv for answer in answers if answer.kv is not None])
        self._batch, self._kv = tuple(answers), self.key_values(tuple(kv), mask)

    def _leave_batch(self) -> None:
        """Copies keys and values of the batch to the host, from where they can join another one."""
        if self._kv is not None and not all(answer.ended for answer in self._batch):
            groups, mask = self._kv.to_host()
            for row, answer in enumerate(self._batch):
                if not answer.ended:
                    answer.kv = row_of(groups, row, mask[row])
        self._batch, self._kv = (), None

    def tokens(self, inputs: ChatInputs, settings: AnswerSettings) -> Iterator[np.ndarray]:
        """Yields the next token of every row, `[B]` int64, until `max_new_tokens` or the model's limit.

        Rows continue past their end tokens: the caller decides when all have ended. Nothing else may run meanwhile.
        """
        rows, length = inputs.input_ids.shape
        generators = [np.random.default_rng([settings.seed + row]) for row in range(rows)]
        embeds = None if inputs.images is None else self.encode_images(inputs.images)
        output = self.language.forward(inputs.input_ids, inputs.attention_mask, inputs.position_ids, embeds)
        kv = self.key_values(output.kv, inputs.attention_mask)
        count = min(settings.max_new_tokens, self._understanding.max_context_tokens - length)
        for index in range(count):
            logits = output.logits.numpy()
            chosen = np.array(
                [choose_token(*pair, settings) for pair in zip(logits, generators, strict=True)], np.int64
            )
            yield chosen
            if index + 1 < count:
                positions = np.broadcast_to((inputs.next_position + index)[None, :, None], (3, rows, 1))
                output = self.language.forward(chosen[:, None], kv.mask, positions, past=kv.past)
                kv.add(output.kv)

    def encode_images(self, images: ImagePatches, between_runs: Callable[[], None] = lambda: None) -> Value:
        """Returns the embeddings of all image tokens, `[T, hidden]` float32; large images are encoded one by one."""
        embeds: list[Value] = []
        for part in _in_runs(images):
            between_runs()
            feed = {
                "pixel_values": part.pixel_values,
                "position_ids": part.position_ids,
                "image_ids": part.image_ids,
            }
            embeds.append(self._engines["vision_encoder"].run(feed)["image_embeds"])
        return embeds[0] if len(embeds) == 1 else np.concatenate([to_host(embed) for embed in embeds])


class _Choice:
    """The next tokens of answers: the engine's own choice if all are greedy, else drawn from the logits.

    Raises:
        EngineError: logits are not finite.
    """

    def __init__(self, answers: Sequence[Answer], output: LanguageOutput) -> None:
        self._answers = answers
        self._values: np.ndarray
        """`[B]` int64 tokens, or `[B, vocabulary]` float32 logits."""
        if output.best_token is not None and all(answer.settings.temperature == 0 for answer in answers):
            self._values = output.best_token.numpy()
            finite = self._values >= 0
        else:
            self._values = output.logits.numpy()
            finite = np.isfinite(self._values)
        if not finite.all():
            raise EngineError("the logits of an answer are not finite numbers; try an fp32 bundle")

    def tokens(self) -> list[int]:
        """Returns the next token of each answer."""
        if self._values.ndim == 1:
            return [int(token) for token in self._values]
        pairs = zip(self._answers, self._values, strict=True)
        return [choose_token(row, answer.generator, answer.settings) for answer, row in pairs]


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
    below = logits.astype(np.float64) - logits.max()  # first, since a quotient may be too large for a number
    with np.errstate(over="ignore"):
        probabilities = np.exp(below / settings.temperature)
    probabilities /= probabilities.sum()
    kept = likeliest_tokens(probabilities, settings.top_p)
    shares = probabilities[kept] / probabilities[kept].sum()
    return int(generator.choice(kept, p=shares))


def likeliest_tokens(probabilities: np.ndarray, top_p: float) -> np.ndarray:
    """Returns the most likely tokens that together have a probability of `top_p`, the most likely first.

    They are nearly always few of a vocabulary of 150,000, so all are sorted only if they are not.
    """
    if top_p < 1 and len(probabilities) > SORTED_FIRST:
        some = np.sort(np.argpartition(probabilities, -SORTED_FIRST)[-SORTED_FIRST:])
        order = some[np.argsort(-probabilities[some], kind="stable")]
        kept = _up_to(probabilities, order, top_p)
        if probabilities[kept[-1]] > probabilities[order[-1]]:  # no token of equal probability was left out
            return kept
    return _up_to(probabilities, np.argsort(-probabilities, kind="stable"), top_p)


def _up_to(probabilities: np.ndarray, order: np.ndarray, top_p: float) -> np.ndarray:
    before = np.cumsum(probabilities[order]) - probabilities[order]
    return order[before < top_p]


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
