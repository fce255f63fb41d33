"""The components of the VLM, `vlm` and `vision_encoder`, in transformers' modules; see `export.components`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel, Qwen2VLTextModel

from export.components import (
    ONNX_NAMES,
    Assembly,
    Component,
    Part,
    kv_spec,
    layer_kv_spec,
)
from latte.config import LatteFlowConfig
from latte.model import rotate
from latte.precision import TORCH_DTYPES, cast_parameters
from runtime.manifest import TensorSpec

PER_MODEL = {
    "num_hidden_layers",
    "layer_types",
    "max_window_layers",
    "vocab_size",
    "depth",
    "transformers_version",
    "dtype",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
}
"""Settings of transformers' configs that do not change a layer's graph."""
MOST_SCORES_BYTES = 64 << 20
"""Memory for the scores of one chunk of the vision tower's queries with all keys."""
MOST_CHUNKS = 32
"""A layer's graph grows with each chunk, so scores of gigantic images take more memory than `MOST_SCORES_BYTES`."""


# ---- the language model ------------------------------------------------------------------------------


class LanguageBegin(nn.Module):
    """Embeds tokens and images, and makes the mask of the language model's layers."""

    def __init__(self, language_model: nn.Module, image_token_id: int) -> None:
        super().__init__()
        self.language_model = language_model
        self.image_token_id = image_token_id

    def forward(
        self, input_ids: Tensor, image_embeds: Tensor, position_ids: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, ...]:
        text: Any = self.language_model
        rows, tokens = input_ids.shape
        total = attention_mask.shape[1]
        hidden = text.embed_tokens(input_ids)  # [B, S, hidden]
        # The images' embeddings take their places in order; `masked_scatter` would be NonZero, which TensorRT rejects.
        is_image = input_ids == self.image_token_id
        place = is_image.reshape(-1).long().cumsum(0).sub(1).clamp(min=0).reshape(rows, tokens)
        dtype = hidden.dtype
        hidden = torch.where(is_image[..., None], nn.functional.embedding(place, image_embeds), hidden.float())
        cos, sin = (part.to(dtype) for part in text.rotary_emb(hidden, position_ids))  # [B, S, D]
        query = total - tokens + torch.arange(tokens, device=input_ids.device)  # [S]
        key = torch.arange(total, device=input_ids.device)  # [T]
        visible = (key[None, :] <= query[:, None])[None, None] & attention_mask[:, None, None, :]  # [B, 1, S, T]
        mask = torch.zeros(()).expand(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
        return hidden, cos, sin, mask


class LanguageLayer(nn.Module):
    """One layer of transformers' Qwen2-VL, with the residual stream in fp32."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        layer: Any = self.layer
        cache = KeyValueCache(past[0], past[1])
        normed = layer.input_layernorm(hidden).to(cos.dtype)
        attended, _ = layer.self_attn(
            normed, attention_mask=mask, position_embeddings=(cos, sin), past_key_values=cache, use_cache=True
        )
        hidden = hidden + attended
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden).to(cos.dtype))
        return hidden, torch.stack([cache.key, cache.value])  # [2, B, Hkv, T, D]


class LanguageEnd(nn.Module):
    """Logits of each row's last token, and the likeliest next token, so that greedy answers need no logits on the host.

    The token is -1 where a logit is not finite. Without an output layer of its own, the embedding serves as one.
    """

    def __init__(self, language_model: nn.Module, lm_head: nn.Linear | None) -> None:
        super().__init__()
        self.language_model = language_model
        self.lm_head = lm_head

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        text: Any = self.language_model
        past = attention_mask.shape[1] - hidden.shape[1]
        last = attention_mask[:, past:].long().sum(dim=1).sub(1).clamp(min=0)  # [B]
        last_hidden = hidden.gather(1, last[:, None, None].expand(-1, 1, hidden.shape[-1])).squeeze(1)  # [B, hidden]
        head = text.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        logits = nn.functional.linear(text.norm(last_hidden).to(head.dtype), head).float()  # [B, vocabulary]
        # A sum is finite if all of them are; comparisons with what is no number are false.
        finite = logits.sum(dim=-1).abs() < torch.finfo(torch.float32).max  # [B]
        return logits, torch.where(finite, logits.argmax(dim=-1), -1)


class KeyValueCache:
    """The part of transformers' cache that its attention uses: appends to the keys and values of one layer."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        self.key = key
        self.value = value

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.key, self.value = torch.cat([self.key, key], dim=2), torch.cat([self.value, value], dim=2)
        return self.key, self.value


def language_component(config: LatteFlowConfig, precision: str, vlm_config: Any) -> Component:
    """Returns `vlm`: the encoder of prompts and the decoder of answers, with one set of weights.

    `past_kv_k` are the keys and values of earlier tokens, one tensor per expert group. The graph returns past and new
    ones together, so that the output of one run is the input of the next.

    Args:
        vlm_config: the VLM's `Qwen2VLConfig`.
    """
    narrow = ONNX_NAMES[precision]
    text_config = vlm_config.text_config
    vocabulary, tied = text_config.vocab_size, vlm_config.tie_word_embeddings
    input_ids = TensorSpec(name="input_ids", dtype="int64", shape=("batch", "tokens"))
    image_embeds = TensorSpec(name="image_embeds", dtype="float32", shape=("image_tokens", config.hidden_size))
    position_ids = TensorSpec(name="position_ids", dtype="int64", shape=(3, "batch", "tokens"))
    attention_mask = TensorSpec(name="attention_mask", dtype="bool", shape=("batch", "total"))
    logits = TensorSpec(name="logits", dtype="float32", shape=("batch", vocabulary))
    best_token = TensorSpec(name="best_token", dtype="int64", shape=("batch",))
    hidden = TensorSpec(name="hidden", dtype="float32", shape=("batch", "tokens", config.hidden_size))
    shared = (
        TensorSpec(name="cos", dtype=narrow, shape=("batch", "tokens", config.head_dim)),
        TensorSpec(name="sin", dtype=narrow, shape=("batch", "tokens", config.head_dim)),
        TensorSpec(name="mask", dtype="float32", shape=("batch", 1, "tokens", "total")),
    )
    past = layer_kv_spec("past", "batch", "past", config, precision)
    kv = layer_kv_spec("kv", "batch", "total", config, precision)
    sizes = {"batch": 3, "tokens": 5, "image_tokens": 4, "past": 6, "total": 11}
    settings = _layer_settings(text_config) | {"precision": precision}

    parts = (
        Part(
            "begin",
            partial(_language_begin, text_config, precision, vlm_config.image_token_id),
            (input_ids, image_embeds, position_ids, attention_mask),
            (hidden, *shared),
            sizes,
            settings | {"vocabulary": vocabulary, "image_token_id": vlm_config.image_token_id},
        ),
        Part(
            "layer",
            partial(_language_layer, text_config, precision),
            (hidden, *shared, past),
            (hidden, kv),
            sizes,
            settings,
        ),
        Part(
            "end",
            partial(_language_end, text_config, precision, tied),
            (hidden, attention_mask),
            (logits, best_token),
            sizes,
            settings | {"vocabulary": vocabulary, "tied": tied},
        ),
    )
    groups = range(config.schedule.num_groups)

    def assemble(graph: Assembly) -> None:
        attention_mask = graph.input("attention_mask")
        hidden, *shared = graph.call(
            "begin", graph.input("input_ids"), graph.input("image_embeds"), graph.input("position_ids"), attention_mask
        )
        for group in groups:
            past_kv = graph.input(f"past_kv_{group}")
            layers = []
            for index, layer in enumerate(config.layers_of(group)):
                past = graph.select(past_kv, index)
                weights = ("layer.", f"language_model.layers.{layer}.")
                hidden, kv = graph.call("layer", hidden, *shared, past, weights=weights)
                layers.append(kv)
            graph.output(f"kv_{group}", graph.stack(layers))
        for spec, value in zip((logits, best_token), graph.call("end", hidden, attention_mask), strict=True):
            graph.output(spec.name, value)

    return Component(
        "vlm",
        "vlm",
        (
            input_ids,
            image_embeds,
            position_ids,
            attention_mask,
            *(kv_spec(f"past_kv_{group}", "batch", "past", config, precision) for group in groups),
        ),
        (logits, best_token, *(kv_spec(f"kv_{group}", "batch", "total", config, precision) for group in groups)),
        parts,
        assemble,
    )


def _text_model(text_config: Any, precision: str) -> Any:
    """Makes a text model with a single layer, which is all that the parts need."""
    single = copy.deepcopy(text_config)  # transformers writes the attention's name into it
    single.num_hidden_layers, single.layer_types = 1, single.layer_types[:1]
    made = Qwen2VLTextModel._from_config(single, attn_implementation=WIDE_SOFTMAX)
    return cast_parameters(made, TORCH_DTYPES[precision])


def _language_begin(text_config: Any, precision: str, image_token_id: int) -> nn.Module:
    return LanguageBegin(_text_model(text_config, precision), image_token_id)


def _language_layer(text_config: Any, precision: str) -> nn.Module:
    return LanguageLayer(_text_model(text_config, precision).layers[0])


def _language_end(text_config: Any, precision: str, tied: bool) -> nn.Module:
    head = None if tied else nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=False)
    lm_head = None if head is None else cast_parameters(head, TORCH_DTYPES[precision])
    return LanguageEnd(_text_model(text_config, precision), lm_head)


