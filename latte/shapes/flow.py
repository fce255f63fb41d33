"""The training of the flow layers of `shapes`: flow matching, and a term for the kinds of shapes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from latte.model import LatteFlow
from latte.shapes.autoencoder import to_pixels
from latte.shapes.captions import training_caption
from latte.shapes.scenes import Scene, draw, sample_scene, with_another_kind
from latte.training.flow import FlowBatch, FlowStage
from latte.training.stage import Rows

PROMPT_DROPOUT = 0.1
"""Share of rows with the empty prompt, which gives guidance its unconditional velocity (arXiv 2207.12598)."""
KIND_WEIGHT = 3.25
"""Weight of the error towards another kind of shape (`share_of_other`), against the error of all latents.

It is 2 for the 61 % of rows whose prompt determines the image.
"""


@dataclass(frozen=True)
class ScenesWithOther:
    """A batch of B scenes, each also with one shape of another kind."""

    prompts: tuple[str, ...]
    pixels: Tensor
    """`[B, 3, 64, 64]` float32 in [-1, 1]."""
    other_pixels: Tensor
    """The same scenes with one shape of another kind, `[B, 3, 64, 64]` float32."""
    open_rows: tuple[int, ...]
    """Rows whose prompt does not determine the image."""
    latents: None = None
    token_ids: None = None


@dataclass(frozen=True)
class ShapesFlowBatch(FlowBatch):
    """The batch of one round on a device, of B rows."""

    other: Tensor
    """The latents of the same scene with one shape of another kind, minus x₁, `[B, C, H, W]` float32.

    Zero where the prompt does not determine the image.
    """


class ScenePairs:
    """Training scenes with their prompts, and the same scenes with another kind of shape."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def batch(self, index: int, rows: range, total: int) -> ScenesWithOther:
        prompts, scenes, others, open_rows = [], [], [], []
        for place, generator in enumerate(Rows(self.seed, rows, total).generators(0, index)):
            scene = sample_scene(generator, count=int(generator.integers(1, 3)))
            prompt, stated = training_caption(scene, generator)
            if generator.random() < PROMPT_DROPOUT:
                prompt = ""
            if not prompt or not _says_all(stated):
                open_rows.append(place)
            prompts.append(prompt)
            scenes.append(draw(scene))
            others.append(draw(with_another_kind(scene, generator)))
        return ScenesWithOther(
            tuple(prompts), to_pixels(np.stack(scenes)), to_pixels(np.stack(others)), tuple(open_rows)
        )


class ShapesFlowStage(FlowStage):
    """Trains the flow layers with the loss of flow matching, plus `KIND_WEIGHT` times `share_of_other`."""

    def __init__(self, model: LatteFlow, seed: int = 0) -> None:
        super().__init__(model, ScenePairs(seed))

    def prepare(self, batch: ScenesWithOther, device: torch.device) -> ShapesFlowBatch:  # type: ignore[override]
        plain = super().prepare(batch, device)
        other = self.model.encode_images(batch.other_pixels.to(device)).float() - plain.data
        other[list(batch.open_rows)] = 0
        return ShapesFlowBatch(plain.data, plain.prefix, other)

    def losses(
        self,
        module: nn.Module,
        prepared: ShapesFlowBatch,  # type: ignore[override]
        step: int,
        rows: Rows,
    ) -> dict[str, Tensor]:
        group = self.groups[step % len(self.groups)]
        error = self.velocity_error(module, prepared, group, step, rows)
        return {f"group_{group}": error.square().mean() + KIND_WEIGHT * share_of_other(error, prepared.other)}


def share_of_other(error: Tensor, other: Tensor) -> Tensor:
    """Returns how far velocities lead to another kind of shape: the mean of (e·d / |d|²)² over rows, 0 where d = 0.

    This is the flow-matching error along one direction. A row's is 1 if the image becomes the other kind, whatever the
    shape's size and contrast, whereas the squared error of all latents hardly registers the corners of a small shape
    on a background of similar colour.

    Args:
        error: e, the error of the velocity, `[B, C, H, W]`.
        other: d, the direction to the other kind, `[B, C, H, W]`; zero to leave a row out.
    """
    size = other.square().flatten(1).sum(1)
    share = (error * other).flatten(1).sum(1) / size.clamp_min(1e-6)
    return share.square().mean()


def _says_all(stated: Scene) -> bool:
    """Returns whether a caption that states this scene determines the image."""
    placed = stated.relation is not None or stated.shapes[0].cell is not None
    return placed and stated.background is not None and all(shape.size is not None for shape in stated.shapes)
