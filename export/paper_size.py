"""Engines with random weights, such as those of the paper's size: for builds and benchmarks, since time does not
depend on what the weights are and no checkpoint of that size is public."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import Qwen2VLConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel

from export.components import WIDE_SOFTMAX, Component, expert_component, language_component
from export.graphs import bind, trace, write_engine
from latte.config import LatteFlowConfig
from runtime.manifest import EngineEntry, Precision
from runtime.schedule import ExpertSchedule

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
"""Qwen2-VL-2B's text layers in four groups of seven, DC-AE latents of 256x256 pixels."""
STD = 0.02
"""Of random matrices, as a model of this kind begins."""
DTYPES = {"FLOAT": torch.float32, "FLOAT16": torch.float16, "BFLOAT16": torch.bfloat16}


def one_group(config: LatteFlowConfig, layers: int) -> LatteFlowConfig:
    """The same sizes with so many layers, all of them in one expert group."""
    return config.model_copy(update={"num_hidden_layers": layers, "schedule": ExpertSchedule.uniform(1)})


def text_config_of(config: LatteFlowConfig, vocabulary: int, **more: Any) -> dict[str, Any]:
    """What `Qwen2VLConfig` takes for the text layers that a model's flow layers mirror."""
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


def export_random_expert(bundle: Path, precision: Precision, config: LatteFlowConfig = PAPER) -> EngineEntry:
    """Writes `expert_0` of a model with random weights into a folder; returns its entry of a manifest."""
    return _export(bundle, "expert_0", expert_component(config, precision), precision, group=0)


def export_random_language_model(
    bundle: Path, precision: Precision, config: LatteFlowConfig, vocabulary: int
) -> EngineEntry:
    """Writes `vlm` with random weights: the text layers that the flow layers mirror, and an output layer of its own."""
    vlm_config = Qwen2VLConfig(text_config=text_config_of(config, vocabulary), image_token_id=0)

    def build() -> tuple[nn.Module, nn.Linear]:
        text = Qwen2VLTextModel._from_config(vlm_config.text_config, attn_implementation=WIDE_SOFTMAX)
        return text, nn.Linear(config.hidden_size, vocabulary, bias=False)

    return _export(bundle, "vlm", language_component(config, precision, vlm_config, build), precision)


def _export(
    bundle: Path, name: str, component: Component, precision: Precision, group: int | None = None
) -> EngineEntry:
    graph = trace(component, opset=18)
    bound = bind(graph, _random_weights(graph, component))
    return write_engine(bundle, name, component, bound, precision=precision, opset=18, group=group)


def _random_weights(graph: ir.Model, component: Component, seed: int = 0) -> Callable[[str], Tensor]:
    """Values for the unbound initializers of a traced graph: norms 1, biases 0, matrices normal, buffers their own."""
    generator = torch.Generator().manual_seed(seed)
    with init_empty_weights(include_buffers=False):
        buffers = dict(component.build().named_buffers())

    def weight(name: str) -> Tensor:
        if name in buffers:
            return buffers[name]
        value: Any = graph.graph.initializers[name]
        shape, dtype = [int(size) for size in value.shape], DTYPES[value.dtype.name]
        if "norm" in name:
            return torch.ones(shape, dtype=dtype)
        if name.endswith("bias"):
            return torch.zeros(shape, dtype=dtype)
        return (STD * torch.randn(shape, generator=generator)).to(dtype)

    return weight