# ---- the vision tower --------------------------------------------------------------------------------


class VisionBegin(nn.Module):
    """Embeds the patches of several images."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixel_values: Tensor, position_ids: Tensor, image_ids: Tensor) -> tuple[Tensor, ...]:
        tower: Any = self.tower
        merged = pixel_values.shape[1]
        weight = tower.patch_embed.proj.weight
        patches = pixel_values.flatten(0, 1).to(weight.dtype)  # [patches, features]
        hidden = nn.functional.linear(patches, weight.flatten(1)).float()
        cos, sin = (part.unsqueeze(1) for part in tower.rotary_pos_emb(hidden, position_ids.flatten(0, 1)))
        return hidden, cos, sin, image_ids[:, None].expand(-1, merged).reshape(-1)  # the last is [patches]


class VisionQkv(nn.Module):
    """The beginning of a block of the vision tower: scaled queries, keys and values, `[heads, patches, D]` each."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.block = tower.get_submodule("blocks.0")

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        block: Any = self.block
        attention = block.attn
        normed = wide_layer_norm(block.norm1, hidden).to(attention.qkv.weight.dtype)
        qkv = attention.qkv(normed).reshape(hidden.shape[0], 3, attention.num_heads, -1)  # [patches, 3, heads, D]
        query, key, value = qkv.unbind(1)
        query, key = (rotate(part, (cos, sin)).transpose(0, 1) for part in (query, key))
        return query * attention.scaling, key, value.transpose(0, 1)


