"""The training of a VLM's vision tower, whose tokens learn to classify what they show.

Without this stage a language model that is trained from nothing ignores the image for thousands of steps, because
answers are a weak training signal for a tower with random weights. The classification heads are discarded afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from latte.training.stage import Rows


class LabelledImages(Protocol):
    """A source of images with a label for every token and head."""

    @property
    def heads(self) -> Mapping[str, int]:
        """Number of classes of each head. Class 0 of the first head means that a token shows nothing."""

    def batch(self, index: int, rows: range, total: int) -> tuple[Sequence[np.ndarray], np.ndarray]:
        """Returns images, each `[height, width, 3]` uint8, and their labels, `[tokens, heads]` int64."""


class _TokenLogits(nn.Module):
    """A tower and its heads as one call: patches and grids to the logits of every head, each `[tokens, classes]`."""

    def __init__(self, tower: nn.Module, heads: Mapping[str, int], width: int) -> None:
        super().__init__()
        self.tower = tower
        self.heads = nn.ModuleDict({name: nn.Linear(width, classes) for name, classes in heads.items()})

    def forward(self, patches: Tensor, grids: Tensor) -> list[Tensor]:
        tokens = self.tower(patches, grids).pooler_output  # [tokens, width]
        return [head(tokens) for head in self.heads.values()]


class VisionStage:
    """Trains the vision tower with the cross-entropy of each token and head, summed over heads."""

    name = "vision"
    steps_per_batch = 1
    frozen: Sequence[nn.Module] = ()

    def __init__(
        self,
        vlm: Qwen2VLForConditionalGeneration,
        image_processor: Qwen2VLImageProcessorPil,
        images: LabelledImages,
    ) -> None:
        tower = vlm.model.visual.requires_grad_(True)
        self.module: nn.Module = _TokenLogits(tower, images.heads, vlm.config.vision_config.hidden_size)
        self.image_processor = image_processor
        self.images = images

    def batch(self, index: int, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        images, labels = self.images.batch(index, rows.numbers, rows.total)
        pixels: Any = self.image_processor(list(images), return_tensors="pt")
        return pixels["pixel_values"], pixels["image_grid_thw"], torch.from_numpy(labels)

    def prepare(self, batch: tuple[Tensor, ...], device: torch.device) -> tuple[Tensor, ...]:
        return tuple(tensor.to(device) for tensor in batch)

    def weight(self, prepared: tuple[Tensor, ...]) -> float:
        return len(prepared[2])

    def losses(self, module: nn.Module, prepared: tuple[Tensor, ...], step: int, rows: Rows) -> dict[str, Tensor]:
        patches, grids, labels = prepared
        # Most tokens show nothing. Weights balance them: tokens that do and that do not count equally in total.
        seen = labels[:, 0] > 0
        weight = torch.where(seen, 0.5 / seen.float().mean(), 0.5 / (~seen).float().mean())
        total = torch.zeros((), device=labels.device)
        for column, logits in enumerate(module(patches, grids)):
            loss = F.cross_entropy(logits.float(), labels[:, column], reduction="none")
            total = total + (loss * weight).mean()
        return {"loss": total}
