"""The engines of a bundle: for each its graph in PyTorch, its tensors with their named axes, its weights.

A tensor has one name, here, in the ONNX graph, in the engine and in the manifest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from latte.checkpoint import VLM_FROM_FLOW
from latte.config import LatteFlowConfig
from latte.model import FlowTransformer, pixels_to_uint8, rotate
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
    variadic: int = 0
    """How many of the last inputs the graph takes as `*args`."""

    def example_inputs(self) -> tuple[Tensor, ...]:
        """Zeros of every input's shape and dtype at the example sizes."""
        tensors = []
        for spec in self.inputs:
            shape = [self.example_axes[axis] if isinstance(axis, str) else axis for axis in spec.shape]
            tensors.append(torch.ones(shape, dtype=getattr(torch, spec.dtype)))
        return tuple(tensors)

    def dynamic_shapes(self) -> tuple[Any, ...]:
        """Named axes of every input, as `torch.onnx.export` takes them."""
        axes = [{i: axis for i, axis in enumerate(spec.shape) if isinstance(axis, str)} for spec in self.inputs]
        fixed = len(axes) - self.variadic
        return (*axes[:fixed], tuple(axes[fixed:])) if self.variadic else tuple(axes)


class ExpertGraph(nn.Module):
    """One expert group as a function of flat tensors. Interfaces are fp32 but for the KV cache."""

    def __init__(self, flow: FlowTransformer) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, latents: Tensor, timestep: Tensor, prefix_kv: Tensor, prefix_mask: Tensor) -> Tensor:
        dtype = self.flow.latent_embed.weight.dtype
        return self.flow(latents.to(dtype), timestep, prefix_kv, prefix_mask, 0).float()


class LanguageGraph(nn.Module):
    """The VLM's text model: the encoder of prompts, and the decoder of answers, with one set of weights.

    `past_kv` are the keys and values of what came before, one tensor per expert group; what comes out is
    past and new side by side, so that the output of a run is the next one's input.
    """

    def __init__(
        self, language_model: nn.Module, lm_head: nn.Linear | None, config: LatteFlowConfig, image_token_id: int
    ):
        super().__init__()
        self.language_model = language_model
        self.lm_head = lm_head
        self.config = config
        self.image_token_id = image_token_id

    def forward(
        self, input_ids: Tensor, image_embeds: Tensor, position_ids: Tensor, attention_mask: Tensor, *past_kv: Tensor
    ) -> tuple[Tensor, ...]:
        text: Any = self.language_model
        rows, tokens = input_ids.shape
        past = past_kv[0].shape[4]
        hidden = text.embed_tokens(input_ids)
        # The images' embeddings take their places in order; `masked_scatter` would be NonZero, which TensorRT rejects.
        is_image = input_ids == self.image_token_id
        place = is_image.reshape(-1).long().cumsum(0).sub(1).clamp(min=0).reshape(rows, tokens)
        dtype = hidden.dtype
        hidden = torch.where(is_image[..., None], nn.functional.embedding(place, image_embeds), hidden.float())
        rotary = tuple(part.to(dtype) for part in text.rotary_emb(hidden, position_ids))
        query = past + torch.arange(tokens, device=input_ids.device)
        key = torch.arange(attention_mask.shape[1], device=input_ids.device)
        visible = (key[None, :] <= query[:, None])[None, None] & attention_mask[:, None, None, :]
        mask = torch.zeros(()).expand(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
        cache = KeyValueCache(
            {
                layer: (kv[index, 0], kv[index, 1])
                for group, kv in enumerate(past_kv)
                for index, layer in enumerate(self.config.layers_of(group))
            }
        )
        # transformers' own loop, with the residual stream in fp32.
        for layer in text.layers:
            normed = layer.input_layernorm(hidden).to(dtype)
            attended, _ = layer.self_attn(
                normed, attention_mask=mask, position_embeddings=rotary, past_key_values=cache, use_cache=True
            )
            hidden = hidden + attended
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden).to(dtype))
        last = attention_mask[:, past:].long().sum(dim=1).sub(1).clamp(min=0)
        last_hidden = text.norm(hidden.gather(1, last[:, None, None].expand(-1, 1, hidden.shape[-1])).squeeze(1))
        head = text.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        groups = range(self.config.schedule.num_groups)
        kv = (
            torch.stack([torch.stack(cache.layers[layer]) for layer in self.config.layers_of(group)])
            for group in groups
        )
        return nn.functional.linear(last_hidden.to(dtype), head).float(), *kv


