"""Stage 1: the autoencoder, a small DC-AE (arXiv 2410.10733) that learns to reconstruct scenes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from diffusers import AutoencoderDC
from torch import Tensor, nn

from latte.shapes.scenes import Scene, draw, sample_busy_scene, sample_scene

LATENT_NOISE = 0.1
"""Standard deviation of the noise on the latents. It makes the decoder robust to a sampler's small errors."""
LATENT_PENALTY = 1e-3
"""Weight of the latents' mean square, which keeps their scale from drifting.

A DC-AE adds its latents to the decoder's residual stream. If they grow into the thousands, the decoder's blocks can no
longer change the stream.
"""


def small_autoencoder() -> AutoencoderDC:
    """Builds an untrained autoencoder: 64x64 pixels to 8x8 latents of 8 channels, with 1.3 million parameters."""
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
    """Renders random scenes as pixels, `[B, 3, 64, 64]` float32 in [-1, 1].

    Args:
        sampler: samples one scene.
    """
    return to_pixels(np.stack([draw(sampler(rng)) for _ in range(batch_size)]), device)


def to_pixels(images: np.ndarray, device: str) -> Tensor:
    """Converts images `[B, height, width, 3]` uint8 to pixels `[B, 3, height, width]` float32 in [-1, 1].

    The pixels are channels-last in memory.
    """
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float().div(127.5).sub(1)


class AutoencoderStage:
    """Trains the autoencoder.

    The loss is the mean squared error plus a tenth of the mean absolute error, on pixels in [-1, 1], plus
    `LATENT_PENALTY` times the latents' mean square.
    """

    name = "autoencoder"

    def __init__(self, autoencoder: AutoencoderDC, batch_size: int, device: str = "cpu") -> None:
        self.autoencoder = autoencoder.to(device=device, memory_format=torch.channels_last)
        self.batch_size = batch_size
        self.device = device

    def trainable(self) -> nn.Module:
        return self.autoencoder

    def frozen(self) -> Sequence[nn.Module]:
        return ()

    def losses(self, step: int, rng: np.random.Generator) -> Iterator[tuple[str, Tensor]]:
        pixels = pixels_from_scenes(rng, self.batch_size, self.device, sample_busy_scene)
        latents = self.autoencoder.encode(pixels).latent.float()
        noisy = latents + LATENT_NOISE * torch.randn_like(latents)
        error = self.autoencoder.decode(noisy).sample.float() - pixels
        penalty = LATENT_PENALTY * latents.square().mean()
        yield "loss", error.square().mean() + 0.1 * error.abs().mean() + penalty


@torch.no_grad()
def latents_statistics(autoencoder: AutoencoderDC, device: str = "cpu") -> tuple[list[float], list[float]]:
    """Returns the mean and the standard deviation of each latent channel, over 2,048 random scenes."""
    rng = np.random.default_rng(0)
    latents = [autoencoder.encode(pixels_from_scenes(rng, 256, device, sample_scene)).latent.float() for _ in range(8)]
    stacked = torch.cat(latents)
    return stacked.mean(dim=(0, 2, 3)).tolist(), stacked.std(dim=(0, 2, 3)).tolist()
