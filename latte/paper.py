"""The sizes of the paper's model: Qwen2-VL-2B and a DC-AE with a factor of 32 (arXiv 2506.06952)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from transformers import Qwen2VLConfig

from latte.config import LatteFlowConfig
from runtime.flow_time import ExpertSchedule

PAPER = LatteFlowConfig(
    schedule=ExpertSchedule(boundaries=(0.0, 0.25, 0.5, 0.75, 1.0)),
    num_hidden_layers=28,
    hidden_size=1536,
    intermediate_size=8960,
    num_attention_heads=12,
    num_key_value_heads=2,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    mrope_section=(16, 24, 24),
    latent_channels=32,
    latent_size=(8, 8),
    vae_scale_factor=32,
    latents_mean=(0.0,) * 32,
    latents_std=(1.0,) * 32,
)
"""The paper's model: Qwen2-VL-2B's text layers in four groups of seven, DC-AE latents of 256x256 pixels."""
VISION = {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "mlp_ratio": 4}
"""Sizes of Qwen2-VL-2B's vision tower."""
VOCABULARY = 151_936
DECODER_CHANNELS = (128, 256, 512, 512, 1024, 1024)
"""Channels of a DC-AE with a factor of 32."""


def vlm_config_of(
    config: LatteFlowConfig, vocabulary: int = VOCABULARY, vision: Mapping[str, int] = VISION
) -> Qwen2VLConfig:
    """Returns the config of a whole Qwen2-VL whose text layers have the sizes of a model's flow layers."""
    text = text_config_of(config, vocabulary, eos_token_id=2, max_position_embeddings=32_768, tie_word_embeddings=True)
    return Qwen2VLConfig(text_config=text, vision_config=dict(vision), image_token_id=3, tie_word_embeddings=True)


def vae_config_of(latent_channels: int, channels: tuple[int, ...] = DECODER_CHANNELS) -> dict[str, Any]:
    """Returns the arguments of an `AutoencoderDC` with these channels in each stage of its encoder and decoder."""
    blocks = ("ResBlock",) * (len(channels) // 2) + ("EfficientViTBlock",) * (len(channels) - len(channels) // 2)
    return {
        "latent_channels": latent_channels,
        "attention_head_dim": 32,
        "encoder_block_types": blocks,
        "decoder_block_types": blocks,
        "encoder_block_out_channels": channels,
        "decoder_block_out_channels": channels,
        "encoder_layers_per_block": (2,) * len(channels),
        "decoder_layers_per_block": (2,) * len(channels),
        "encoder_qkv_multiscales": ((5,),) * len(channels),
        "decoder_qkv_multiscales": ((5,),) * len(channels),
    }


def text_config_of(config: LatteFlowConfig, vocabulary: int, **more: Any) -> dict[str, Any]:
    """Returns the text config of a Qwen2-VL whose layers have the sizes of a model's flow layers."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "bos_token_id": None,
        "eos_token_id": None,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": config.rope_theta,
            "mrope_section": list(config.mrope_section),
        },
        **more,
    }


class Published(NamedTuple):
    """A row of the authors' table, for ImageNet at 256x256 on a GPU that they do not name."""

    steps: int
    """Sampling steps, or image tokens."""
    seconds: float
    """Of an image."""
    active_parameters: float


PUBLISHED = {
    "LaTtE-Flow": Published(40, 0.052, 0.5e9),
    "Vanilla": Published(40, 0.158, 2.0e9),
    "Janus Pro": Published(576, 0.311, 1.5e9),
    "Show-o": Published(50, 2.493, 1.3e9),
    "DiT-XL/2": Published(250, 2.592, 0.675e9),
    "MaskGIT": Published(8, 0.029, 0.227e9),
}
"""Speeds by model. "Vanilla" is the dense model of the same recipe, all layers in every step."""
COUNTERPARTS = {"LaTtE-Flow": "experts", "Vanilla": "dense twin", "Janus Pro": "autoregressive twin"}
"""What the benchmarks measure in the place of some of them."""
