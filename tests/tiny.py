"""A LaTtE-Flow model of random weights, small enough to export in seconds and odd enough to catch mistakes.

Two groups of two layers, uneven boundaries, unequal head counts, a DC-AE with its linear attention, and
attention gates and heads that are not zero.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderDC
from safetensors.torch import load_file, save_file
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from latte.checkpoint import assemble, save_checkpoint
from latte.model import LatteFlow
from latte.shapes.vlm import SPECIAL_TOKENS, small_image_processor, train_tokenizer
from runtime.manifest import file_entry, load_manifest, save_manifest

BOUNDARIES = (0.0, 0.3, 1.0)


def tiny_vlm(layers: int = 4, seed: int = 0) -> tuple[Qwen2VLForConditionalGeneration, object]:
    """A Qwen2-VL of width 32 with its tokenizer."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer) + 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
            "pad_token_id": ids["<|endoftext|>"],
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
        },
        vision_config={
            "depth": 1,
            "embed_dim": 16,
            "hidden_size": 32,
            "num_heads": 2,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    vlm = Qwen2VLForConditionalGeneration._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in vlm.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "embed_tokens" not in name:
                parameter.mul_(5)
    return vlm.eval(), tokenizer


def tiny_autoencoder(seed: int = 0) -> AutoencoderDC:
    """Factor 4, with the multi-scale linear attention of DC-AE's deep stages."""
    torch.manual_seed(seed)
    return AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8, 16),
        decoder_block_out_channels=(8, 8, 16),
        encoder_layers_per_block=(0, 1, 1),
        decoder_layers_per_block=(0, 1, 1),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        upsample_block_type="interpolate",
        downsample_block_type="conv",
        scaling_factor=0.5,
    ).eval()


def tiny_model(variant: str = "couple", seed: int = 0) -> LatteFlow:
    """The whole model, fp32, every weight away from its neutral start."""
    vlm, tokenizer = tiny_vlm(seed=seed)
    model = assemble(
        vlm,
        tiny_autoencoder(seed),
        tokenizer,
        num_groups=2,
        boundaries=BOUNDARIES,
        variant=variant,
        latent_size=(6, 8),
        max_prompt_tokens=128,
    )
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.flow.named_parameters():
            if parameter.requires_grad and (parameter == 0).all():
                parameter.normal_(std=0.2)
            elif parameter.requires_grad and "heads" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def save_tiny(path: Path, variant: str = "couple") -> LatteFlow:
    """Writes the tiny checkpoint in fp32 and returns the model."""
    model = tiny_model(variant)
    save_checkpoint(model, small_image_processor(), path)
    return model


def save_untrained(path: Path) -> None:
    """Writes the tiny checkpoint as `latte-flow init` would: its velocity heads are zero, its latents not measured."""
    vlm, tokenizer = tiny_vlm()
    parts = (vlm, tiny_autoencoder(), tokenizer)
    model = assemble(*parts, num_groups=2, boundaries=BOUNDARIES, latent_size=(6, 8), max_prompt_tokens=128)
    save_checkpoint(model, small_image_processor(), path)


def scale_weight(bundle: Path, engine: str, name_part: str, factor: float) -> None:
    """Changes one matrix of an engine, in a bundle whose manifest then says that it is meant to be so."""
    weights = bundle / engine / "weights.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if name_part in name and tensors[name].ndim == 2)
    tensors[name] *= factor
    save_file(tensors, weights)
    manifest = load_manifest(bundle)
    engines = [
        entry.model_copy(update={"files": tuple(file_entry(bundle, file.path) for file in entry.files)})
        for entry in manifest.engines
    ]
    save_manifest(manifest.model_copy(update={"engines": tuple(engines)}), bundle)
