"""The training of a VLM's language model, with loss on the answers only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2VLForConditionalGeneration

from latte.training.conversations import Conversation, ConversationEncoder, VlmBatch
from latte.training.stage import Rows


class Conversations(Protocol):
    """A source of conversations: a data set, or a world that is drawn."""

    def batch(self, index: int, rows: range, total: int) -> Sequence[Conversation]:
        """Returns some of the `total` rows of the batch of this index. The same arguments give the same rows."""


class _AnswerLogits(nn.Module):
    """A VLM as one call: a batch to the logits of the tokens with loss, `[tokens, vocabulary]`."""

    def __init__(self, vlm: Qwen2VLForConditionalGeneration) -> None:
        super().__init__()
        self.vlm = vlm

    def forward(self, batch: VlmBatch) -> Tensor:
        hidden = self.vlm.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            pixel_values=batch.pixel_values,
            image_grid_thw=batch.image_grid_thw,
            use_cache=False,
        ).last_hidden_state  # [B, T, hidden]
        return self.vlm.lm_head(hidden[:, :-1][batch.labels[:, 1:] != -100])


class VlmStage:
    """Trains the language model with the cross-entropy of the answers' tokens; the vision tower is frozen.

    A tower that is trained jointly forgets the kinds of shapes within the first hundred steps, before the language
    model has learned to read them.
    """

    name = "vlm"
    steps_per_batch = 1
    frozen: Sequence[nn.Module] = ()
    """None: the vision tower is a part of the module."""

    def __init__(
        self, vlm: Qwen2VLForConditionalGeneration, encoder: ConversationEncoder, conversations: Conversations
    ) -> None:
        self.vlm = vlm.requires_grad_(True).train()
        self.vlm.model.visual.requires_grad_(False)
        self.module: nn.Module = _AnswerLogits(vlm)
        self.encoder = encoder
        self.conversations = conversations

    def batch(self, index: int, rows: Rows) -> VlmBatch:
        return self.encoder.encode(self.conversations.batch(index, rows.numbers, rows.total))

    def prepare(self, batch: VlmBatch, device: torch.device) -> VlmBatch:
        return batch.to(device)

    def weight(self, prepared: VlmBatch) -> float:
        return float((prepared.labels[:, 1:] != -100).sum())

    def losses(self, module: nn.Module, prepared: VlmBatch, step: int, rows: Rows) -> dict[str, Tensor]:
        return {"loss": self.cross_entropy(module(prepared), prepared)}

    @staticmethod
    def cross_entropy(logits: Tensor, batch: VlmBatch) -> Tensor:
        """Returns the mean cross-entropy of the tokens with loss, of which `logits` has a row each."""
        labels = batch.labels[:, 1:]
        return F.cross_entropy(logits.float(), labels[labels != -100])
