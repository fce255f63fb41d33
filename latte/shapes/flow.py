"""Stage 3: the flow layers, each step on one expert group with t from its interval.

A drawn batch serves one round: every group takes one step on it, so the images are encoded and the
prompts run through the VLM once for K steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from latte.model import LatteFlow, Prefix
from latte.shapes.autoencoder import to_pixels
from latte.shapes.scenes import Scene, caption, draw, sample_scene, with_another_kind

PROMPT_DROPOUT = 0.1
"""Share of rows trained on the empty prompt, which is what guidance leads away from."""


KIND_WEIGHT = 2.0
"""Weight of the error that makes a shape of another kind, beside the error of the whole latents."""


@dataclass(frozen=True)
class Round:
    """What a round trains on, `B` rows.

    Attributes:
        data: `[B, C, h, w]` fp32, the latents x₁.
        other: `[B, C, h, w]` fp32, from x₁ to the latents of the same scene with a shape of another kind; zero where
            the prompt leaves the image open.
        prefix: of the prompts.
    """

    data: Tensor
    other: Tensor
    prefix: Prefix


class FlowStage:
    """Flow-matching loss E|v(x_t, t) − (x₁ − x₀)|² (arXiv 2210.02747), layerwise, and its part that confuses kinds."""

    name = "flow"

    def __init__(self, model: LatteFlow, batch_size: int, seed: int = 0, device: str = "cpu") -> None:
        self.model = model.to(device)
        self.batch_size = batch_size
        self.seed = seed
        self.device = device
        self._round: tuple[int, Round] | None = None

    def trainable(self) -> nn.Module:
        return self.model.flow

    def losses(self, step: int, rng: np.random.Generator) -> Iterator[tuple[str, Tensor]]:
        schedule = self.model.config.schedule
        round_index, group = divmod(step, schedule.num_groups)
        if self._round is None or self._round[0] != round_index:
            self._round = (round_index, self._draw(round_index))
        drawn = self._round[1]
        data, prefix = drawn.data, drawn.prefix
        start, end = schedule.interval(group)
        # Stratified over the batch: the loss's variance falls, its mean stays.
        strata = (torch.arange(len(data), device=self.device) + torch.rand(len(data), device=self.device)) / len(data)
        t = start + (end - start) * strata
        noise = torch.randn_like(data)
        x = t[:, None, None, None] * data + (1 - t)[:, None, None, None] * noise
        v = self.model.flow(x, t, prefix.kv[group], prefix.mask, group)
        error = v.float() - (data - noise)
        yield f"group_{group}", error.square().mean() + KIND_WEIGHT * share_of_other(error, drawn.other)

    @torch.no_grad()
    def _draw(self, round_index: int) -> Round:
        """Latents and prompts of a round; a function of (seed, round) alone, so that resuming draws the same."""
        rng = np.random.default_rng([self.seed, 1, round_index])
        scenes, prompts, open_rows = [], [], []
        for row in range(self.batch_size):
            scene = sample_scene(rng, count=int(rng.integers(1, 3)))
            prompt, stated = caption(scene, rng)
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
    """How much of another kind the velocities draw: the mean of (e·d / |d|²)² over the rows where d is not zero.

    It is an error of flow matching seen along one direction, on a scale of its own: 1 draws the other kind wholly, in
    whatever size and contrast. The squared error alone hardly sees the corners of a small shape on a near background.
    """
    size = other.square().flatten(1).sum(1)
    share = (error * other).flatten(1).sum(1) / size.clamp_min(1e-6)
    return share.square().sum() / (size > 0).sum().clamp_min(1)


def _says_all(stated: Scene) -> bool:
    """Whether a caption that states this leaves one image only."""
    placed = stated.relation is not None or stated.shapes[0].cell is not None
    return placed and stated.background is not None and all(shape.size is not None for shape in stated.shapes)
