"""The VLM of `shapes`, a Qwen2-VL of a few million parameters, and what it is taught.

It learns three tasks, all as chat turns with loss on the answers only: to answer questions about an image, to answer
questions about a caption, and to restate a caption in canonical form. The last two make a prompt's keys and values
encode which colour, size and place belong to which shape, and the flow layers attend to these keys and values.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from latte.shapes.captions import caption, describe, rephrase, training_caption
from latte.shapes.questions import DESCRIBE, questions, relation_questions
from latte.shapes.scenes import IMAGE_SIZE, draw, sample_scene
from latte.training.conversations import Conversation
from latte.training.stage import Rows

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PATCH_SIZE = 8
"""Side of a patch in pixels."""
VOCABULARY_SIZE = 768
"""Number of tokens, special tokens included."""
TURNS = 5
"""Largest number of questions in a conversation, besides the caption to restate."""
IMAGE_SHARE = 0.7
"""Share of conversations about an image; the others are about a caption."""


def train_tokenizer(seed: int = 0) -> Qwen2Tokenizer:
    """Trains a tokenizer on captions and questions of random scenes."""
    rng = np.random.default_rng(seed)
    texts = [DESCRIBE]
    for _ in range(4000):
        scene = sample_scene(rng)
        texts += [caption(scene, rng)[0], rephrase(scene, rng)[0], describe(scene)]
        texts += [text for pair in questions(scene, rng) for text in pair]
    return tokenizer_of_texts(texts, VOCABULARY_SIZE)


def tokenizer_of_texts(texts: Iterable[str], vocabulary_size: int) -> Qwen2Tokenizer:
    """Trains a byte-level BPE on texts and on the words of the chat template; adds Qwen2-VL's special tokens.

    Args:
        vocabulary_size: number of tokens, special tokens included.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        chain(("system\nYou are a helpful assistant.", "user\n", "assistant\n"), texts), trainer
    )
    state = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in state["merges"]]
    result = Qwen2Tokenizer(
        vocab=state["vocab"], merges=merges, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=1024
    )
    result.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    result.chat_template = CHAT_TEMPLATE
    return result


def small_image_processor() -> Qwen2VLImageProcessorPil:
    """Builds the image processor: a 64x64 image becomes 8x8 patches of 8x8 pixels, or 16 tokens after merging."""
    pixels = IMAGE_SIZE * IMAGE_SIZE
    return Qwen2VLImageProcessorPil(patch_size=PATCH_SIZE, size={"shortest_edge": pixels, "longest_edge": 16 * pixels})


@dataclass(frozen=True)
class VlmGeometry:
    """The size of a small Qwen2-VL. Heads have 64 channels."""

    vocabulary_size: int
    """Number of tokens, special tokens included."""
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    vision_depth: int
    vision_width: int
    vision_heads: int


GEOMETRY = VlmGeometry(
    vocabulary_size=VOCABULARY_SIZE,
    hidden_size=256,
    intermediate_size=512,
    num_layers=8,
    num_heads=4,
    num_key_value_heads=2,
    vision_depth=4,
    vision_width=128,
    vision_heads=4,
)
"""Of the VLM of `shapes`."""


def small_vlm(tokenizer: Qwen2Tokenizer, geometry: VlmGeometry = GEOMETRY) -> Qwen2VLForConditionalGeneration:
    """Builds an untrained VLM for images of 64x64 pixels."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": geometry.vocabulary_size,
            "hidden_size": geometry.hidden_size,
            "intermediate_size": geometry.intermediate_size,
            "num_hidden_layers": geometry.num_layers,
            "num_attention_heads": geometry.num_heads,
            "num_key_value_heads": geometry.num_key_value_heads,
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]},
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": geometry.vision_depth,
            "embed_dim": geometry.vision_width,
            "hidden_size": geometry.hidden_size,
            "num_heads": geometry.vision_heads,
            "mlp_ratio": 4,
            "patch_size": PATCH_SIZE,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    return Qwen2VLForConditionalGeneration._from_config(config, attn_implementation="eager")


def sample_conversation(rng: np.random.Generator) -> Conversation:
    """Samples a conversation to train on."""
    scene = sample_scene(rng)
    if rng.random() < IMAGE_SHARE:
        asked = [*questions(scene, rng), (DESCRIBE, describe(scene))]
        # Relations take two places and a comparison. They are learned last, so they are asked more often.
        asked += [pair for _ in range(2) for pair in relation_questions(scene, rng)]
        return Conversation(_some(asked, rng), draw(scene))
    text, stated = training_caption(scene, rng)
    return Conversation(((text, describe(stated)), *_some(questions(stated, rng), rng)))


def _some(asked: Sequence[tuple[str, str]], rng: np.random.Generator) -> tuple[tuple[str, str], ...]:
    return tuple(asked[i] for i in rng.permutation(len(asked))[:TURNS])


class ShapesConversations:
    """Conversations about scenes, by index."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def batch(self, index: int, rows: range, total: int) -> list[Conversation]:
        return [sample_conversation(rng) for rng in Rows(self.seed, rows, total).generators(0, index)]
