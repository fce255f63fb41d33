"""The training of the flow layers. Each step trains one expert group, with flow times from its interval.

A batch is used for one round of steps, one for each group, so that images and prompts are encoded once for all groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from latte.model import FlowTransformer, LatteFlow, Prefix, group_of_weight
from latte.training.stage import Rows, row_noise
from runtime.console import stderr
from runtime.errors import InputError

TimestepSampling = Literal["uniform", "logit_normal"]
TIMES_PER_GROUP = 5
"""Number of flow times at which the loss of a group is validated."""


class ImagesAndPrompts(Protocol):
    """A batch of B images with their prompts."""

    @property
    def prompts(self) -> Sequence[str]:
        """The prompts; "" where a prompt is dropped for guidance."""

    @property
    def pixels(self) -> Tensor | None:
        """`[B, 3, height, width]` float32 in [-1, 1]; None where `latents` are given."""

    @property
    def latents(self) -> Tensor | None:
        """What the autoencoder makes of the images, not normalised: `[B, C, H, W]` float32."""

    @property
    def token_ids(self) -> Sequence[Sequence[int]] | None:
        """The prompts' token ids in the chat template, where they are known."""


class Batches(Protocol):
    """A source of batches: a data set, or a world that is drawn."""

    def batch(self, index: int, rows: range, total: int) -> ImagesAndPrompts:
        """Returns some of the `total` rows of the batch of this index. The same arguments give the same rows."""


@dataclass(frozen=True)
class FlowBatch:
    """The batch of one round on a device, of B rows."""

    data: Tensor
    """The normalised latents x₁, `[B, C, H, W]` float32."""
    prefix: Prefix
    """The encoded prompts."""


