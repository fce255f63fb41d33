"""Conversations about images or texts, as batches for a Qwen2-VL: chat turns with loss on the answers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

LARGEST_CACHE = 50_000
"""Number of texts whose token ids are kept."""


@dataclass(frozen=True)
class Conversation:
    """Chat turns about one image, or about the text in the first turn."""

    turns: tuple[tuple[str, str], ...]
    """(question, answer) of each turn."""
    image: np.ndarray | None = None
    """`[height, width, 3]` uint8."""


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
    """Patches of all images, `[patches, channels * frames * height * width]` float32."""
    image_grid_thw: Tensor | None
    """Frames, rows and columns of patches of each image, `[images, 3]` int64."""

    def to(self, device: torch.device) -> VlmBatch:
        """Returns the batch on a device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if value is not None}
        return replace(self, **moved)


class ConversationEncoder:
    """Encodes conversations as batches: the chat template in tokens, images in patches."""

    def __init__(self, tokenizer: Any, image_processor: Qwen2VLImageProcessorPil) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self._cache: dict[str, list[int]] = {}

    def tokens(self, text: str) -> list[int]:
        """Returns the token ids of a text, cached."""
        ids = self._cache.get(text)
        if ids is None:
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(self._cache) < LARGEST_CACHE:
                self._cache[text] = ids
        return ids

    def encode(self, conversations: Sequence[Conversation]) -> VlmBatch:
        """Returns conversations as a batch."""
        images = [conversation.image for conversation in conversations if conversation.image is not None]
        pixels = self.image_processor(images, return_tensors="pt") if images else None
        merge = self.image_processor.merge_size
        grids = iter([] if pixels is None else (pixels["image_grid_thw"][:, 1:] // merge).tolist())
        rows = [self._row(conversation, grids) for conversation in conversations]
        width = max(len(ids) for ids, _, _ in rows)
        input_ids = np.full((len(rows), width), self.tokenizer.pad_token_id, np.int64)
        mask = np.zeros((len(rows), width), np.int64)
        labels = np.full((len(rows), width), -100, np.int64)
        positions = np.zeros((3, len(rows), width), np.int64)
        for i, (ids, has_loss, position) in enumerate(rows):
            length = len(ids)
            input_ids[i, :length] = ids
            mask[i, :length] = 1
            labels[i, :length] = np.where(has_loss, ids, -100)
            positions[:, i, :length] = position
        return VlmBatch(
            input_ids=torch.from_numpy(input_ids),
            attention_mask=torch.from_numpy(mask),
            position_ids=torch.from_numpy(positions),
            labels=torch.from_numpy(labels),
            pixel_values=pixels["pixel_values"] if pixels is not None else None,
            image_grid_thw=pixels["image_grid_thw"] if pixels is not None else None,
        )

    def _row(self, conversation: Conversation, grids: Any) -> tuple[list[int], list[bool], np.ndarray]:
        """Returns a conversation's token ids, whether each has loss, and M-RoPE positions `[3, T]` int64.

        Args:
            grids: an iterator over the rows and columns of tokens of the images, of which one is taken if there is one.
        """
        ids = list(self.tokens("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"))
        has_loss = [False] * len(ids)
        image_start, size = 0, (0, 0)
        for turn, (question, answer) in enumerate(conversation.turns):
            ids += self.tokens("<|im_start|>user\n")
            if turn == 0 and conversation.image is not None:
                size = tuple(next(grids))
                ids += self.tokens("<|vision_start|>")
                image_start = len(ids)
                ids += self.tokens("<|image_pad|>") * (size[0] * size[1]) + self.tokens("<|vision_end|>")
            ids += [*self.tokens(question), *self.tokens("<|im_end|>\n<|im_start|>assistant\n")]
            has_loss += [False] * (len(ids) - len(has_loss))
            ids += [*self.tokens(answer), *self.tokens("<|im_end|>")]
            has_loss += [True] * (len(ids) - len(has_loss))
            ids += self.tokens("\n")
            has_loss.append(False)
        position = np.tile(np.arange(len(ids)), (3, 1))
        if image_start:
            count = size[0] * size[1]
            rows, columns = np.divmod(np.arange(count), size[1])
            position[:, image_start : image_start + count] = image_start + np.stack([rows * 0, rows, columns])
            # What follows an image goes on behind its largest position.
            position[:, image_start + count :] -= count - max(size)
        return ids, has_loss, position
