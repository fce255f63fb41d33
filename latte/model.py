"""LaTtE-Flow in PyTorch: the reference model that all engines are compared with.

"LaTtE-Flow: Layerwise Timestep-Expert Flow-based Transformer" (arXiv 2506.06952). A frozen Qwen2-VL encodes the prompt
once; a second stack of L layers, which mirrors its text layers, predicts the velocity of image latents. The stack is
split into K expert groups of M = L / K layers. Each group serves one interval of flow time, so a sampling step runs M
layers. The authors published no code: this is an independent implementation, and where the paper leaves a formula open,
a docstring states the interpretation.

Shapes: B prompts or images, R rows (a guided image has two), P prefix tokens, H and W height and width in latents,
N = H*W latent tokens, T = N + P, C latent channels, D head dimension, Hq query heads, Hkv key-value heads,
G = Hq / Hkv query heads per key-value head. `hidden` is the width of the layers.

The prefix KV cache has one tensor per expert group, `[M, 2, R, Hkv, P, D]`: the rotated keys and the values of the
VLM's layers of that group, padded on the right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from latte.config import LatteFlowConfig
from latte.sampling import SampleStep, guided, sample
from runtime.arguments import numbers_for_each, seeds_for_each, text_for_each, text_list
from runtime.errors import InputError
from runtime.flow_time import (
    check_finite,
    check_guidance_scale,
    check_moved,
    check_seeds,
    initial_latents,
    time_grid,
)

if TYPE_CHECKING:  # the flow transformer needs neither, and machines with a GPU may have PyTorch only
    from diffusers import AutoencoderDC
    from transformers import PreTrainedTokenizerBase, Qwen2VLForConditionalGeneration

TIME_FREQUENCIES = 256
"""Size of the sinusoidal embedding of time, F: F/2 cosines, then F/2 sines."""


class TimestepEmbedding(nn.Module):
    """Embeds flow times: sinusoids of 1000·t, then a two-layer MLP; `[R]` to `[R, hidden]`. All groups share it."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(TIME_FREQUENCIES, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, timestep: Tensor) -> Tensor:
        half = TIME_FREQUENCIES // 2
        exponents = torch.arange(half, dtype=torch.float32, device=timestep.device) / half
        angles = 1000.0 * timestep.float()[:, None] * torch.exp(-math.log(10_000.0) * exponents)  # [R, F/2]
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=-1)  # [R, F]
        return self.out_proj(F.silu(self.in_proj(sinusoids.to(self.in_proj.weight.dtype))))


class RMSNorm(nn.Module):
    """Root mean square normalisation over the last axis, computed in fp32 as in Qwen2-VL."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(hidden.dtype)


def residual_attention_scores(
    query: Tensor, prefix_key: Tensor, key: Tensor, previous: Tensor | None, gate: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns the scores of timestep-conditioned residual attention.

    The scores of latents with latents are S_l = Q·Kᵀ/√D + g_l(t) ⊙ S_{l−1}; those of latents with the prompt are
    Q·Kᵀ/√D. The authors' figure hands the map of latents with latents from layer to layer, with a gate per head that
    depends on the timestep. Our reading: the map is that before the softmax, it is handed on inside an expert group,
    and the gate is g_l = tanh(W_l·silu(emb(t))), with W_l = 0 at initialisation, so that an untrained gate is neutral.

    Scores are fp32, since products of keys as large as a pretrained VLM's are beyond fp16.

    Args:
        query: Q, `[R, Hkv, G*N, D]`; the G query heads of a key-value head are consecutive.
        prefix_key: keys of the prompt, `[R, Hkv, P, D]`.
        key: keys of the latents, `[R, Hkv, N, D]`.
        previous: S_{l−1}, `[R, Hkv, G*N, N]` float32; None in the first layer of a group.
        gate: g_l, `[R, Hkv, G*N, 1]`; None in the first layer of a group.

    Returns:
        all scores before the softmax, `[R, Hkv, G*N, T]` float32, and S_l, `[R, Hkv, G*N, N]` float32.
    """
    query = query.float() * query.shape[-1] ** -0.5
    context = _fp32_product(query, prefix_key.float().transpose(-1, -2))  # [R, Hkv, G*N, P]
    scores = _fp32_product(query, key.float().transpose(-1, -2))  # [R, Hkv, G*N, N]
    if previous is not None and gate is not None:
        scores = scores + gate.float() * previous
    return torch.cat([scores, context], dim=-1), scores


