"""Stage 4: the flow layers. Each step trains one expert group, with flow times from its interval.

A batch is used for one round of K steps, one for each group, so that images and prompts are encoded once for K steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from latte.model import LatteFlow, Prefix
from latte.shapes.autoencoder import to_pixels
from latte.shapes.captions import training_caption
from latte.shapes.scenes import Scene, draw, sample_scene, with_another_kind

PROMPT_DROPOUT = 0.1
"""Share of rows with the empty prompt, which gives guidance its unconditional velocity (arXiv 2207.12598)."""
KIND_WEIGHT = 2.0
"""Weight of the error towards another kind of shape (`share_of_other`), against the error of all latents."""


@dataclass(frozen=True)
class Round:
    """The batch of one round, of B rows."""

    data: Tensor
    """The latents x₁, `[B, C, H, W]` float32."""
    other: Tensor
    """The latents of the same scene with one shape of another kind, minus x₁, `[B, C, H, W]` float32.

    Zero where the prompt does not determine the image.
    """
    prefix: Prefix
    """The encoded prompts."""


class FlowStage:
    """Trains the flow layers, one expert group at a time.

    The loss is that of flow matching, E|v(x_t, t) − (x₁ − x₀)|² (arXiv 2210.02747), plus `KIND_WEIGHT` times
    `share_of_other`.
    """

    name = "flow"

    def __init__(self, model: LatteFlow, batch_size: int, seed: int = 0, device: str = "cpu") -> None:
        self.model = model.to(device)
        self.batch_size = batch_size
        self.seed = seed
        self.device = device
        self._round: tuple[int, Round] | None = None

    def trainable(self) -> nn.Module:
        return self.model.flow

    def frozen(self) -> Sequence[nn.Module]:
        return (self.model.vlm, self.model.vae)

    def losses(self, step: int, rng: np.random.Generator) -> Iterator[tuple[str, Tensor]]:
        schedule = self.model.config.schedule
        round_index, group = divmod(step, schedule.num_groups)
        if self._round is None or self._round[0] != round_index:
            self._round = (round_index, self._draw(round_index))
        drawn = self._round[1]
        data, prefix = drawn.data, drawn.prefix
        start, end = schedule.interval(group)
        # Times are stratified over the batch, which lowers the variance of the loss and keeps its mean.
        strata = (torch.arange(len(data), device=self.device) + torch.rand(len(data), device=self.device)) / len(data)
        t = start + (end - start) * strata
        noise = torch.randn_like(data)  # x₀, [B, C, H, W]
        x = t[:, None, None, None] * data + (1 - t)[:, None, None, None] * noise
        v = self.model.flow(x, t, prefix.kv[group], prefix.mask, group)
        error = v.float() - (data - noise)
        yield f"group_{group}", error.square().mean() + KIND_WEIGHT * share_of_other(error, drawn.other)

    @torch.no_grad()
    def _draw(self, round_index: int) -> Round:
        """Samples the batch of a round. It depends only on the seed and the round, so resuming samples it again."""
        rng = np.random.default_rng([self.seed, 1, round_index])
        scenes, prompts, open_rows = [], [], []
        for row in range(self.batch_size):
            scene = sample_scene(rng, count=int(rng.integers(1, 3)))
            prompt, stated = training_caption(scene, rng)
            if rng.random() < PROMPT_DROPOUT:
                prompt = ""
            if not prompt or not _says_all(stated):
                open_rows.append(row)
            scenes.append(scene)
            prompts.append(prompt)
        data = self._encode(scenes)
        other = self._encode([with_another_kind(scene, rng) for scene in scenes]) - data
        other[open_rows] = 0
        return Round(data, other, self.model.encode_prompts(prompts))

    def _encode(self, scenes: list[Scene]) -> Tensor:
        images = np.stack([draw(scene) for scene in scenes])
        return self.model.encode_images(to_pixels(images, self.device)).float()


def share_of_other(error: Tensor, other: Tensor) -> Tensor:
    """Returns how far velocities lead to another kind of shape: the mean of (e·d / |d|²)² over rows with d ≠ 0.

    This is the flow-matching error along one direction. It is 1 if the image becomes the other kind, whatever the
    shape's size and contrast, whereas the squared error of all latents hardly registers the corners of a small shape
    on a background of similar colour.

    Args:
        error: e, the error of the velocity, `[B, C, H, W]`.
        other: d, the direction to the other kind, `[B, C, H, W]`; zero to leave a row out.
    """
    size = other.square().flatten(1).sum(1)
    share = (error * other).flatten(1).sum(1) / size.clamp_min(1e-6)
    return share.square().sum() / (size > 0).sum().clamp_min(1)


def _says_all(stated: Scene) -> bool:
    """Returns whether a caption that states this scene determines the image."""
    placed = stated.relation is not None or stated.shapes[0].cell is not None
    return placed and stated.background is not None and all(shape.size is not None for shape in stated.shapes)