class VisionAttention(nn.Module):
    """Attention of some queries to all patches of their own images."""

    def forward(self, query: Tensor, image_of_query: Tensor, key: Tensor, value: Tensor, image_of: Tensor) -> Tensor:
        scores = attention_scores(query, key)  # [heads, queries, patches]
        # A mask to add: ONNX Runtime adds in place, and would copy the scores twice in order to replace some.
        mask = (image_of_query[:, None] != image_of[None, :]) * torch.finfo(torch.float32).min  # [queries, patches]
        weights = (scores + mask).softmax(dim=-1).to(value.dtype)
        return torch.matmul(weights, value)  # [heads, queries, D]


class VisionFeedForward(nn.Module):
    """The rest of a block: the projection after attention, and the MLP. The residual stream is fp32."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.block = tower.get_submodule("blocks.0")

    def forward(self, hidden: Tensor, attended: Tensor) -> Tensor:
        block: Any = self.block
        # [heads, patches, D] -> [patches, heads * D]
        hidden = hidden + block.attn.proj(attended.transpose(0, 1).flatten(1))
        mlp: Tensor = block.mlp(wide_layer_norm(block.norm2, hidden).to(attended.dtype))
        return hidden + mlp


class VisionEnd(nn.Module):
    """Merges the patches of each token into its embedding."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, hidden: Tensor) -> Tensor:
        merger: Any = self.tower.merger
        normed = wide_layer_norm(merger.ln_q, hidden).to(merger.mlp[0].weight.dtype)
        embeds: Tensor = merger.mlp(normed.view(-1, merger.hidden_size))
        return embeds.float()


