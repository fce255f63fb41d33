"""Models with random weights, such as those of the paper's size, for builds and benchmarks.

Time and memory do not depend on the values of the weights, and no checkpoint of the paper's size is public.
"""

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

from export.components import Component, decoder_component, expert_component
from export.engines import bind, write_engine, write_safetensors
from export.graph_store import default_store
from export.graphs import make_graphs
from export.vlm_components import language_component
from latte.checkpoint import own_state
from latte.config import LatteFlowConfig
from latte.model import FlowTransformer
from latte.paper import DECODER_CHANNELS, PAPER, VISION, VOCABULARY, text_config_of, vae_config_of, vlm_config_of
from latte.shipped import shipped_checkpoints
from runtime.files import write_text
from runtime.manifest import EngineEntry, Precision

OPSET = 18
STD = 0.02
"""Standard deviation of random matrices, as in the initialisation of such models."""
DTYPES = {"FLOAT": torch.float32, "FLOAT16": torch.float16, "BFLOAT16": torch.bfloat16}


def export_random_expert(bundle: Path, precision: Precision, config: LatteFlowConfig = PAPER) -> EngineEntry:
    """Writes `expert_0` with random weights into a folder; returns its entry for a manifest."""
    return _export(bundle, "expert_0", expert_component(config, precision), precision, group=0)


def export_random_language_model(
    bundle: Path, precision: Precision, config: LatteFlowConfig, vocabulary: int
) -> EngineEntry:
    """Writes `vlm` with random weights: text layers of the flow layers' sizes, and an output layer of its own."""
    vlm_config = Qwen2VLConfig(
        text_config=text_config_of(config, vocabulary), image_token_id=vocabulary - 1, tie_word_embeddings=False
    )
    return _export(bundle, "vlm", language_component(config, precision, vlm_config), precision)


def export_random_decoder(bundle: Path, config: LatteFlowConfig, vae_config: Mapping[str, Any]) -> EngineEntry:
    """Writes `vae_decoder` in fp32 with random weights.

    Args:
        vae_config: the config of the `AutoencoderDC`.
    """
    return _export(bundle, "vae_decoder", decoder_component(config, vae_config), "fp32")


def _export(
    bundle: Path, name: str, component: Component, precision: Precision, group: int | None = None
) -> EngineEntry:
    (graph,) = make_graphs([component], OPSET, default_store())
    bound = bind(graph, _random_weights(graph, component))
    return write_engine(bundle, name, component, bound, precision=precision, opset=OPSET, group=group)


def _random_weights(graph: ir.Model, component: Component, seed: int = 0) -> Callable[[str], Tensor]:
    """Returns a function to random values of weights: norms 1, biases 0, matrices normal, buffers as computed."""
    generator = torch.Generator().manual_seed(seed)
    with init_empty_weights(include_buffers=False):
        buffers = {name: buffer for part in component.parts for name, buffer in part.build().named_buffers()}

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


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def write_random_checkpoint(
    path: Path,
    flow: LatteFlowConfig = PAPER,
    vision: Mapping[str, int] = VISION,
    vocabulary: int = VOCABULARY,
    channels: tuple[int, ...] = DECODER_CHANNELS,
) -> int:
    """Writes a complete checkpoint in fp16, with the tokenizer of `shapes`; returns its number of parameters.

    Tensors are written one at a time: the 4.05 billion parameters of the paper's size need 8.1 GB of disk and no
    memory for a model.
    """
    path.mkdir(parents=True)
    source = shipped_checkpoints()["shapes"]
    for name in TOKENIZER_FILES:
        shutil.copyfile(source / name, path / name)
    Qwen2VLImageProcessorPil().save_pretrained(path)
    vlm_config = vlm_config_of(flow, vocabulary, vision)
    vlm_config.save_pretrained(path / "vlm")
    with init_empty_weights(include_buffers=False):
        vlm = Qwen2VLForConditionalGeneration._from_config(vlm_config)
        vae = AutoencoderDC(**vae_config_of(flow.latent_channels, channels))
        layers = FlowTransformer(flow)
    vae.save_config(path / "vae")
    names = {name: _saved_name(name) for name, _ in vlm.named_parameters()}
    total = _write(path / "vlm" / "model.safetensors", {names[n]: p for n, p in vlm.named_parameters()})
    total += _write(path / "vae" / "diffusion_pytorch_model.safetensors", dict(vae.named_parameters()))
    total += _write(path / "model.safetensors", own_state(layers))
    write_text(path / "config.json", flow.model_dump_json(indent=2) + "\n")
    return total


def _saved_name(name: str) -> str:
    """Returns the name that transformers writes for a parameter of the VLM."""
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
        # Values are drawn in fp32, so only some at a time.
        values = torch.empty(shape, dtype=torch.float16)
        for piece in values.view(-1).split(1 << 24):
            piece.copy_(STD * torch.randn(len(piece), generator=generator))
        return ir.tensor_adapters.TorchTensor(values)

    return make
