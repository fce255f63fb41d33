"""The engines of a bundle: for each its tensors with their named axes, its parts in PyTorch, and how they make a graph.

A graph with many equal layers has three parts: what comes before the layers, one layer, and what comes after them. Each
part is traced once, and the layer is then repeated with the names of other weights. A tensor has the same name here, in
the ONNX graph, in the engine and in the manifest.

Shapes: R rows, P prefix tokens, N latent tokens, S new tokens, T tokens in all, M layers per expert group, Hq and Hkv
query and key-value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol

import torch
from diffusers import AutoencoderDC
from torch import Tensor, nn

from export.dc_ae import use_linear_attention
from latte.checkpoint import VLM_FROM_FLOW, quiet_libraries
from latte.config import LatteFlowConfig
from latte.model import FlowLayer, FlowTransformer, LatteFlow, VelocityHead, pixels_to_uint8
from latte.precision import TORCH_DTYPES, cast_parameters
from runtime.flow_time import ExpertSchedule
from runtime.manifest import DType, EngineRole, Geometry, PromptFormat, TensorSpec, Understanding

ONNX_NAMES: dict[str, DType] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Part:
    """A piece of a graph that is traced on its own."""

    name: str
    build: Callable[[], nn.Module]
    """Makes the module; called where no weights are allocated. It can be pickled, so that a process can trace it."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    sizes: Mapping[str, int]
    """A size for every named axis, for tracing. Sizes differ, so that no two axes are taken for one."""
    settings: Mapping[str, Any]
    """Everything besides code and specs that the graph depends on, as JSON."""

    def example_inputs(self) -> tuple[Tensor, ...]:
        """Returns a tensor of ones for every input, with the example sizes."""
        tensors = []
        for spec in self.inputs:
            shape = [self.sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape]
            tensors.append(torch.ones(shape, dtype=getattr(torch, spec.dtype)))
        return tuple(tensors)


class Assembly(Protocol):
    """Puts the parts of a component together. A value stands for a tensor of the graph."""

    def input(self, name: str) -> Any:
        """Returns an input of the graph."""

    def call(
        self,
        part: str,
        *inputs: Any,
        weights: tuple[str, str] = ("", ""),
        axes: Mapping[str, str] = MappingProxyType({}),
    ) -> tuple[Any, ...]:
        """Adds a part to the graph; returns its outputs.

        Args:
            inputs: values; None for a tensor of zeros, with which everything that it makes zero is left out.
            weights: a prefix of the part's weights, and the prefix that takes its place in the graph.
            axes: names in the part, and the names that take their place: for axes that are not of the same size in
                every call.
        """

    def select(self, value: Any, index: int) -> Any:
        """Returns `value[index]`."""

    def stack(self, values: Sequence[Any]) -> Any:
        """Returns the values stacked along a new first axis."""

    def split(self, value: Any, count: int, axis: int) -> list[Any]:
        """Returns a value in parts along an axis, whose sizes differ by one at most."""

    def concat(self, values: Sequence[Any], axis: int) -> Any:
        """Returns the values joined along an axis."""

    def output(self, name: str, value: Any) -> None:
        """Makes a value an output of the graph."""


@dataclass(frozen=True)
class Component:
    """One graph. Engines with the same graph and other weights, as the experts, share it."""

    name: str
    role: EngineRole
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parts: tuple[Part, ...]
    assemble: Callable[[Assembly], None]
    """Adds the parts to an empty graph with these inputs and outputs."""


# ---- experts -----------------------------------------------------------------------------------------


class ExpertBegin(nn.Module):
    """Embeds latents and time. Interfaces are fp32, except for what goes into matrix products."""

    def __init__(self, flow: FlowTransformer) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, latents: Tensor, timestep: Tensor, prefix_mask: Tensor) -> tuple[Tensor, ...]:
        dtype = self.flow.latent_embed.weight.dtype
        hidden, time, modulation, rotary, mask = self.flow.embed(latents.to(dtype), timestep, prefix_mask)
        return hidden, time, modulation, *rotary, mask


