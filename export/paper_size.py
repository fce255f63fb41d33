"""Graphs of the paper's size with random weights: for builds and benchmarks, since no such checkpoint is public."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor

from export.components import expert_component
from export.graphs import bind, save_engine, trace
from latte.config import LatteFlowConfig
from latte.model import FlowTransformer
from runtime.manifest import EngineEntry, Precision, file_entry
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


def random_weights(graph: ir.Model, config: LatteFlowConfig, seed: int = 0) -> Callable[[str], Tensor]:
    """A random value for every unbound initializer of a traced graph: norms 1, biases 0, matrices normal."""
    generator = torch.Generator().manual_seed(seed)
    # Buffers are computed, not learned, and depend on the heads alone: those of the smallest such model.
    small = config.model_copy(
        update={
            "hidden_size": config.head_dim,
            "intermediate_size": 1,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
        }
    )
    buffers = dict(FlowTransformer(small).named_buffers())

    def weight(name: str) -> Tensor:
        own = name.removeprefix("flow.")
        if own in buffers:
            return buffers[own]
        value = graph.graph.initializers[name]
        shape = [int(size) for size in value.shape or ()]
        dtype = {"FLOAT": torch.float32, "FLOAT16": torch.float16, "BFLOAT16": torch.bfloat16}[value.dtype.name]
        if "norm" in own.rpartition(".")[0].rpartition(".")[2]:
            return torch.ones(shape, dtype=dtype)
        if own.endswith("bias"):
            return torch.zeros(shape, dtype=dtype)
        return (STD * torch.randn(shape, generator=generator)).to(dtype)

    return weight


def export_random_expert(bundle: Path, precision: Precision, config: LatteFlowConfig = PAPER) -> EngineEntry:
    """Writes `expert_0` of a model with random weights into a folder; returns its entry of a manifest."""
    component = expert_component(config, precision)
    graph = trace(component, opset=18)
    files = save_engine(bind(graph, random_weights(graph, config)), bundle / "expert_0")
    return EngineEntry(
        name="expert_0",
        group=0,
        precision=precision,
        opset=18,
        fused=False,
        files=tuple(file_entry(bundle, f"expert_0/{name}") for name in files),
        inputs=component.inputs,
        outputs=component.outputs,
    )
