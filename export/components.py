"""The engines of a bundle: for each its graph in PyTorch, its tensors with their named axes, its weights.

A tensor has one name, here, in the ONNX graph, in the engine and in the manifest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from latte.checkpoint import VLM_FROM_FLOW
from latte.config import LatteFlowConfig
from latte.model import FlowTransformer, pixels_to_uint8
from runtime.manifest import DType, Geometry, TensorSpec

ModuleT = TypeVar("ModuleT", bound=nn.Module)
TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ONNX_NAMES: dict[str, DType] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Component:
    """One traced graph. Engines with the same graph and other weights (the experts) share it."""

    name: str
    build: Callable[[], nn.Module]
    """Makes the module; called where no weights are allocated."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    example_axes: dict[str, int]
    """A size for every named axis, for tracing. Sizes differ, so that no two axes are taken for one."""

    def example_inputs(self) -> tuple[Tensor, ...]:
        """Zeros of every input's shape and dtype at the example sizes."""
        tensors = []
        for spec in self.inputs:
            shape = [self.example_axes[axis] if isinstance(axis, str) else axis for axis in spec.shape]
            tensors.append(torch.ones(shape, dtype=getattr(torch, spec.dtype)))
        return tuple(tensors)

    def dynamic_shapes(self) -> tuple[dict[int, str], ...]:
        """Named axes of every input, as `torch.onnx.export` takes them."""
        return tuple({i: axis for i, axis in enumerate(spec.shape) if isinstance(axis, str)} for spec in self.inputs)


class ExpertGraph(nn.Module):
    """One expert group as a function of flat tensors. Interfaces are fp32 but for the KV cache."""

    def __init__(self, flow: FlowTransformer) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, latents: Tensor, timestep: Tensor, prefix_kv: Tensor, prefix_mask: Tensor) -> Tensor:
        dtype = self.flow.latent_embed.weight.dtype
        return self.flow(latents.to(dtype), timestep, prefix_kv, prefix_mask, 0).float()


class PrefixGraph(nn.Module):
    """The VLM over a prompt: keys and values of every layer, one tensor per expert group."""

    def __init__(self, language_model: nn.Module, config: LatteFlowConfig) -> None:
        super().__init__()
        self.language_model = language_model
        self.config = config

    def forward(self, input_ids: Tensor, prefix_mask: Tensor) -> tuple[Tensor, ...]:
        text: Any = self.language_model
        length = input_ids.shape[1]
        positions = torch.arange(length, device=input_ids.device)[None, None].expand(3, input_ids.shape[0], length)
        hidden = text.embed_tokens(input_ids)
        rotary = tuple(part.to(hidden.dtype) for part in text.rotary_emb(hidden.float(), positions))
        index = torch.arange(length, device=input_ids.device)
        visible = (index[None, :] <= index[:, None])[None, None] & prefix_mask[:, None, None, :]
        lowest = torch.finfo(hidden.dtype).min
        mask = torch.zeros((), dtype=hidden.dtype).expand(visible.shape).masked_fill(~visible, lowest)
        cache = KeyValueRecorder()
        for layer in text.layers:
            hidden = layer(
                hidden, attention_mask=mask, position_embeddings=rotary, past_key_values=cache, use_cache=True
            )
        groups = range(self.config.schedule.num_groups)
        return tuple(
            torch.stack([torch.stack(cache.layers[layer]) for layer in self.config.layers_of(group)])
            for group in groups
        )


class KeyValueRecorder:
    """The part of transformers' cache that its attention calls: remembers each layer's keys and values."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.layers[layer_idx] = (key, value)
        return key, value


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


def cast_parameters(module: ModuleT, dtype: torch.dtype) -> ModuleT:
    """Casts parameters and leaves buffers: `module.half()` would round the rotary frequencies too."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module


def latents_spec(name: str, batch: str, config: LatteFlowConfig) -> TensorSpec:
    """`[batch, C, H, W]` float32."""
    shape = (batch, config.latent_channels, "latent_height", "latent_width")
    return TensorSpec(name=name, dtype="float32", shape=shape)


