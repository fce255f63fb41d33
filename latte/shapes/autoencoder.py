"""Stage 1: the autoencoder, a small DC-AE (arXiv 2410.10733) trained to reconstruct scenes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from diffusers import AutoencoderDC
from torch import Tensor, nn

from latte.shapes.scenes import Scene, draw, sample_busy_scene, sample_scene

LATENT_NOISE = 0.1
"""Standard deviation of the noise on the latents: the decoder learns to forgive what a sampler gets slightly wrong."""
LATENT_PENALTY = 1e-3
"""Weight of the latents' mean square. Without it their scale drifts, and a DC-AE adds its latents to the decoder's
residual stream: at thousands, its blocks cannot change the stream any more."""


def small_autoencoder() -> AutoencoderDC:
    """64x64 pixels to 8x8 latents of 8 channels, 1.3 million parameters."""
    return AutoencoderDC(
        in_channels=3,
        latent_channels=8,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(32, 32, 64, 128),
        decoder_block_out_channels=(32, 32, 64, 128),
        encoder_layers_per_block=(0, 1, 1, 1),
        decoder_layers_per_block=(0, 1, 1, 2),
        encoder_qkv_multiscales=((), (), (), ()),
        decoder_qkv_multiscales=((), (), (), ()),
        upsample_block_type="interpolate",
        downsample_block_type="conv",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    )


def pixels_from_scenes(
    rng: np.random.Generator, batch_size: int, device: str, sampler: Callable[[np.random.Generator], Scene]
) -> Tensor:
    """Images of random scenes: `[B, 3, 64, 64]` float32 in [-1, 1]."""
    return to_pixels(np.stack([draw(sampler(rng)) for _ in range(batch_size)]), device)


def to_pixels(images: np.ndarray, device: str) -> Tensor:
    """`[B, H, W, 3]` uint8 to `[B, 3, H, W]` float32 in [-1, 1], channels last in memory."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float().div(127.5).sub(1)


class AutoencoderStage:
    """Mean squared error plus a tenth of the absolute error, on pixels in [-1, 1], plus the latents' penalty."""

    name = "autoencoder"

    def __init__(self, autoencoder: AutoencoderDC, batch_size: int, device: str = "cpu") -> None:
        self.autoencoder = autoencoder.to(device=device, memory_format=torch.channels_last)
        self.batch_size = batch_size
        self.device = device

    def trainable(self) -> nn.Module:
        return self.autoencoder

    def losses(self, step: int, rng: np.random.Generator) -> Iterator[tuple[str, Tensor]]:
        pixels = pixels_from_scenes(rng, self.batch_size, self.device, sample_busy_scene)
        latents = self.autoencoder.encode(pixels).latent.float()
        noisy = latents + LATENT_NOISE * torch.randn_like(latents)
        error = self.autoencoder.decode(noisy).sample.float() - pixels
        penalty = LATENT_PENALTY * latents.square().mean()
        yield "loss", error.square().mean() + 0.1 * error.abs().mean() + penalty


@torch.no_grad()
def latents_statistics(autoencoder: AutoencoderDC, device: str = "cpu") -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each latent channel over 2,048 scenes."""
    rng = np.random.default_rng(0)
    latents = [autoencoder.encode(pixels_from_scenes(rng, 256, device, sample_scene)).latent.float() for _ in range(8)]
    stacked = torch.cat(latents)
    return stacked.mean(dim=(0, 2, 3)).tolist(), stacked.std(dim=(0, 2, 3)).tolist()
