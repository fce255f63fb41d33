"""Features of images: what a VLM's own vision tower makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

BATCH = 16
"""Images whose features are computed at once."""


@torch.no_grad()
def image_features(
    vlm: Qwen2VLForConditionalGeneration,
    image_processor: Qwen2VLImageProcessorPil,
    images: Sequence[np.ndarray],
    on_progress: Callable[[int], None] = lambda _: None,
) -> np.ndarray:
    """Returns the mean of each image's tokens, as the language model gets them, `[N, hidden]` float32.

    Args:
        images: N images, each `[height, width, 3]` uint8.
        on_progress: called after each batch with its number of images.
    """
    features = []
    for start in range(0, len(images), BATCH):
        part = images[start : start + BATCH]
        pixels: Any = image_processor(list(part), return_tensors="pt")
        grids = pixels["image_grid_thw"]
        tower = vlm.model.visual
        tokens = tower(pixels["pixel_values"].to(tower.device, tower.dtype), grids.to(tower.device)).pooler_output
        lengths = (grids.prod(dim=1) // image_processor.merge_size**2).tolist()
        features += [of_image.float().mean(dim=0).cpu().numpy() for of_image in tokens.split(lengths)]
        on_progress(len(part))
    return np.stack(features)
