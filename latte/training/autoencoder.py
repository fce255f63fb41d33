"""The training of an autoencoder, a DC-AE (arXiv 2410.10733) that learns to reconstruct images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderDC
from torch import Tensor, nn

from latte.checkpoint import vae_scale_factor
from latte.data.statistics import ChannelStatistics
from latte.training.flow import Batches
from latte.training.stage import Rows, row_noise
from runtime.errors import TrainingError

LATENT_NOISE = 0.1
"""Standard deviation of the noise on the latents. It makes the decoder robust to a sampler's small errors."""
LATENT_PENALTY = 1e-3
"""Weight of the latents' mean square, which keeps their scale from drifting.

A DC-AE adds its latents to the decoder's residual stream. If they grow into the thousands, the decoder's blocks can no
longer change the stream.
"""


class _Reconstruction(nn.Module):
    """An autoencoder as one call: pixels and noise `[B, C, H, W]` to latents and reconstructed pixels."""

    def __init__(self, autoencoder: AutoencoderDC) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        latents = self.autoencoder.encode(pixels).latent.float()
        return latents, self.autoencoder.decode(latents + LATENT_NOISE * noise).sample.float()


class AutoencoderStage:
    """Trains the autoencoder.

    The loss is the mean squared error plus a tenth of the mean absolute error, on pixels in [-1, 1], plus
    `LATENT_PENALTY` times the latents' mean square.
    """

    name = "autoencoder"
    steps_per_batch = 1
    frozen: Sequence[nn.Module] = ()

    def __init__(self, autoencoder: AutoencoderDC, batches: Batches) -> None:
        self.autoencoder = autoencoder
        self.module: nn.Module = _Reconstruction(autoencoder.to(memory_format=torch.channels_last))
        self.batches = batches
        self.channels, self.factor = autoencoder.config.latent_channels, vae_scale_factor(autoencoder)

    def batch(self, index: int, rows: Rows) -> Tensor:
        pixels = self.batches.batch(index, rows.numbers, rows.total).pixels
        if pixels is None:
            raise ValueError("the autoencoder is trained on pixels, not on latents")
        return pixels

    def prepare(self, batch: Tensor, device: torch.device) -> Tensor:
        return batch.to(device, memory_format=torch.channels_last)

    def weight(self, prepared: Tensor) -> float:
        return len(prepared)

    def losses(self, module: nn.Module, prepared: Tensor, step: int, rows: Rows) -> dict[str, Tensor]:
        size = (self.channels, *(side // self.factor for side in prepared.shape[2:]))
        latents, pixels = module(prepared, row_noise(rows.generators(1, step), size, prepared.device))
        error = pixels - prepared
        return {"loss": error.square().mean() + 0.1 * error.abs().mean() + LATENT_PENALTY * latents.square().mean()}


@torch.no_grad()
def latents_statistics(
    autoencoder: AutoencoderDC, batches: Batches, rows: int = 2048
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns the mean and the standard deviation of each latent channel over the first rows of batches.

    Raises:
        TrainingError: a channel has one value everywhere.
    """
    size = 32
    statistics = ChannelStatistics.empty(autoencoder.config.latent_channels)
    for index in range(rows // size):
        batch = batches.batch(index, range(size), size)
        latents = batch.latents
        if latents is None:
            assert batch.pixels is not None
            latents = autoencoder.encode(batch.pixels.to(autoencoder.device)).latent.float().cpu()
        statistics = statistics.merged(ChannelStatistics.of(latents.numpy()))
    if min(statistics.std) <= 0:
        raise TrainingError(
            "the autoencoder gives a latent channel the same value everywhere; train it, or train on other images"
        )
    return statistics.mean, statistics.std