def prefix_kv_spec(name: str, batch: str, config: LatteFlowConfig, precision: str) -> TensorSpec:
    """`[M, 2, batch, Hkv, P, D]`."""
    shape = (config.layers_per_group, 2, batch, config.num_key_value_heads, "prefix", config.head_dim)
    return TensorSpec(name=name, dtype=ONNX_NAMES[precision], shape=shape)


def expert_component(config: LatteFlowConfig, precision: str) -> Component:
    """The graph that all experts share; weights are named as group 0's."""
    return Component(
        name="expert",
        build=lambda: ExpertGraph(cast_parameters(FlowTransformer(config), TORCH_DTYPES[precision])),
        inputs=(
            latents_spec("latents", "rows", config),
            TensorSpec(name="timestep", dtype="float32", shape=("rows",)),
            prefix_kv_spec("prefix_kv", "rows", config, precision),
            TensorSpec(name="prefix_mask", dtype="bool", shape=("rows", "prefix")),
        ),
        outputs=(latents_spec("velocity", "rows", config),),
        example_axes={"rows": 3, "prefix": 5, "latent_height": 8, "latent_width": 6},
    )


def prefix_component(
    config: LatteFlowConfig, precision: str, build_language_model: Callable[[], nn.Module]
) -> Component:
    """The VLM as prefix encoder."""
    groups = range(config.schedule.num_groups)
    return Component(
        name="vlm",
        build=lambda: PrefixGraph(cast_parameters(build_language_model(), TORCH_DTYPES[precision]), config),
        inputs=(
            TensorSpec(name="input_ids", dtype="int64", shape=("batch", "prefix")),
            TensorSpec(name="prefix_mask", dtype="bool", shape=("batch", "prefix")),
        ),
        outputs=tuple(prefix_kv_spec(f"prefix_kv_{group}", "batch", config, precision) for group in groups),
        example_axes={"batch": 3, "prefix": 5},
    )


def solver_component(config: LatteFlowConfig) -> Component:
    """`solver_step`; always fp32, for rounding here adds up over the steps."""
    return Component(
        name="solver_step",
        build=SolverStepGraph,
        inputs=(
            latents_spec("latents", "batch", config),
            latents_spec("velocity", "rows", config),
            TensorSpec(name="unconditional_row", dtype="int64", shape=("batch",)),
            TensorSpec(name="guidance_scale", dtype="float32", shape=("batch",)),
            TensorSpec(name="step_size", dtype="float32", shape=("batch",)),
            TensorSpec(name="row_of", dtype="int64", shape=("rows",)),
        ),
        outputs=(latents_spec("next_latents", "batch", config), latents_spec("row_latents", "rows", config)),
        example_axes={"batch": 3, "rows": 5, "latent_height": 8, "latent_width": 6},
    )


def decoder_component(config: LatteFlowConfig, build_decoder: Callable[[], nn.Module]) -> Component:
    """`vae_decoder`."""
    shape = (1, config.latent_channels, 1, 1)
    return Component(
        name="vae_decoder",
        build=lambda: DecoderGraph(
            build_decoder(), torch.tensor(config.latents_mean).view(shape), torch.tensor(config.latents_std).view(shape)
        ),
        inputs=(latents_spec("latents", "batch", config),),
        outputs=(TensorSpec(name="image", dtype="uint8", shape=("batch", "height", "width", 3)),),
        example_axes={"batch": 3, "latent_height": 8, "latent_width": 6},
    )


def expert_weight_source(config: LatteFlowConfig, group: int, name: str) -> tuple[str, str]:
    """Where the weight `name` of the traced expert comes from for `group`: (part of the model, name in it).

    The part is "flow" or, for what `blend` shares, "language_model".
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


def geometry_of(config: LatteFlowConfig) -> Geometry:
    """What the manifest says of a model's sizes."""
    fields = config.model_dump() | {"layers_per_group": config.layers_per_group, "head_dim": config.head_dim}
    return Geometry.model_validate({name: fields[name] for name in Geometry.model_fields})