def vision_component(precision: str, vision_config: Any, most_patches: int) -> Component:
    """Returns `vision_encoder`. The patches that are merged into one token come one after another.

    The attention of a layer is computed for one chunk of the queries after another, because the scores of all queries
    of a photo take gigabytes. The chunks are parts of the graph: TensorRT engines with loops cannot be captured in
    CUDA graphs.

    Args:
        vision_config: the VLM's `Qwen2VLVisionConfig`.
        most_patches: number of patches up to which the memory for scores is limited, see `MOST_SCORES_BYTES`.
    """
    scores_bytes = 4 * vision_config.num_heads * most_patches**2
    chunks = min(max(1, -(-scores_bytes // MOST_SCORES_BYTES)), MOST_CHUNKS)
    merged = vision_config.spatial_merge_size**2
    features = vision_config.in_channels * vision_config.temporal_patch_size * vision_config.patch_size**2
    head_dim = vision_config.embed_dim // vision_config.num_heads
    pixel_values = TensorSpec(name="pixel_values", dtype="float32", shape=("image_tokens", merged, features))
    position_ids = TensorSpec(name="position_ids", dtype="int64", shape=("image_tokens", merged, 2))
    image_ids = TensorSpec(name="image_ids", dtype="int64", shape=("image_tokens",))
    embeds = TensorSpec(name="image_embeds", dtype="float32", shape=("image_tokens", vision_config.hidden_size))
    hidden = TensorSpec(name="hidden", dtype="float32", shape=("patches", vision_config.embed_dim))
    rotary = (
        TensorSpec(name="cos", dtype="float32", shape=("patches", 1, head_dim)),
        TensorSpec(name="sin", dtype="float32", shape=("patches", 1, head_dim)),
    )
    image_of = TensorSpec(name="image_of", dtype="int64", shape=("patches",))
    query, key, value, attended = (
        TensorSpec(name=name, dtype=ONNX_NAMES[precision], shape=(vision_config.num_heads, "patches", head_dim))
        for name in ("query", "key", "value", "attended")
    )
    # The queries of one chunk.
    some_query, some_attended = (
        spec.model_copy(update={"shape": (vision_config.num_heads, "queries", head_dim)}) for spec in (query, attended)
    )
    image_of_query = TensorSpec(name="image_of_query", dtype="int64", shape=("queries",))
    sizes = {"image_tokens": 6, "patches": 6 * merged, "queries": 5}
    settings = _layer_settings(vision_config) | {"precision": precision}

    def part(
        name: str, kind: Callable[[nn.Module], nn.Module], inputs: tuple[TensorSpec, ...], *outputs: TensorSpec
    ) -> Part:
        return Part(name, partial(_vision_part, kind, vision_config, precision), inputs, outputs, sizes, settings)

    attention_inputs = (some_query, image_of_query, key, value, image_of)
    parts = (
        part("begin", VisionBegin, (pixel_values, position_ids, image_ids), hidden, *rotary, image_of),
        part("qkv", VisionQkv, (hidden, *rotary), query, key, value),
        Part("attention", VisionAttention, attention_inputs, (some_attended,), sizes, {"precision": precision}),
        part("feed_forward", VisionFeedForward, (hidden, attended), hidden),
        part("end", VisionEnd, (hidden,), embeds),
    )

    def assemble(graph: Assembly) -> None:
        hidden, *rotary, image_of = graph.call(
            "begin", graph.input("pixel_values"), graph.input("position_ids"), graph.input("image_ids")
        )
        images_of_chunks = graph.split(image_of, chunks, axis=0)
        for index in range(vision_config.depth):
            weights = ("block.", f"tower.blocks.{index}.")
            query, key, value = graph.call("qkv", hidden, *rotary, weights=weights)
            attended: list[Any] = []
            for chunk, (part, images) in enumerate(
                zip(graph.split(query, chunks, axis=1), images_of_chunks, strict=True)
            ):
                axes = {"queries": f"queries_{chunk}"}
                attended += graph.call("attention", part, images, key, value, image_of, axes=axes)
            (hidden,) = graph.call("feed_forward", hidden, graph.concat(attended, axis=1), weights=weights)
        (embeds,) = graph.call("end", hidden)
        graph.output("image_embeds", embeds)

    inputs = (pixel_values, position_ids, image_ids)
    return Component("vision_encoder", "vision_encoder", inputs, (embeds,), parts, assemble)


def _vision_part(kind: Callable[[nn.Module], nn.Module], vision_config: Any, precision: str) -> nn.Module:
    """Makes a part of a tower with a single block, which is all that the parts need."""
    single = copy.deepcopy(vision_config)
    single.depth = 1
    tower = Qwen2VisionTransformerPretrainedModel._from_config(single, attn_implementation="eager")
    return kind(cast_parameters(tower, TORCH_DTYPES[precision]))


# ---- what both share ---------------------------------------------------------------------------------


def wide_softmax_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention for transformers' layers, with scores and softmax in fp32 whatever the dtype of the weights.

    transformers' own attention uses `softmax(dtype=torch.float32)`, which the exporter turns into a softmax in half
    precision followed by a cast. The query heads of a key-value head come one after another, so that keys and values
    need not be repeated.

    Args:
        query: `[B, Hq, S, D]`.
        key, value: `[B, Hkv, T, D]`.
        attention_mask: 0 or the lowest number, `[B, 1, S, T]` float32.
    """
    rows, heads, tokens, head_dim = query.shape
    grouped = query.reshape(rows, key.shape[1], -1, head_dim)  # [B, Hkv, Hq/Hkv·S, D]
    scores = attention_scores(grouped * scaling, key)
    weights = (scores.reshape(rows, heads, tokens, -1) + attention_mask).softmax(dim=-1).to(value.dtype)
    attended = torch.matmul(weights.reshape(rows, key.shape[1], heads // key.shape[1] * tokens, -1), value)
    return attended.reshape(rows, heads, tokens, head_dim).transpose(1, 2), None


def attention_scores(query: Tensor, key: Tensor) -> Tensor:
    """Returns the products of scaled queries `[…, S, D]` and keys `[…, T, D]` in fp32, `[…, S, T]`.

    Those of a pretrained Qwen2-VL reach 67,614 before they are scaled, beyond fp16, and bf16 would round a score of
    6,000 by 16. Queries and keys in half precision are exact in TF32, so tensor cores can compute the products.
    """
    return torch.matmul(query.float(), key.float().transpose(-1, -2))


WIDE_SOFTMAX = "latte_flow_wide_softmax"
AttentionInterface.register(WIDE_SOFTMAX, wide_softmax_attention)


def wide_layer_norm(norm: nn.LayerNorm, hidden: Tensor) -> Tensor:
    """Layer normalisation in fp32, whatever the dtype of the weights."""
    return nn.functional.layer_norm(hidden, norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps)


def _layer_settings(config: Any) -> dict[str, Any]:
    """Returns the settings of a transformers config that a layer's graph depends on."""
    return {name: value for name, value in config.to_dict().items() if name not in PER_MODEL}