def _fp32_product(left: Tensor, right: Tensor) -> Tensor:
    """Returns the matrix product in fp32 under autocast too, which would make it half precision."""
    device = left.device.type
    if not torch.is_autocast_enabled(device):
        return torch.matmul(left, right)
    with torch.autocast(device, enabled=False):
        return torch.matmul(left, right)


class FlowLayer(nn.Module):
    """A Qwen2-VL text layer on latent tokens, with the norms and the modulation of the authors' figure.

    Each half has a norm before and a norm after. Time gives four vectors: a scale after attention, a scale and a shift
    before the feed-forward, and a scale after it. They are computed as in adaLN-single (arXiv 2310.00426); scales are
    1 + s, so that a table of zeros is neutral (our reading). Weight names are Qwen2-VL's without `self_attn.` and
    `mlp.`.
    """

    def __init__(self, config: LatteFlowConfig, first_of_group: bool) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        hidden, kv_size = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.input_layernorm = RMSNorm(hidden, config.rms_norm_eps)
        self.q_proj = nn.Linear(hidden, hidden)
        self.k_proj = nn.Linear(hidden, kv_size)
        self.v_proj = nn.Linear(hidden, kv_size)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)
        self.attention_norm = RMSNorm(hidden, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(hidden, config.rms_norm_eps)
        self.gate_proj = nn.Linear(hidden, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, hidden, bias=False)
        self.feed_forward_norm = RMSNorm(hidden, config.rms_norm_eps)
        self.scale_shift_table = nn.Parameter(torch.zeros(4, hidden))
        self.attention_gate = None if first_of_group else nn.Linear(hidden, config.num_attention_heads, bias=False)

    def forward(
        self,
        hidden: Tensor,
        time: Tensor,
        modulation: Tensor,
        rotary: tuple[Tensor, Tensor],
        prefix: Tensor,
        mask: Tensor,
        previous_scores: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Runs the layer.

        Args:
            hidden: the residual stream, `[R, N, hidden]`; float32, whatever the dtype of the weights.
            time: silu of the timestep embedding, `[R, hidden]` in the dtype of the weights.
            modulation: the part of adaLN-single that all layers share, `[R, 4, hidden]`.
            rotary: cosines and sines of the latents' positions, each `[R, 1, N, D]` float32.
            prefix: the rotated keys and the values of the VLM's layer, `[2, R, Hkv, P, D]`.
            mask: True for visible keys, `[R, 1, 1, T]` bool.
            previous_scores: S_{l−1}, `[R, Hkv, G*N, N]` float32; None in the first layer of a group.

        Returns:
            the new residual stream, `[R, N, hidden]` float32, and S_l, `[R, Hkv, G*N, N]` float32.
        """
        attention_scale, shift, scale, feed_forward_scale = (
            (modulation.float() + self.scale_shift_table).unsqueeze(2).unbind(1)
        )  # each [R, 1, hidden]
        narrow = self.q_proj.weight.dtype
        normed = self.input_layernorm(hidden).to(narrow)  # [R, N, hidden]
        attended, scores = self._attend(normed, time, rotary, prefix, mask, previous_scores)
        hidden = hidden + (1 + attention_scale) * self.attention_norm(attended.float())
        normed = (self.post_attention_layernorm(hidden) * (1 + scale) + shift).to(narrow)
        fed = self.down_proj(F.silu(self.gate_proj(normed)) * self.up_proj(normed))  # [R, N, hidden]
        return hidden + (1 + feed_forward_scale) * self.feed_forward_norm(fed.float()), scores

    def _attend(
        self,
        hidden: Tensor,
        time: Tensor,
        rotary: tuple[Tensor, Tensor],
        prefix: Tensor,
        mask: Tensor,
        previous_scores: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        rows, tokens, _ = hidden.shape
        heads_per_kv = self.num_heads // self.num_kv_heads
        # query: [R, Hq, N, D]; key and value: [R, Hkv, N, D]
        query = self.q_proj(hidden).view(rows, tokens, self.num_heads, self.head_dim).transpose(1, 2)
        key = self.k_proj(hidden).view(rows, tokens, self.num_kv_heads, self.head_dim).transpose(1, 2)
        value = self.v_proj(hidden).view(rows, tokens, self.num_kv_heads, self.head_dim).transpose(1, 2)
        # Grouped queries, [R, Hkv, G*N, D], so that keys and values need not be repeated for each query head.
        query = rotate(query, rotary).reshape(rows, self.num_kv_heads, heads_per_kv * tokens, self.head_dim)
        key = rotate(key, rotary)  # [R, Hkv, N, D]
        # The prefix comes last, so that its padding is at the end, where it does not even change how sums are rounded.
        value = torch.cat([value, prefix[1]], dim=2)  # [R, Hkv, T, D]
        gate = None
        if self.attention_gate is not None:
            # [R, Hq] -> [R, Hkv, G, 1, 1] -> [R, Hkv, G*N, 1]
            gate = torch.tanh(self.attention_gate(time)).view(rows, self.num_kv_heads, heads_per_kv, 1, 1)
            gate = gate.expand(-1, -1, -1, tokens, -1).reshape(rows, self.num_kv_heads, heads_per_kv * tokens, 1)
        # [R, Hkv, G*N, T] and [R, Hkv, G*N, N]
        logits, scores = residual_attention_scores(query, prefix[0], key, previous_scores, gate)
        weights = logits.masked_fill(~mask, torch.finfo(torch.float32).min).softmax(dim=-1).to(value.dtype)
        # [R, Hkv, G*N, D] -> [R, Hq, N, D]
        attended = torch.matmul(weights, value).view(rows, self.num_heads, tokens, self.head_dim)
        # [R, Hq, N, D] -> [R, N, hidden]
        return self.o_proj(attended.transpose(1, 2).reshape(rows, tokens, -1)), scores


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Applies rotary position embedding to `[R, heads, N, D]` in fp32, in Qwen2-VL's half-split layout.

    Args:
        rotary: cosines and sines, each `[R, 1, N, D]` float32.
    """
    cos, sin = rotary
    wide = x.float()
    left, right = wide.chunk(2, dim=-1)  # each [R, heads, N, D/2]
    return (wide * cos + torch.cat([-right, left], dim=-1) * sin).to(x.dtype)


class VelocityHead(nn.Module):
    """The end of an expert group: a norm modulated by the timestep, and the projection to latent channels."""

    def __init__(self, config: LatteFlowConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.modulation = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.latent_channels)

    def forward(self, hidden: Tensor, time: Tensor) -> Tensor:
        shift, scale = self.modulation(time).float().unsqueeze(1).chunk(2, dim=-1)  # each [R, 1, hidden]
        return self.proj((self.norm(hidden) * (1 + scale) + shift).to(self.proj.weight.dtype))  # [R, N, C]


class FlowTransformer(nn.Module):
    """The L flow layers in K expert groups, with the embeddings of latents and time that all groups share."""

    rotary_axes: Tensor
    rotary_frequencies: Tensor

    def __init__(self, config: LatteFlowConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        """Whether the backward pass computes activations again instead of keeping them."""
        self.latent_embed = nn.Linear(config.latent_channels, config.hidden_size)
        self.time_embed = TimestepEmbedding(config.hidden_size)
        self.time_modulation = nn.Linear(config.hidden_size, 4 * config.hidden_size)
        groups = range(config.schedule.num_groups)
        firsts = {config.layers_of(group)[0] for group in groups}
        self.layers = nn.ModuleList(FlowLayer(config, layer in firsts) for layer in range(config.num_hidden_layers))
        self.heads = nn.ModuleList(VelocityHead(config) for _ in groups)
        axes = [axis for axis, size in enumerate(config.mrope_section) for _ in range(size)]
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        self.register_buffer("rotary_axes", torch.tensor(axes), persistent=False)
        self.register_buffer("rotary_frequencies", config.rope_theta**-exponents, persistent=False)
        self.initialize()

    def initialize(self) -> None:
        """Initialises linear layers at random, but modulation, attention gates and the velocity at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        neutral = ("time_modulation", "attention_gate", "modulation", "proj")
        for name, module in self.named_modules():
            if name.startswith(("time_modulation", "layers", "heads")) and name.rpartition(".")[2] in neutral:
                nn.init.zeros_(module.get_parameter("weight"))
        nn.init.normal_(self.latent_embed.weight, std=self.config.latent_channels**-0.5)

    def forward(self, latents: Tensor, timestep: Tensor, prefix_kv: Tensor, prefix_mask: Tensor, group: int) -> Tensor:
        """Predicts the velocity with one expert group.

        Args:
            latents: x_t, `[R, C, H, W]` in the dtype of the weights.
            timestep: flow time t of each row, `[R]` float32 in [0, 1].
            prefix_kv: the group's prefix KV cache, `[M, 2, R, Hkv, P, D]`.
            prefix_mask: True for prompt tokens, False for padding on the right, `[R, P]` bool.
            group: index of the expert group.

        Returns:
            v, `[R, C, H, W]` in the dtype of the weights.
        """
        hidden, time, modulation, rotary, mask = self.embed(latents, timestep, prefix_mask)
        scores = None
        for index, layer in enumerate(self.config.layers_of(group)):
            arguments = (hidden, time, modulation, rotary, prefix_kv[index], mask, scores)
            if self.gradient_checkpointing:
                hidden, scores = checkpoint(self.layers[layer], *arguments, use_reentrant=False)
            else:
                hidden, scores = self.layers[layer](*arguments)
        return self.heads[group](hidden, time).transpose(1, 2).reshape(latents.shape)  # [R, N, C] -> [R, C, H, W]

    def embed(
        self, latents: Tensor, timestep: Tensor, prefix_mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor], Tensor]:
        """Returns hidden, time, modulation, rotary and mask for a group's first layer; see `FlowLayer.forward`."""
        rows, _, height, width = latents.shape
        embedding = self.latent_embed(latents.flatten(2).transpose(1, 2))  # [R, N, hidden]
        rows_of, columns_of = (torch.arange(size, device=latents.device).float() for size in (height, width))
        row = rows_of[:, None].expand(height, width).reshape(-1)  # [N]
        column = columns_of.expand(height, width).reshape(-1)  # [N]
        hidden = embedding.float() + self._position_embedding(row, column)
        time = F.silu(self.time_embed(timestep))  # [R, hidden]
        modulation = self.time_modulation(time).view(rows, 4, -1)  # [R, 4, hidden]
        rotary = self._rotary(prefix_mask, row, column)  # each [R, 1, N, D]
        # [R, T] -> [R, 1, 1, T]
        mask = torch.cat([prefix_mask.new_ones(rows, height * width), prefix_mask], dim=1)[:, None, None]
        return hidden, time, modulation, rotary, mask

    def _rotary(self, prefix_mask: Tensor, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the cosines and sines of the latents' M-RoPE positions, each `[R, 1, N, D]` float32.

        The latent at (row r, column c) has position (p, p + r, p + c), where p is the length of its row's prompt.
        """
        offsets = torch.stack([torch.zeros_like(row), row, column], dim=-1)  # [N, 3]
        lengths = prefix_mask.sum(dim=1, dtype=torch.float32)  # [R]
        positions = lengths[:, None, None] + offsets  # [R, N, 3]
        angles = positions.index_select(-1, self.rotary_axes) * self.rotary_frequencies  # [R, N, D/2]
        angles = torch.cat([angles, angles], dim=-1)[:, None]  # [R, 1, N, D]
        return angles.cos(), angles.sin()

    def _position_embedding(self, row: Tensor, column: Tensor) -> Tensor:
        """Returns a fixed 2-D sine-cosine embedding of (row, column), `[N, hidden]` float32.

        Rotary positions are relative. In an expert group of few layers, absolute places such as "at the top left" are
        learned much sooner if each latent also carries its absolute position.
        """
        quarter = self.config.hidden_size // 4
        exponents = torch.arange(quarter, dtype=torch.float32, device=row.device) / quarter
        frequencies = torch.exp(-math.log(100.0) * exponents)
        angles = torch.stack([row, column], dim=-1)[..., None] * frequencies  # [N, 2, hidden/4]
        return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)  # [N, 2, hidden/2] -> [N, hidden]


def group_of_weight(name: str, config: LatteFlowConfig) -> int | None:
    """Returns the expert group that a weight of the flow layers belongs to; None for embeddings, which all share."""
    part, _, rest = name.partition(".")
    if part not in ("layers", "heads"):
        return None
    number = int(rest.partition(".")[0])
    return number if part == "heads" else number // config.layers_per_group


@dataclass(frozen=True)
class Prefix:
    """Encoded prompts: the VLM's keys and values, which the flow layers attend to."""

    kv: tuple[Tensor, ...]
    """The rotated keys and the values: one tensor per expert group, `[M, 2, B, Hkv, P, D]`."""
    mask: Tensor
    """True for prompt tokens, `[B, P]` bool."""

    def rows(self, indices: Sequence[int]) -> Prefix:
        """Returns the prefix of the given rows, in that order."""
        index = torch.tensor(list(indices), device=self.mask.device)
        return Prefix(tuple(kv.index_select(2, index) for kv in self.kv), self.mask.index_select(0, index))


class LatteFlow(nn.Module):
    """The whole model of a checkpoint: the frozen VLM, the flow transformer and the frozen autoencoder."""

    latents_mean: Tensor
    latents_std: Tensor

    def __init__(
        self,
        config: LatteFlowConfig,
        flow: FlowTransformer,
        vlm: Qwen2VLForConditionalGeneration,
        vae: AutoencoderDC,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        super().__init__()
        self.config = config
        self.flow = flow
        self.vlm = vlm.requires_grad_(False)
        self.vae = vae.requires_grad_(False)
        self.tokenizer = tokenizer
        shape = (1, config.latent_channels, 1, 1)
        self.register_buffer("latents_mean", torch.tensor(config.latents_mean).view(shape), persistent=False)
        self.register_buffer("latents_std", torch.tensor(config.latents_std).view(shape), persistent=False)

    def set_latents_statistics(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Sets the mean and the standard deviation of each latent channel, with which latents are normalised."""
        update = {"latents_mean": tuple(mean), "latents_std": tuple(std)}
        self.config = self.config.model_copy(update=update)
        for name, values in update.items():
            buffer = self.get_buffer(name)
            buffer.copy_(torch.tensor(values).view(buffer.shape))

    def tokenize(self, prompts: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of each prompt, as the only user message in the VLM's chat template.

        Raises:
            InputError: a prompt is longer than the model's limit.
        """
        rows = []
        for prompt in prompts:
            message = [{"role": "user", "content": prompt}]
            text = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) > self.config.max_prompt_tokens:
                raise InputError(
                    f"a prompt has {len(ids)} tokens in its chat template, the model's limit is "
                    f"{self.config.max_prompt_tokens}; shorten it"
                )
            rows.append(ids)
        return rows

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Prefix:
        """Encodes prompts with the VLM, once for all sampling steps.

        Raises:
            InputError: a prompt is longer than the model's limit.
        """
        return self.encode_token_rows(self.tokenize(prompts))

    @torch.no_grad()
    def encode_token_rows(self, rows: Sequence[Sequence[int]]) -> Prefix:
        """Encodes the token ids of prompts, see `tokenize`."""
        device = self.latents_mean.device
        return self.encode_tokens(*(part.to(device) for part in self.pad(rows)))

    def pad(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Returns token ids padded on the right, and their mask with 1 for tokens; both `[B, P]` int64, on the CPU."""
        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id or 0
        input_ids = torch.tensor([[*ids, *[pad] * (width - len(ids))] for ids in rows])
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in rows])
        return input_ids, mask

    def encode_tokens(self, input_ids: Tensor, mask: Tensor, positions: Tensor | None = None) -> Prefix:
        """Returns the prefix of token ids.

        Args:
            input_ids: `[B, P]` int64, padded on the right.
            mask: 1 for tokens, 0 for padding, `[B, P]` int64.
            positions: M-RoPE positions, `[3, B, P]` int64; by default 0, 1, …
        """
        if positions is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand(3, *input_ids.shape)
        cache = self.vlm.model.language_model(
            input_ids=input_ids, attention_mask=mask, position_ids=positions, use_cache=True
        ).past_key_values
        layers = [torch.stack([layer.keys, layer.values]) for layer in cache.layers]  # each [2, B, Hkv, P, D]
        groups = range(self.config.schedule.num_groups)
        # One [M, 2, B, Hkv, P, D] per group.
        kv = tuple(torch.stack([layers[layer] for layer in self.config.layers_of(group)]) for group in groups)
        return Prefix(kv, mask.bool())

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Encodes pixels `[B, 3, height, width]` in [-1, 1] as normalised latents, `[B, C, H, W]`."""
        return self.normalize_latents(self.vae.encode(pixels).latent)

    def normalize_latents(self, encoded: Tensor) -> Tensor:
        """Normalises what the autoencoder makes of images, `[B, C, H, W]`."""
        return (encoded - self.latents_mean) / self.latents_std

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Decodes normalised latents `[B, C, H, W]` to images, `[B, height, width, 3]` uint8."""
        encoded = (latents * self.latents_std + self.latents_mean).to(self.vae.dtype)
        pixels = self.vae.decode(encoded).sample  # [B, 3, height, width]
        return pixels_to_uint8(pixels)

    @torch.no_grad()
    def generate(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] = "",
        num_inference_steps: int | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        seed: int | Sequence[int] = 0,
        latents: Tensor | None = None,
        solver: str = "euler",
        shift: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        output_type: str = "np",
        callback_on_step_end: Callable[[SampleStep], None] | None = None,
    ) -> np.ndarray:
        """Generates one image for each prompt.

        Args:
            prompt: what the images should show.
            negative_prompt: what the images should not show; one for all images, or one for each.
            num_inference_steps: number of sampling steps; by default the config's, like guidance scale and shift.
            guidance_scale: s in v = v_u + s·(v_c − v_u); one for all images, or one for each. 1 disables guidance.
            seed: seed of each image's noise; an int s means s, s + 1, …
            latents: x₀, `[B, C, H, W]` float32; by default noise from `seed`.
            solver: "euler" or "heun".
            shift: time-grid shift, see `time_grid`.
            guidance_interval: flow times [start, end) with guidance (arXiv 2404.07724); elsewhere the scale is 1. By
                default the config's.
            output_type: "np" or "latent".
            callback_on_step_end: called after each step.

        Returns:
            images, `[B, height, width, 3]` uint8; with `output_type="latent"`, latents, `[B, C, H, W]` float32.

        Raises:
            InputError: an argument cannot work, such as a prompt that is too long or a list of another length.
            EngineError: the latents are not finite, or the flow layers are untrained.
        """
        prompts = text_list("prompt", prompt)
        negatives = text_for_each("negative_prompt", negative_prompt, len(prompts))
        defaults = self.config.sampling.guided_in(guidance_interval)
        scale = defaults.guidance_scale if guidance_scale is None else guidance_scale
        scale_list = numbers_for_each("guidance_scale", scale, len(prompts))
        seeds = seeds_for_each("seed", seed, len(prompts))
        if output_type not in ("np", "latent"):
            raise InputError(f'output_type must be "np" or "latent", got {output_type!r}')
        samplings = [
            defaults.choose(num_inference_steps, scale, shift, negative)
            for scale, negative in zip(scale_list, negatives, strict=True)
        ]
        for sampling in samplings:
            check_guidance_scale(sampling.guidance_scale)
        check_seeds(seeds)
        if latents is None:
            latents = torch.from_numpy(initial_latents(seeds, (self.config.latent_channels, *self.config.latent_size)))
        result = self.sample(
            prompts,
            negatives,
            [1.0 if defaults.guidance_distilled else sampling.guidance_scale for sampling in samplings],
            latents,
            time_grid(samplings[0].num_inference_steps, samplings[0].shift),
            solver,
            defaults.guidance_interval,
            callback_on_step_end,
        )
        on_host = result.float().cpu().numpy()
        check_finite(on_host)
        check_moved(latents.float().cpu().numpy(), on_host)
        if output_type == "latent":
            return result.cpu().numpy()
        return self.decode_latents(result).cpu().numpy()

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        negative_prompts: Sequence[str],
        guidance_scales: Sequence[float],
        latents: Tensor,
        times: Sequence[float],
        solver: str = "euler",
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        callback_on_step_end: Callable[[SampleStep], None] | None = None,
    ) -> Tensor:
        """Samples along any time grid with any guidance, whatever the weights are meant for; see `generate`.

        Args:
            prompts, negative_prompts, guidance_scales: one of each for each image. With a scale of 1 an image has one
                row.
            latents: x₀, `[B, C, H, W]` float32.

        Returns:
            the last latents, `[B, C, H, W]` float32.
        """
        device, dtype = self.latents_mean.device, self.flow.latent_embed.weight.dtype
        scales = torch.tensor(guidance_scales, dtype=torch.float32)
        guided_rows = [i for i, scale in enumerate(guidance_scales) if scale != 1.0]
        prefix = self.encode_prompts([*prompts, *(negative_prompts[i] for i in guided_rows)])
        conditioned = range(len(prompts))

        def velocity(x: Tensor, t: float, group: int) -> Tensor:
            led = guided_rows if guidance_interval[0] <= t < guidance_interval[1] else []
            rows = x[[*conditioned, *led]]  # [R, C, H, W]
            at = torch.full((len(rows),), t, device=device)
            kv, mask = prefix.kv[group][:, :, : len(rows)], prefix.mask[: len(rows)]
            v = self.flow(rows.to(dtype), at, kv, mask, group).float()
            return guided(v[: len(prompts)], v[len(prompts) :], led, scales.to(device))  # [B, C, H, W]

        return sample(velocity, latents.to(device), times, self.config.schedule, solver, callback_on_step_end)


def pixels_to_uint8(pixels: Tensor) -> Tensor:
    """Converts pixels `[B, 3, height, width]` in [-1, 1] to `[B, height, width, 3]` uint8, rounded to nearest."""
    return pixels.permute(0, 2, 3, 1).float().add(1.0).mul(127.5).clamp(0.0, 255.0).round().to(torch.uint8)
