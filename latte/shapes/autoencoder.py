"""The autoencoder of `shapes`, a small DC-AE (arXiv 2410.10733), and the scenes that it is trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderDC
from torch import Tensor

from latte.shapes.scenes import Scene, draw, sample_busy_scene
from latte.training.stage import Rows


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


class BusyScenes:
    """Scenes for the autoencoder, by index."""

    def __init__(self, seed: int = 0, sampler: Callable[[np.random.Generator], Scene] = sample_busy_scene) -> None:
        """Prepares scenes.

        Args:
            sampler: samples one scene.
        """
        self.seed, self.sampler = seed, sampler

    def batch(self, index: int, rows: range, total: int) -> Images:
        scenes = [draw(self.sampler(rng)) for rng in Rows(self.seed, rows, total).generators(0, index)]
        return Images(to_pixels(np.stack(scenes)))


@dataclass(frozen=True)
class Images:
    """A batch of B images without prompts."""

    pixels: Tensor
    """`[B, 3, 64, 64]` float32 in [-1, 1]."""
    latents: None = None
    prompts: tuple[str, ...] = ()
    token_ids: None = None


def to_pixels(images: np.ndarray) -> Tensor:
    """Converts images `[B, height, width, 3]` uint8 to pixels `[B, 3, height, width]` float32 in [-1, 1].

    The pixels are channels-last in memory.
    """
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1)
