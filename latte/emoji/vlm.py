"""The VLM of `emoji`, a small Qwen2-VL, and what it is taught.

It learns three tasks, all as chat turns with loss on the answers only: to answer questions about an image, to answer
questions about a caption, and to restate a caption in canonical form. The last two make a prompt's keys and values
encode which emoji is where, and the flow layers attend to these keys and values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from transformers import Qwen2Tokenizer, Qwen2VLForConditionalGeneration

from latte.emoji.captions import caption, describe
from latte.emoji.catalogue import Catalogue
from latte.emoji.questions import DESCRIBE, questions
from latte.emoji.scenes import draw, sample_scene
from latte.shapes.vlm import VlmGeometry, small_vlm, tokenizer_of_texts
from latte.training.conversations import Conversation
from latte.training.stage import Rows

GEOMETRY = VlmGeometry(
    vocabulary_size=3072,
    hidden_size=384,
    intermediate_size=704,
    num_layers=8,
    num_heads=6,
    num_key_value_heads=2,
    vision_depth=4,
    vision_width=192,
    vision_heads=6,
)
TURNS = 4
"""Largest number of questions in a conversation, besides the caption to restate."""
IMAGE_SHARE = 0.6
"""Share of conversations about an image; the others are about a caption."""
WHAT_FIRST_SHARE = 0.4
"""Share of conversations that begin with the question for the emoji."""
SCENES_OF_TEXTS = 4000


def texts_of(catalogue: Catalogue, seed: int = 0) -> Iterator[str]:
    """Yields the texts to train a tokenizer on: all names and synonyms, captions, questions and answers."""
    rng = np.random.default_rng(seed)
    for emoji in catalogue.emoji:
        for name in (emoji.name, *emoji.synonyms):
            yield from (f"what is the {name}?", f"a {name} emoji")
    yield DESCRIBE
    for _ in range(SCENES_OF_TEXTS):
        scene = sample_scene(catalogue.names, rng)
        yield from (caption(scene, catalogue, rng)[0], describe(scene))
        yield from (text for pair in questions(scene, catalogue.names, rng) for text in pair)


def emoji_tokenizer(texts: Iterable[str]) -> Qwen2Tokenizer:
    """Trains a tokenizer of 3,072 tokens on texts; see `texts_of`."""
    return tokenizer_of_texts(texts, GEOMETRY.vocabulary_size)


def emoji_vlm(tokenizer: Qwen2Tokenizer) -> Qwen2VLForConditionalGeneration:
    """Builds an untrained VLM of 13 million parameters for images of 64x64 pixels."""
    return small_vlm(tokenizer, GEOMETRY)


def sample_conversation(catalogue: Catalogue, rng: np.random.Generator) -> Conversation:
    """Samples a conversation to train on."""
    scene = sample_scene(catalogue.names, rng)
    if rng.random() < IMAGE_SHARE:
        asked = [*questions(scene, catalogue.names, rng), (DESCRIBE, describe(scene))]
        return Conversation(_some(asked, rng), draw(scene, catalogue))
    text, stated = caption(scene, catalogue, rng)
    return Conversation(((text, describe(stated)), *_some(questions(stated, catalogue.names, rng), rng)))


def _some(asked: Sequence[tuple[str, str]], rng: np.random.Generator) -> tuple[tuple[str, str], ...]:
    """Returns some questions in random order; often first the one for the emoji, whose name other questions tell."""
    order = rng.permutation(len(asked))
    if rng.random() < WHAT_FIRST_SHARE:
        order = np.concatenate([[0], order[order != 0]])
    return tuple(asked[i] for i in order[:TURNS])


class EmojiConversations:
    """Conversations about scenes, by index."""

    def __init__(self, catalogue: Catalogue, seed: int = 0) -> None:
        self.catalogue, self.seed = catalogue, seed

    def batch(self, index: int, rows: range, total: int) -> list[Conversation]:
        generators = Rows(self.seed, rows, total).generators(0, index)
        return [sample_conversation(self.catalogue, rng) for rng in generators]
