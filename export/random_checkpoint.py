"""A checkpoint of the paper's size with random weights, written one tensor at a time: 3.5 billion parameters need no
memory for a model, only 7 GB of disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderDC
from torch import Tensor, nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from export.graphs import write_safetensors
from export.paper_size import PAPER, STD, text_config_of
from latte.checkpoint import SHIPPED, own_state
from latte.config import LatteFlowConfig
from latte.model import FlowTransformer
from runtime.files import write_text

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
VISION = {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "mlp_ratio": 4}
"""Qwen2-VL-2B's tower."""
VOCABULARY = 151_936
DECODER_CHANNELS = (128, 256, 512, 512, 1024, 1024)
"""Of DC-AE with a factor of 32."""


def write_random_checkpoint(
    path: Path,
    flow: LatteFlowConfig = PAPER,
    vision: Mapping[str, int] = VISION,
    vocabulary: int = VOCABULARY,
    channels: tuple[int, ...] = DECODER_CHANNELS,
) -> int:
    """Writes a whole checkpoint in fp16, with the tokenizer of `shapes`; returns its number of parameters."""
    path.mkdir(parents=True)
    source = SHIPPED["shapes"]
    for name in TOKENIZER_FILES:
        shutil.copyfile(source / name, path / name)
    Qwen2VLImageProcessorPil().save_pretrained(path)
    vlm_config = Qwen2VLConfig(
        text_config=text_config_of(
            flow, vocabulary, eos_token_id=2, max_position_embeddings=32_768, tie_word_embeddings=True
        ),
        vision_config=dict(vision),
        image_token_id=3,
        tie_word_embeddings=True,
    )
    vlm_config.save_pretrained(path / "vlm")
    blocks = ("ResBlock",) * (len(channels) // 2) + ("EfficientViTBlock",) * (len(channels) - len(channels) // 2)
    with init_empty_weights(include_buffers=False):
        vlm = Qwen2VLForConditionalGeneration._from_config(vlm_config)
        vae = AutoencoderDC(
            latent_channels=flow.latent_channels,
            attention_head_dim=32,
            encoder_block_types=blocks,
            decoder_block_types=blocks,
            encoder_block_out_channels=channels,
            decoder_block_out_channels=channels,
            encoder_layers_per_block=(2,) * len(channels),
            decoder_layers_per_block=(2,) * len(channels),
            encoder_qkv_multiscales=((5,),) * len(channels),
            decoder_qkv_multiscales=((5,),) * len(channels),
        )
        layers = FlowTransformer(flow)
    vae.save_config(path / "vae")
    names = {name: _saved_name(name) for name, _ in vlm.named_parameters()}
    total = _write(path / "vlm" / "model.safetensors", {names[n]: p for n, p in vlm.named_parameters()})
    total += _write(path / "vae" / "diffusion_pytorch_model.safetensors", dict(vae.named_parameters()))
    total += _write(path / "model.safetensors", own_state(layers))
    write_text(path / "config.json", flow.model_dump_json(indent=2) + "\n")
    return total


def _saved_name(name: str) -> str:
    """As transformers writes the VLM's names."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def _write(path: Path, parameters: Mapping[str, Tensor | nn.Parameter]) -> int:
    tensors: dict[str, Any] = {}
    for index, (name, parameter) in enumerate(parameters.items()):
        make = _maker(name, tuple(parameter.shape), index)
        tensors[name] = ir.LazyTensor(make, ir.DataType.FLOAT16, ir.Shape(parameter.shape), name=name)
    write_safetensors(path, tensors)
    return sum(parameter.numel() for parameter in parameters.values())


def _maker(name: str, shape: tuple[int, ...], seed: int) -> Callable[[], ir.tensor_adapters.TorchTensor]:
    def make() -> ir.tensor_adapters.TorchTensor:
        if "norm" in name:
            return ir.tensor_adapters.TorchTensor(torch.ones(shape, dtype=torch.float16))
        generator = torch.Generator().manual_seed(seed)
        # Drawn in fp32, so piece by piece.
        values = torch.empty(shape, dtype=torch.float16)
        for piece in values.view(-1).split(1 << 24):
            piece.copy_(STD * torch.randn(len(piece), generator=generator))
        return ir.tensor_adapters.TorchTensor(values)

    return make
