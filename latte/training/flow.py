"""Stage 3: the flow layers, each step on one expert group with t from its interval.

A drawn batch serves one round: every group takes one step on it, so the pictures are encoded and the
prompts run through the VLM once for K steps.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from latte.model import LatteFlow, Prefix
from latte.scenes import Scene, caption, draw, faintest_outline, sample_scene
from latte.training.autoencoder import to_pixels

PROMPT_DROPOUT = 0.1
"""Share of rows trained on the empty prompt, which is what guidance leads away from."""


FAINT_SHARE = 0.5
"""Share of scenes that are the fainter of two: small shapes near the background's colour are learned last."""


class FlowStage:
    """Flow-matching loss E|v(x_t, t) − (x₁ − x₀)|² (arXiv 2210.02747), layerwise."""

    name = "flow"

    def __init__(self, model: LatteFlow, batch_size: int, seed: int = 0, device: str = "cpu") -> None:
        self.model = model.to(device)
        self.batch_size = batch_size
        self.seed = seed
        self.device = device
        self._round: tuple[int, Tensor, Prefix] | None = None

    def trainable(self) -> nn.Module:
        return self.model.flow

    def losses(self, step: int, rng: np.random.Generator) -> Iterator[tuple[str, Tensor]]:
        schedule = self.model.config.schedule
        round_index, group = divmod(step, schedule.num_groups)
        if self._round is None or self._round[0] != round_index:
            self._round = (round_index, *self._draw(round_index))
        _, data, prefix = self._round
        start, end = schedule.interval(group)
        # Stratified over the batch: the loss's variance falls, its mean stays.
        strata = (torch.arange(len(data), device=self.device) + torch.rand(len(data), device=self.device)) / len(data)
        t = start + (end - start) * strata
        noise = torch.randn_like(data)
        x = t[:, None, None, None] * data + (1 - t)[:, None, None, None] * noise
        v = self.model.flow(x, t, prefix.kv[group], prefix.mask, group)
        yield f"group_{group}", (v.float() - (data - noise)).square().mean()

    @torch.no_grad()
    def _draw(self, round_index: int) -> tuple[Tensor, Prefix]:
        """Latents and prompts of a round; a function of (seed, round) alone, so that resuming draws the same."""
        rng = np.random.default_rng([self.seed, 1, round_index])
        scenes = [_sample(rng) for _ in range(self.batch_size)]
        prompts = [caption(scene, rng)[0] if rng.random() >= PROMPT_DROPOUT else "" for scene in scenes]
        latents = self.model.encode_images(to_pixels(np.stack([draw(scene) for scene in scenes]), self.device))
        return latents.float(), self.model.encode_prompts(prompts)


def _sample(rng: np.random.Generator) -> Scene:
    """One shape or two, as often; one shape has nine places to be drawn in, two have four."""
    count = int(rng.integers(1, 3))
    scenes = [sample_scene(rng, count=count) for _ in range(1 + (rng.random() < FAINT_SHARE))]
    return min(scenes, key=faintest_outline)
