"""The autoencoder of `emoji`, a DC-AE (arXiv 2410.10733), and the scenes that it is trained on."""

from __future__ import annotations

import numpy as np
from diffusers import AutoencoderDC

from latte.emoji.catalogue import Catalogue
from latte.emoji.scenes import draw, sample_busy_scene
from latte.shapes.autoencoder import Images, to_pixels
from latte.training.stage import Rows


def emoji_autoencoder(latent_channels: int = 16) -> AutoencoderDC:
    """Builds an untrained autoencoder: 64x64 pixels to 8x8 latents, with 3.7 million parameters."""
    return AutoencoderDC(
        in_channels=3,
        latent_channels=latent_channels,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(32, 48, 96, 192),
        decoder_block_out_channels=(32, 48, 96, 192),
        encoder_layers_per_block=(0, 1, 1, 2),
        decoder_layers_per_block=(0, 1, 2, 2),
        encoder_qkv_multiscales=((), (), (), ()),
        decoder_qkv_multiscales=((), (), (), ()),
        upsample_block_type="interpolate",
        downsample_block_type="conv",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    )


class BusyScenes:
    """Scenes for the autoencoder, by index."""

    def __init__(self, catalogue: Catalogue, seed: int = 0) -> None:
        self.catalogue, self.seed = catalogue, seed

    def batch(self, index: int, rows: range, total: int) -> Images:
        scenes = [
            sample_busy_scene(self.catalogue.names, rng) for rng in Rows(self.seed, rows, total).generators(0, index)
        ]
        return Images(to_pixels(np.stack([draw(scene, self.catalogue) for scene in scenes])))