class KeyValueCache:
    """The part of transformers' cache that its attention calls: appends to each layer's keys and values."""

    def __init__(self, layers: dict[int, tuple[Tensor, Tensor]]) -> None:
        self.layers = layers

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        past_key, past_value = self.layers[layer_idx]
        self.layers[layer_idx] = (torch.cat([past_key, key], dim=2), torch.cat([past_value, value], dim=2))
        return self.layers[layer_idx]


class VisionGraph(nn.Module):
    """The VLM's vision tower over the patches of several images, which do not see each other.

    transformers' own loop splits by image on the host, which cannot be traced; this one masks.
    """

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixel_values: Tensor, position_ids: Tensor, image_ids: Tensor) -> Tensor:
        tower: Any = self.tower
        merged = pixel_values.shape[1]
        weight = tower.patch_embed.proj.weight
        dtype = weight.dtype
        hidden = nn.functional.linear(pixel_values.flatten(0, 1).to(dtype), weight.flatten(1)).float()
        cos, sin = (part.unsqueeze(1) for part in tower.rotary_pos_emb(hidden, position_ids.flatten(0, 1)))
        image_of = image_ids[:, None].expand(-1, merged).reshape(-1)
        apart = image_of[:, None] != image_of[None, :]
        mask = (
            torch.zeros((), dtype=torch.float32).expand(apart.shape).masked_fill(apart, torch.finfo(torch.float32).min)
        )
        for block in tower.blocks:
            hidden = hidden + self._attend(block.attn, wide_layer_norm(block.norm1, hidden).to(dtype), cos, sin, mask)
            hidden = hidden + block.mlp(wide_layer_norm(block.norm2, hidden).to(dtype))
        normed = wide_layer_norm(tower.merger.ln_q, hidden).to(dtype)
        embeds: Tensor = tower.merger.mlp(normed.view(-1, tower.merger.hidden_size))
        return embeds.float()

    @staticmethod
    def _attend(attention: Any, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        patches = hidden.shape[0]
        query, key, value = attention.qkv(hidden).reshape(patches, 3, attention.num_heads, -1).unbind(1)
        query, key = (rotate(part, (cos, sin)).transpose(0, 1) for part in (query, key))
        scores = torch.matmul(query, key.transpose(1, 2)) * attention.scaling
        weights = (scores.float() + mask).softmax(dim=-1).to(value.dtype)
        attended = torch.matmul(weights, value.transpose(0, 1)).transpose(0, 1)
        return attention.proj(attended.reshape(patches, -1))


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


def wide_softmax_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention for transformers' layers, its softmax in fp32 whatever the dtype of the weights.

    transformers' own asks for the same with `softmax(dtype=torch.float32)`, which the exporter turns into a
    softmax in half precision and a cast after it. The query heads of a key-value head stand one after
    another, so that keys and values need not be repeated.

    Args:
        query: `[B, Hq, S, D]`.
        key, value: `[B, Hkv, T, D]`.
        attention_mask: 0 or the lowest number, `[B, 1, S, T]` float32.
    """
    rows, heads, tokens, head_dim = query.shape
    grouped = query.reshape(rows, key.shape[1], -1, head_dim)
    scores = (torch.matmul(grouped, key.transpose(-1, -2)) * scaling).float()
    weights = (scores.reshape(rows, heads, tokens, -1) + attention_mask).softmax(dim=-1).to(value.dtype)
    attended = torch.matmul(weights.reshape(rows, key.shape[1], heads // key.shape[1] * tokens, -1), value)
    return attended.reshape(rows, heads, tokens, head_dim).transpose(1, 2), None


WIDE_SOFTMAX = "latte_flow_wide_softmax"
AttentionInterface.register(WIDE_SOFTMAX, wide_softmax_attention)


def wide_layer_norm(norm: nn.LayerNorm, hidden: Tensor) -> Tensor:
    """Layer normalisation in fp32, whatever the dtype of the weights."""
    return nn.functional.layer_norm(hidden, norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps)


def cast_parameters(module: ModuleT, dtype: torch.dtype) -> ModuleT:
    """Casts parameters and leaves buffers: `module.half()` would round the rotary frequencies too."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module


def latents_spec(name: str, batch: str, config: LatteFlowConfig) -> TensorSpec:
    """`[batch, C, H, W]` float32."""
    shape = (batch, config.latent_channels, "latent_height", "latent_width")
    return TensorSpec(name=name, dtype="float32", shape=shape)


def kv_spec(name: str, batch: str, length: str, config: LatteFlowConfig, precision: str) -> TensorSpec:
    """`[M, 2, batch, Hkv, length, D]`."""
    shape = (config.layers_per_group, 2, batch, config.num_key_value_heads, length, config.head_dim)
    return TensorSpec(name=name, dtype=ONNX_NAMES[precision], shape=shape)


def expert_component(config: LatteFlowConfig, precision: str) -> Component:
    """The graph that all experts share; weights are named as group 0's."""
    return Component(
        name="expert",
        build=lambda: ExpertGraph(cast_parameters(FlowTransformer(config), TORCH_DTYPES[precision])),
        inputs=(
            latents_spec("latents", "rows", config),
            TensorSpec(name="timestep", dtype="float32", shape=("rows",)),
            kv_spec("prefix_kv", "rows", "prefix", config, precision),
            TensorSpec(name="prefix_mask", dtype="bool", shape=("rows", "prefix")),
        ),
        outputs=(latents_spec("velocity", "rows", config),),
        example_axes={"rows": 3, "prefix": 5, "latent_height": 8, "latent_width": 6},
    )


def language_component(
    config: LatteFlowConfig, precision: str, vlm_config: Any, build: Callable[[], tuple[nn.Module, nn.Linear | None]]
) -> Component:
    """`vlm`: prompts and answers.

    Args:
        vlm_config: the VLM's `Qwen2VLConfig`.
        build: makes the text model, and the output layer unless it is tied to the embedding.
    """
    groups = range(config.schedule.num_groups)

    def build_graph() -> nn.Module:
        return cast_parameters(LanguageGraph(*build(), config, vlm_config.image_token_id), TORCH_DTYPES[precision])

    return Component(
        name="vlm",
        build=build_graph,
        inputs=(
            TensorSpec(name="input_ids", dtype="int64", shape=("batch", "tokens")),
            TensorSpec(name="image_embeds", dtype="float32", shape=("image_tokens", config.hidden_size)),
            TensorSpec(name="position_ids", dtype="int64", shape=(3, "batch", "tokens")),
            TensorSpec(name="attention_mask", dtype="bool", shape=("batch", "total")),
            *(kv_spec(f"past_kv_{group}", "batch", "past", config, precision) for group in groups),
        ),
        outputs=(
            TensorSpec(name="logits", dtype="float32", shape=("batch", vlm_config.text_config.vocab_size)),
            *(kv_spec(f"kv_{group}", "batch", "total", config, precision) for group in groups),
        ),
        example_axes={"batch": 3, "tokens": 5, "image_tokens": 4, "past": 6, "total": 11},
        variadic=len(groups),
    )


def vision_component(precision: str, vision_config: Any, build_tower: Callable[[], nn.Module]) -> Component:
    """`vision_encoder`; the patches that merge into one token stand together.

    Args:
        vision_config: the VLM's `Qwen2VLVisionConfig`.
    """
    merged = vision_config.spatial_merge_size**2
    features = vision_config.in_channels * vision_config.temporal_patch_size * vision_config.patch_size**2
    return Component(
        name="vision_encoder",
        build=lambda: VisionGraph(cast_parameters(build_tower(), TORCH_DTYPES[precision])),
        inputs=(
            TensorSpec(name="pixel_values", dtype="float32", shape=("image_tokens", merged, features)),
            TensorSpec(name="position_ids", dtype="int64", shape=("image_tokens", merged, 2)),
            TensorSpec(name="image_ids", dtype="int64", shape=("image_tokens",)),
        ),
        outputs=(TensorSpec(name="image_embeds", dtype="float32", shape=("image_tokens", vision_config.hidden_size)),),
        example_axes={"image_tokens": 6},
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
