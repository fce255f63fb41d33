"""Stage 2: the vision tower, which learns to classify what each of its tokens shows.

Without this stage the language model ignores the image for thousands of steps, because answers are a weak training
signal for a tower with random weights. The classification heads are discarded afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from latte.shapes.scenes import BACKGROUNDS, CELLS, COLOURS, KINDS, RADII, Scene, coverage, draw, sample_busy_scene

TOKENS_PER_SIDE = 4
"""Rows and columns of tokens of an image, after the tower has merged patches 2x2."""
VISIBLE_SHARE = 0.15
"""Smallest share of a shape's area that a token must cover to be labelled with the shape."""
HEADS = {
    "kind": len(KINDS) + 1,
    "colour": len(COLOURS) + 1,
    "size": len(RADII) + 1,
    "cell": len(CELLS) + 1,
    "background": len(BACKGROUNDS),
}
"""Number of classes of each head. All but the background's include "no shape".

The tower's rotary positions are relative; classifying the cell makes each token carry its absolute position.
"""


def token_labels(scene: Scene) -> np.ndarray:
    """Returns the labels of the tokens of a scene's image, `[16, 5]` int64, with one column per head.

    A label of 0 means "no shape", except in the background's column. A token that covers several shapes is labelled
    with the one of which it covers the largest share.

    Raises:
        ValueError: the scene leaves something open, so that its image is not known.
    """
    if scene.background is None:
        raise ValueError(f"a scene to label needs a background, got {scene}")
    labels = np.zeros((TOKENS_PER_SIDE**2, len(HEADS)), np.int64)
    labels[:, 4] = list(BACKGROUNDS).index(scene.background)
    best = np.full(TOKENS_PER_SIDE**2, VISIBLE_SHARE)
    for shape in scene.shapes:
        if shape.size is None or shape.cell is None:
            raise ValueError(f"a shape to label needs a size and a cell, got {shape}")
        mask = coverage(shape.kind, RADII[shape.size], shape.centre)
        side = mask.shape[0] // TOKENS_PER_SIDE
        share = mask.reshape(TOKENS_PER_SIDE, side, TOKENS_PER_SIDE, side).sum(axis=(1, 3)).reshape(-1) / mask.sum()
        seen = share >= best
        best = np.maximum(best, share)
        labels[seen, 0] = 1 + KINDS.index(shape.kind)
        labels[seen, 1] = 1 + list(COLOURS).index(shape.colour)
        labels[seen, 2] = 1 + list(RADII).index(shape.size)
        labels[seen, 3] = 1 + CELLS.index(shape.cell)
    return labels


class VisionStage:
    """Trains the vision tower with the cross-entropy of each token and head, summed over heads."""

    name = "vision"

    def __init__(
        self,
        vlm: Qwen2VLForConditionalGeneration,
        image_processor: Qwen2VLImageProcessorPil,
        batch_size: int,
        device: str = "cpu",
    ) -> None:
        width = vlm.config.vision_config.hidden_size
        self.tower = vlm.model.visual
        self.heads = nn.ModuleDict({name: nn.Linear(width, classes) for name, classes in HEADS.items()})
        self.module = nn.ModuleDict({"tower": self.tower, "heads": self.heads}).to(device)
        self.image_processor = image_processor
        self.batch_size = batch_size
        self.device = device

    def trainable(self) -> nn.Module:
        return self.module

    def frozen(self) -> Sequence[nn.Module]:
        return ()

    def losses(self, step: int, rng: np.random.Generator) -> Iterator[tuple[str, Tensor]]:
        scenes = [sample_busy_scene(rng) for _ in range(self.batch_size)]
        # [B*16, 5]
        labels = torch.from_numpy(np.concatenate([token_labels(scene) for scene in scenes])).to(self.device)
        pixels = self.image_processor([draw(scene) for scene in scenes], return_tensors="pt")
        tokens = self.tower(
            pixels["pixel_values"].to(self.device), pixels["image_grid_thw"].to(self.device)
        ).pooler_output  # [B*16, width]
        # Most tokens show no shape. Weights balance them: tokens with and without a shape count equally in total.
        seen = labels[:, 0] > 0
        weight = torch.where(seen, 0.5 / seen.float().mean(), 0.5 / (~seen).float().mean())
        total = tokens.new_zeros(())
        for column, name in enumerate(HEADS):
            loss = F.cross_entropy(self.heads[name](tokens).float(), labels[:, column], reduction="none")
            total = total + (loss * weight).mean()
        yield "loss", total
