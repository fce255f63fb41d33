"""Stage 3: the VLM, a Qwen2-VL of a few million parameters.

It learns three tasks, all as chat turns with loss on the answers only: to answer questions about an image, to answer
questions about a caption, and to restate a caption in canonical form. The last two make a prompt's keys and values
encode which colour, size and place belong to which shape, and the flow layers attend to these keys and values.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from latte.shapes.captions import caption, describe, rephrase, training_caption
from latte.shapes.questions import DESCRIBE, questions, relation_questions
from latte.shapes.scenes import IMAGE_SIZE, draw, sample_scene

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
    """Trains a byte-level BPE on captions and questions of random scenes; adds Qwen2-VL's special tokens."""
    rng = np.random.default_rng(seed)
    texts = ["system\nYou are a helpful assistant.", "user\n", "assistant\n", DESCRIBE]
    for _ in range(4000):
        scene = sample_scene(rng)
        texts += [caption(scene, rng)[0], rephrase(scene, rng)[0], describe(scene)]
        texts += [text for pair in questions(scene, rng) for text in pair]
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
        vocab_size=VOCABULARY_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
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


def small_vlm(tokenizer: Qwen2Tokenizer) -> Qwen2VLForConditionalGeneration:
    """Builds an untrained VLM.

    It has 8 text layers of width 256 with 4 query and 2 key-value heads, and a vision tower of 4 layers of width 128.
    """
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": VOCABULARY_SIZE,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]},
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 4,
            "embed_dim": 128,
            "hidden_size": 256,
            "num_heads": 4,
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


@dataclass(frozen=True)
class Conversation:
    """Chat turns about one image, or about the caption in the first turn."""

    turns: tuple[tuple[str, str], ...]
    """(question, answer) of each turn."""
    image: np.ndarray | None = None
    """`[height, width, 3]` uint8."""


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


@dataclass(frozen=True)
class VlmBatch:
    """Conversations as a batch, padded on the right, ready for Qwen2-VL."""

    input_ids: Tensor
    """`[B, T]` int64."""
    attention_mask: Tensor
    """`[B, T]` int64; 1 for tokens, 0 for padding."""
    position_ids: Tensor
    """M-RoPE positions, `[3, B, T]` int64."""
    labels: Tensor
    """`[B, T]` int64; -100 where there is no loss."""
    pixel_values: Tensor | None
    """Patches of all images, `[patches, 3*2*8*8]` float32: channels, frames, height, width."""
    image_grid_thw: Tensor | None
    """Frames, rows and columns of patches of each image, `[images, 3]` int64."""


class ConversationEncoder:
    """Encodes conversations as batches: the chat template in tokens, images in patches."""

    def __init__(self, tokenizer: Qwen2Tokenizer, image_processor: Qwen2VLImageProcessorPil) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self._cache: dict[str, list[int]] = {}

    def tokens(self, text: str) -> list[int]:
        """Returns the token ids of a text, cached."""
        ids = self._cache.get(text)
        if ids is None:
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(self._cache) < 50_000:
                self._cache[text] = ids
        return ids

    def encode(self, conversations: Sequence[Conversation], device: str = "cpu") -> VlmBatch:
        """Returns conversations as a batch on a device."""
        rows = [self._row(conversation) for conversation in conversations]
        width = max(len(ids) for ids, _, _ in rows)
        pad = self.tokenizer.pad_token_id
        input_ids = np.full((len(rows), width), pad, np.int64)
        mask = np.zeros((len(rows), width), np.int64)
        labels = np.full((len(rows), width), -100, np.int64)
        positions = np.zeros((3, len(rows), width), np.int64)
        for i, (ids, has_loss, position) in enumerate(rows):
            length = len(ids)
            input_ids[i, :length] = ids
            mask[i, :length] = 1
            labels[i, :length] = np.where(has_loss, ids, -100)
            positions[:, i, :length] = position
        images = [conversation.image for conversation in conversations if conversation.image is not None]
        pixels = self.image_processor(images, return_tensors="pt") if images else None
        return VlmBatch(
            input_ids=torch.from_numpy(input_ids).to(device),
            attention_mask=torch.from_numpy(mask).to(device),
            position_ids=torch.from_numpy(positions).to(device),
            labels=torch.from_numpy(labels).to(device),
            pixel_values=pixels["pixel_values"].to(device) if pixels is not None else None,
            image_grid_thw=pixels["image_grid_thw"].to(device) if pixels is not None else None,
        )

    def _row(self, conversation: Conversation) -> tuple[list[int], list[bool], np.ndarray]:
        """Returns a conversation's token ids, whether each has loss, and M-RoPE positions `[3, T]` int64."""
        ids = list(self.tokens("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"))
        has_loss = [False] * len(ids)
        image_start = 0
        side = IMAGE_SIZE // PATCH_SIZE // 2
        for turn, (question, answer) in enumerate(conversation.turns):
            ids += self.tokens("<|im_start|>user\n")
            if turn == 0 and conversation.image is not None:
                ids += self.tokens("<|vision_start|>")
                image_start = len(ids)
                ids += self.tokens("<|image_pad|>") * (side * side) + self.tokens("<|vision_end|>")
            ids += [*self.tokens(question), *self.tokens("<|im_end|>\n<|im_start|>assistant\n")]
            has_loss += [False] * (len(ids) - len(has_loss))
            ids += [*self.tokens(answer), *self.tokens("<|im_end|>")]
            has_loss += [True] * (len(ids) - len(has_loss))
            ids += self.tokens("\n")
            has_loss.append(False)
        position = np.tile(np.arange(len(ids)), (3, 1))
        if image_start:
            rows, columns = np.divmod(np.arange(side * side), side)
            end = image_start + side * side
            position[:, image_start:end] = image_start + np.stack([rows * 0, rows, columns])
            position[:, end:] -= side * side - side
        return ids, has_loss, position


class VlmStage:
    """Trains the language model with the cross-entropy of the answers' tokens; the vision tower is frozen.

    A tower that is trained jointly forgets the kinds of shapes within the first hundred steps, before the language
    model has learned to read them.
    """

    name = "vlm"

    def __init__(
        self,
        vlm: Qwen2VLForConditionalGeneration,
        encoder: ConversationEncoder,
        batch_size: int,
        device: str = "cpu",
    ) -> None:
        self.vlm = vlm.to(device)
        self.vlm.model.visual.requires_grad_(False)
        self.encoder = encoder
        self.batch_size = batch_size
        self.device = device

    def trainable(self) -> nn.Module:
        return self.vlm

    def frozen(self) -> Sequence[nn.Module]:
        return ()  # the vision tower is a part of the module

    def losses(self, step: int, rng: np.random.Generator) -> Iterator[tuple[str, Tensor]]:
        batch = self.encoder.encode([sample_conversation(rng) for _ in range(self.batch_size)], self.device)
        hidden = self.vlm.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            pixel_values=batch.pixel_values,
            image_grid_thw=batch.image_grid_thw,
            use_cache=False,
        ).last_hidden_state  # [B, T, hidden]
        labels = batch.labels[:, 1:]
        chosen = labels != -100
        logits = self.vlm.lm_head(hidden[:, :-1][chosen])  # [chosen tokens, vocabulary]
        yield "loss", F.cross_entropy(logits.float(), labels[chosen])