class FlowStage:
    """Trains the flow layers: the loss of flow matching, E|v(x_t, t) − (x₁ − x₀)|² (arXiv 2210.02747).

    Flow times are uniform, or logit-normal as in Stable Diffusion 3 (arXiv 2403.03206). A group gets the part of their
    distribution that is in its interval.
    """

    name = "flow"

    def __init__(self, model: LatteFlow, batches: Batches) -> None:
        self.model = model
        self.batches = batches
        self.groups = tuple(range(model.config.schedule.num_groups))
        self.timestep_sampling: TimestepSampling = "uniform"
        self._too_long: set[str] = set()

    @property
    def steps_per_batch(self) -> int:
        return len(self.groups)

    def train_groups(self, groups: Sequence[int]) -> None:
        """Trains some expert groups only; the layers and heads of all others are frozen.

        Raises:
            InputError: there is no such group.
        """
        known = range(self.model.config.schedule.num_groups)
        if not groups or not set(groups) <= set(known):
            raise InputError(f"--groups must be from 0 to {known[-1]}, got {', '.join(map(str, groups)) or 'none'}")
        self.groups = tuple(sorted(set(groups)))
        for name, parameter in self.model.flow.named_parameters():
            if group_of_weight(name, self.model.config) not in (None, *self.groups):
                parameter.requires_grad_(False)

    def freeze_embeddings(self) -> None:
        """Keeps the embeddings of latents and time, which all groups share, as they are."""
        for name, parameter in self.model.flow.named_parameters():
            if group_of_weight(name, self.model.config) is None:
                parameter.requires_grad_(False)

    @property
    def module(self) -> FlowTransformer:
        return self.model.flow

    @property
    def frozen(self) -> Sequence[nn.Module]:
        return (self.model.vlm, self.model.vae)

    def batch(self, index: int, rows: Rows) -> ImagesAndPrompts:
        return self.batches.batch(index, rows.numbers, rows.total)

    def prepare(self, batch: ImagesAndPrompts, device: torch.device) -> FlowBatch:
        if self.model.latents_mean.device != device:
            self.model.to(device)
        ids = batch.token_ids
        prefix = self.model.encode_token_rows(list(map(self._tokens, batch.prompts)) if ids is None else ids)
        return FlowBatch(self._latents(batch, device), prefix)

    def prepare_to_validate(self, batch: ImagesAndPrompts, device: torch.device) -> FlowBatch:
        """Prepares a batch for `error_at` alone, without what a world's own losses need."""
        return FlowStage.prepare(self, batch, device)

    def _tokens(self, prompt: str) -> list[int]:
        """Returns the token ids of a prompt; one that is too long is named once, and trained on as if it were empty."""
        try:
            return self.model.tokenize([prompt])[0]
        except InputError as error:
            if prompt not in self._too_long:
                self._too_long.add(prompt)
                line = f"left out the caption {prompt[:60]!r}...: {error}"
                stderr.print(line, style="yellow", markup=False, soft_wrap=True)
            return self.model.tokenize([""])[0]

    def _latents(self, batch: ImagesAndPrompts, device: torch.device) -> Tensor:
        if batch.latents is not None:
            return self.model.normalize_latents(batch.latents.to(device))
        if batch.pixels is None:
            raise ValueError("a batch needs pixels or latents")
        return self.model.encode_images(batch.pixels.to(device)).float()

    def weight(self, prepared: FlowBatch) -> float:
        return len(prepared.data)

    def losses(self, module: nn.Module, prepared: FlowBatch, step: int, rows: Rows) -> dict[str, Tensor]:
        group = self.groups[step % len(self.groups)]
        return {f"group_{group}": self.velocity_error(module, prepared, group, step, rows).square().mean()}

    def velocity_error(self, module: nn.Module, prepared: FlowBatch, group: int, step: int, rows: Rows) -> Tensor:
        """Returns v(x_t, t) − (x₁ − x₀) at random times and noise, `[B, C, H, W]` float32."""
        data = prepared.data
        generators = rows.generators(1, step)
        # Times are stratified over the rows of the step, which lowers the loss's variance and keeps its mean.
        strata = (np.array(rows.numbers) + [generator.random() for generator in generators]) / rows.total
        interval = self.model.config.schedule.interval(group)
        t = torch.from_numpy(times_within(interval, strata, self.timestep_sampling)).to(data.device)
        noise = row_noise(generators, data.shape[1:], data.device)  # x₀, [B, C, H, W]
        return self.error_at(module, prepared, group, t, noise)

    def error_at(
        self, module: nn.Module, prepared: FlowBatch, group: int, time: float | Tensor, noise: Tensor
    ) -> Tensor:
        """Returns v(x_t, t) − (x₁ − x₀), `[B, C, H, W]` float32.

        Args:
            time: t, one for all rows or one for each, `[B]` float32.
            noise: x₀, `[B, C, H, W]` float32.
        """
        data = prepared.data
        t = torch.as_tensor(time, dtype=data.dtype, device=data.device).expand(len(data))
        x = t[:, None, None, None] * data + (1 - t)[:, None, None, None] * noise
        v = module(x, t, prepared.prefix.kv[group], prepared.prefix.mask, group)
        return v.float() - (data - noise)

    def validation_times(self, group: int) -> list[float]:
        """Returns the flow times at which a group's loss is validated: the middle of equal parts of its interval."""
        start, end = self.model.config.schedule.interval(group)
        return [float(start + (end - start) * (i + 0.5) / TIMES_PER_GROUP) for i in range(TIMES_PER_GROUP)]


def times_within(interval: tuple[float, float], shares: np.ndarray, sampling: TimestepSampling) -> np.ndarray:
    """Maps shares in [0, 1) to flow times of an interval by the distribution's quantiles there, `[B]` float32."""
    start, end = interval
    if sampling == "uniform":
        return (start + (end - start) * shares).astype(np.float32)
    normal = NormalDist()
    low, high = (0.0 if t <= 0 else 1.0 if t >= 1 else normal.cdf(float(np.log(t / (1 - t)))) for t in interval)
    masses = np.clip(low + (high - low) * shares, 1e-6, 1 - 1e-6)
    quantiles = np.array([normal.inv_cdf(float(mass)) for mass in masses])
    return (1 / (1 + np.exp(-quantiles))).astype(np.float32)


def equal_probability_boundaries(num_groups: int) -> tuple[float, ...]:
    """Returns boundaries between which logit-normal flow times fall equally often, as in DiffusionBlocks.

    "DiffusionBlocks" (arXiv 2506.14202) gives every block the same mass of the training's noise levels.
    """
    normal = NormalDist()
    inner = (1 / (1 + np.exp(-normal.inv_cdf(k / num_groups))) for k in range(1, num_groups))
    return (0.0, *(float(boundary) for boundary in inner), 1.0)