class ExpertLayer(nn.Module):
    """One flow layer after the first of its group. The first layer is the same with scores of zero before it."""

    def __init__(self, layer: FlowLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(
        self,
        hidden: Tensor,
        time: Tensor,
        modulation: Tensor,
        cos: Tensor,
        sin: Tensor,
        prefix: Tensor,
        mask: Tensor,
        scores: Tensor,
    ) -> tuple[Tensor, Tensor]:
        outputs: tuple[Tensor, Tensor] = self.layer(hidden, time, modulation, (cos, sin), prefix, mask, scores)
        return outputs


class ExpertEnd(nn.Module):
    """The velocity head of an expert group."""

    def __init__(self, head: VelocityHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: Tensor, time: Tensor, latents: Tensor) -> Tensor:
        velocity: Tensor = self.head(hidden, time).transpose(1, 2)  # [R, C, N]
        return velocity.reshape(latents.shape).float()


def expert_component(config: LatteFlowConfig, precision: str) -> Component:
    """Returns the graph that all experts share. Its weights are named as those of group 0."""
    narrow = ONNX_NAMES[precision]
    heads, kv_heads, head_dim, size = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.hidden_size,
    )
    latents = latents_spec("latents", "rows", config)
    timestep = TensorSpec(name="timestep", dtype="float32", shape=("rows",))
    prefix_mask = TensorSpec(name="prefix_mask", dtype="bool", shape=("rows", "prefix"))
    hidden = TensorSpec(name="hidden", dtype="float32", shape=("rows", "tokens", size))
    shared = (
        TensorSpec(name="time", dtype=narrow, shape=("rows", size)),
        TensorSpec(name="modulation", dtype=narrow, shape=("rows", 4, size)),
        TensorSpec(name="cos", dtype="float32", shape=("rows", 1, "tokens", head_dim)),
        TensorSpec(name="sin", dtype="float32", shape=("rows", 1, "tokens", head_dim)),
    )
    prefix = layer_kv_spec("prefix", "rows", "prefix", config, precision)
    mask = TensorSpec(name="mask", dtype="bool", shape=("rows", 1, 1, "total"))
    queries = "tokens" if heads == kv_heads else "queries"
    scores = TensorSpec(name="scores", dtype="float32", shape=("rows", kv_heads, queries, "tokens"))
    velocity = latents_spec("velocity", "rows", config)
    image = {"rows": 3, "prefix": 5, "latent_height": 8, "latent_width": 6, "tokens": 48}
    tokens = {"rows": 3, "prefix": 5, "tokens": 7, "total": 12, "queries": 7 * heads // kv_heads}
    # Models that differ in depth or in statistics of the latents share the traces of their parts.
    single = config.model_copy(update={"num_hidden_layers": 1, "schedule": ExpertSchedule.uniform(1)})
    settings = single.model_dump(
        mode="json", exclude={"variant", "latent_size", "latents_mean", "latents_std", "max_prompt_tokens"}
    ) | {"precision": precision}
    parts = (
        Part(
            "begin",
            partial(_expert_begin, single, precision),
            (latents, timestep, prefix_mask),
            (hidden, *shared, mask),
            image,
            settings,
        ),
        Part(
            "layer",
            partial(_expert_layer, single, precision),
            (hidden, *shared, prefix, mask, scores),
            (hidden, scores),
            tokens,
            settings,
        ),
        Part(
            "end", partial(_expert_end, single, precision), (hidden, shared[0], latents), (velocity,), image, settings
        ),
    )

    def assemble(graph: Assembly) -> None:
        latents = graph.input("latents")
        hidden, *shared, mask = graph.call("begin", latents, graph.input("timestep"), graph.input("prefix_mask"))
        scores = None
        for index in range(config.layers_per_group):
            prefix = graph.select(graph.input("prefix_kv"), index)
            weights = ("layer.", f"flow.layers.{index}.")
            hidden, scores = graph.call("layer", hidden, *shared, prefix, mask, scores, weights=weights)
        (velocity,) = graph.call("end", hidden, shared[0], latents, weights=("head.", "flow.heads.0."))
        graph.output("velocity", velocity)

    inputs = (latents, timestep, kv_spec("prefix_kv", "rows", "prefix", config, precision), prefix_mask)
    return Component("expert", "expert", inputs, (velocity,), parts, assemble)


def _expert_begin(config: LatteFlowConfig, precision: str) -> nn.Module:
    return ExpertBegin(cast_parameters(FlowTransformer(config), TORCH_DTYPES[precision]))


def _expert_layer(config: LatteFlowConfig, precision: str) -> nn.Module:
    return ExpertLayer(cast_parameters(FlowLayer(config, first_of_group=False), TORCH_DTYPES[precision]))


def _expert_end(config: LatteFlowConfig, precision: str) -> nn.Module:
    return ExpertEnd(cast_parameters(VelocityHead(config), TORCH_DTYPES[precision]))


# ---- the solver and the autoencoder ------------------------------------------------------------------


class SolverStepGraph(nn.Module):
    """Classifier-free guidance and the Euler update, so that nothing leaves the device between steps."""

    def forward(
        self,
        latents: Tensor,
        velocity: Tensor,
        unconditional_row: Tensor,
        guidance_scale: Tensor,
        step_size: Tensor,
        row_of: Tensor,
    ) -> tuple[Tensor, Tensor]:
        batch = latents.shape[0]
        conditional = velocity[:batch]
        unconditional = velocity.index_select(0, unconditional_row)
        scale, step = guidance_scale[:, None, None, None], step_size[:, None, None, None]
        guided = unconditional + scale * (conditional - unconditional)
        next_latents = latents + step * guided
        return next_latents, next_latents.index_select(0, row_of)


class DecoderGraph(nn.Module):
    """The autoencoder's decoder, from normalised latents to 8-bit pixels."""

    latents_mean: Tensor
    latents_std: Tensor

    def __init__(self, decoder: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.decoder = decoder
        self.register_buffer("latents_mean", mean)
        self.register_buffer("latents_std", std)

    def forward(self, latents: Tensor) -> Tensor:
        dtype = next(self.decoder.parameters()).dtype
        return pixels_to_uint8(self.decoder((latents * self.latents_std + self.latents_mean).to(dtype)))


def solver_component(config: LatteFlowConfig) -> Component:
    """Returns `solver_step`. It is always fp32, because rounding errors here add up over the steps."""
    part = Part(
        "all",
        SolverStepGraph,
        (
            latents_spec("latents", "batch", config),
            latents_spec("velocity", "rows", config),
            TensorSpec(name="unconditional_row", dtype="int64", shape=("batch",)),
            TensorSpec(name="guidance_scale", dtype="float32", shape=("batch",)),
            TensorSpec(name="step_size", dtype="float32", shape=("batch",)),
            TensorSpec(name="row_of", dtype="int64", shape=("rows",)),
        ),
        (latents_spec("next_latents", "batch", config), latents_spec("row_latents", "rows", config)),
        {"batch": 3, "rows": 5, "latent_height": 8, "latent_width": 6},
        {},
    )
    return _single("solver_step", "solver_step", part)


def decoder_component(config: LatteFlowConfig, vae_config: Mapping[str, Any]) -> Component:
    """Returns `vae_decoder`.

    Args:
        vae_config: the config of the `AutoencoderDC`.
    """
    settings = {name: value for name, value in vae_config.items() if not name.startswith("_")}
    part = Part(
        "all",
        partial(_decoder, settings, config.latent_channels),
        (latents_spec("latents", "batch", config),),
        (TensorSpec(name="image", dtype="uint8", shape=("batch", "height", "width", 3)),),
        {"batch": 3, "latent_height": 8, "latent_width": 6},
        settings,
    )
    return _single("vae_decoder", "vae_decoder", part)


def _decoder(vae_config: Mapping[str, Any], channels: int) -> nn.Module:
    with quiet_libraries():
        decoder = use_linear_attention(AutoencoderDC.from_config(vae_config).decoder)
    statistics = torch.ones((1, channels, 1, 1))  # like weights, the values are bound later
    return DecoderGraph(decoder, statistics, statistics.clone())


def _single(name: str, role: EngineRole, part: Part) -> Component:
    """Returns a component of one part, whose inputs and outputs are the graph's own."""

    def assemble(graph: Assembly) -> None:
        outputs = graph.call(part.name, *(graph.input(spec.name) for spec in part.inputs))
        for spec, value in zip(part.outputs, outputs, strict=True):
            graph.output(spec.name, value)

    return Component(name, role, part.inputs, part.outputs, (part,), assemble)


# ---- what the graphs share ---------------------------------------------------------------------------


def latents_spec(name: str, batch: str, config: LatteFlowConfig) -> TensorSpec:
    """Returns the spec of `[batch, C, H, W]` float32."""
    shape = (batch, config.latent_channels, "latent_height", "latent_width")
    return TensorSpec(name=name, dtype="float32", shape=shape)


def kv_spec(name: str, batch: str, length: str, config: LatteFlowConfig, precision: str) -> TensorSpec:
    """Returns the spec of the keys and values of an expert group, `[M, 2, batch, Hkv, length, D]`."""
    layer = layer_kv_spec(name, batch, length, config, precision)
    return layer.model_copy(update={"shape": (config.layers_per_group, *layer.shape)})


def layer_kv_spec(name: str, batch: str, length: str, config: LatteFlowConfig, precision: str) -> TensorSpec:
    """Returns the spec of the keys and values of one layer, `[2, batch, Hkv, length, D]`."""
    shape = (2, batch, config.num_key_value_heads, length, config.head_dim)
    return TensorSpec(name=name, dtype=ONNX_NAMES[precision], shape=shape)


def expert_weight_source(config: LatteFlowConfig, group: int, name: str) -> tuple[str, str]:
    """Returns where the weight `name` of the expert's graph comes from for a group: part of the model, name in it.

    The part is "flow" or, for weights that `blend` shares with the VLM, "language_model".
    """
    name = name.removeprefix("flow.")
    kind, _, rest = name.partition(".")
    if kind == "heads":
        return "flow", f"heads.{group}.{rest.partition('.')[2]}"
    if kind != "layers":
        return "flow", name
    index, _, weight = rest.partition(".")
    layer = config.layers_of(group)[int(index)]
    if config.variant == "blend" and weight in VLM_FROM_FLOW:
        return "language_model", f"layers.{layer}.{VLM_FROM_FLOW[weight]}"
    return "flow", f"layers.{layer}.{weight}"


def prompt_format_of(model: LatteFlow) -> PromptFormat:
    """Returns what the manifest says about prompts."""
    return PromptFormat(
        pad_token_id=model.tokenizer.pad_token_id or 0,
        max_tokens=model.config.max_prompt_tokens,
        special_tokens=tuple(sorted(token for token in model.tokenizer.get_added_vocab() if token.startswith("<|"))),
    )


def understanding_of(model: LatteFlow) -> Understanding:
    """Returns what the manifest says about answers."""
    config, generation = model.vlm.config, model.vlm.generation_config
    ends = (config.text_config.eos_token_id, generation.eos_token_id, model.tokenizer.eos_token_id)
    flat = {token for end in ends if end is not None for token in (end if isinstance(end, (list, tuple)) else [end])}
    return Understanding(
        image_token_id=config.image_token_id,
        eos_token_ids=tuple(sorted(flat)),
        patch_size=config.vision_config.patch_size,
        spatial_merge_size=config.vision_config.spatial_merge_size,
        max_context_tokens=config.text_config.max_position_embeddings,
    )


def geometry_of(config: LatteFlowConfig) -> Geometry:
    """Returns a model's sizes for the manifest."""
    fields = config.model_dump() | {"layers_per_group": config.layers_per_group, "head_dim": config.head_dim}
    return Geometry.model_validate({name: fields[name] for name in Geometry.model_fields})
