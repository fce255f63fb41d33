"""LaTtE-Flow in PyTorch: the reference that every engine is compared with.

"LaTtE-Flow: Layerwise Timestep-Expert Flow-based Transformer" (arXiv 2506.06952). A frozen Qwen2-VL
encodes the prompt once; a second stack of L layers that mirrors its text layers predicts the velocity
of image latents. The stack is split into K groups of M = L / K layers, each the expert for one
interval of flow time, so a sampling step runs M layers. The authors published no code: this is an
independent implementation, and where the paper leaves a formula open the docstring says how we read it.

Shapes: B prompts, R rows (a guided image is two), P prefix tokens, N = H·W latent tokens, C latent
channels, D head dimension, Hq and Hkv query and key-value heads, T = P + N.

The prefix KV cache has one tensor per expert group, `[M, 2, R, Hkv, P, D]`: keys (already rotated) and
values of the VLM's layers of that group, padded on the right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Qwen2VLForConditionalGeneration

from latte.config import LatteFlowConfig
from latte.sampling import SampleStep, guided, sample
from runtime.errors import InputError
from runtime.flow_time import DEFAULT_GUIDANCE_SCALE, DEFAULT_SHIFT, DEFAULT_STEPS, initial_latents, time_grid

TIME_FREQUENCIES = 256


class TimestepEmbedding(nn.Module):
    """Sinusoids of 1000·t through a two-layer MLP: `[R]` to `[R, hidden]`, shared by all groups."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(TIME_FREQUENCIES, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, timestep: Tensor) -> Tensor:
        half = TIME_FREQUENCIES // 2
        exponents = torch.arange(half, dtype=torch.float32, device=timestep.device) / half
        angles = 1000.0 * timestep.float()[:, None] * torch.exp(-math.log(10_000.0) * exponents)
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.out_proj(F.silu(self.in_proj(sinusoids.to(self.in_proj.weight.dtype))))


class RMSNorm(nn.Module):
    """Root mean square normalisation, in fp32 (as Qwen2-VL's)."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(hidden.dtype)


def residual_attention_scores(query: Tensor, key: Tensor, previous: Tensor | None, gate: Tensor | None) -> Tensor:
    """Timestep-conditioned residual attention: S_l = Q·Kᵀ/√D + g_l(t) ⊙ S_{l−1}, before the softmax.

    The paper's abstract says that attention is handed from layer to layer, conditioned on the timestep,
    and fixes no formula. This is our reading: pre-softmax scores, inside one expert group, with one gate
    per head, g_l = tanh(W_l·silu(emb(t))) and W_l zero at the start, so that an untrained gate is neutral.

    Args:
        query: `[R, Hkv, G·N, D]`, the G query heads of a key-value head one after another.
        key: `[R, Hkv, T, D]`.
        previous: S_{l−1}, `[R, Hkv, G·N, T]`; None in the first layer of a group.
        gate: `[R, Hkv, G·N, 1]`; None in the first layer of a group.
    """
    scores = torch.matmul(query, key.transpose(-1, -2)) * query.shape[-1] ** -0.5
    if previous is not None and gate is not None:
        scores = scores + gate * previous
    return scores


class FlowLayer(nn.Module):
    """One Qwen2-VL text layer over the latents, modulated by the timestep (adaLN-single, arXiv 2310.00426).

    Weight names follow Qwen2-VL's, less the `self_attn.` and `mlp.` in between.
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
        self.post_attention_layernorm = RMSNorm(hidden, config.rms_norm_eps)
        self.gate_proj = nn.Linear(hidden, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, hidden, bias=False)
        self.scale_shift_table = nn.Parameter(torch.zeros(6, hidden))
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
        """One layer.

        Args:
            hidden: the residual stream, `[R, N, hidden]` float32 whatever the weights' dtype.
            time: silu of the timestep embedding, `[R, hidden]`.
            modulation: the shared part of adaLN-single, `[R, 6, hidden]`.
            rotary: cosines and sines of the latents' positions, each `[R, 1, N, D]` float32.
            prefix: rotated keys and values of the VLM's layer, `[2, R, Hkv, P, D]`.
            mask: True where a key may be seen, `[R, 1, 1, T]` bool.
            previous_scores: S_{l−1} or None.

        Returns:
            the new hidden states, and S_l.
        """
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (
            (modulation.float() + self.scale_shift_table).unsqueeze(2).unbind(1)
        )
        narrow = self.q_proj.weight.dtype
        normed = self.input_layernorm(hidden) * (1 + scale_1) + shift_1
        attended, scores = self._attend(normed.to(narrow), time, rotary, prefix, mask, previous_scores)
        hidden = hidden + (1 + gate_1) * attended
        normed = (self.post_attention_layernorm(hidden) * (1 + scale_2) + shift_2).to(narrow)
        mlp = self.down_proj(F.silu(self.gate_proj(normed)) * self.up_proj(normed))
        return hidden + (1 + gate_2) * mlp, scores

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
        query = self.q_proj(hidden).view(rows, tokens, self.num_heads, self.head_dim).transpose(1, 2)
        key = self.k_proj(hidden).view(rows, tokens, self.num_kv_heads, self.head_dim).transpose(1, 2)
        value = self.v_proj(hidden).view(rows, tokens, self.num_kv_heads, self.head_dim).transpose(1, 2)
        query = rotate(query, rotary).reshape(rows, self.num_kv_heads, heads_per_kv * tokens, self.head_dim)
        key = torch.cat([prefix[0], rotate(key, rotary)], dim=2)
        value = torch.cat([prefix[1], value], dim=2)
        gate = None
        if self.attention_gate is not None:
            gate = torch.tanh(self.attention_gate(time)).view(rows, self.num_kv_heads, heads_per_kv, 1, 1)
            gate = gate.expand(-1, -1, -1, tokens, -1).reshape(rows, self.num_kv_heads, heads_per_kv * tokens, 1)
        scores = residual_attention_scores(query, key, previous_scores, gate)
        weights = scores.float().masked_fill(~mask, torch.finfo(torch.float32).min).softmax(dim=-1).to(value.dtype)
        attended = torch.matmul(weights, value).view(rows, self.num_heads, tokens, self.head_dim)
        return self.o_proj(attended.transpose(1, 2).reshape(rows, tokens, -1)), scores


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding of `[R, heads, N, D]`, in fp32 (Qwen2-VL's half-split layout)."""
    cos, sin = rotary
    wide = x.float()
    left, right = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat([-right, left], dim=-1) * sin).to(x.dtype)


class VelocityHead(nn.Module):
    """Final norm, modulated by the timestep, and the projection to latent channels of one group."""

    def __init__(self, config: LatteFlowConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.modulation = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.latent_channels)

    def forward(self, hidden: Tensor, time: Tensor) -> Tensor:
        shift, scale = self.modulation(time).float().unsqueeze(1).chunk(2, dim=-1)
        return self.proj((self.norm(hidden) * (1 + scale) + shift).to(self.proj.weight.dtype))


class FlowTransformer(nn.Module):
    """The L flow layers in K expert groups, with what the groups share: embeddings of latents and time."""

    rotary_axes: Tensor
    rotary_frequencies: Tensor

    def __init__(self, config: LatteFlowConfig) -> None:
        super().__init__()
        self.config = config
        self.latent_embed = nn.Linear(config.latent_channels, config.hidden_size)
        self.time_embed = TimestepEmbedding(config.hidden_size)
        self.time_modulation = nn.Linear(config.hidden_size, 6 * config.hidden_size)
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
        """Neutral where training starts best from nothing: modulation, attention gates and velocity are zero."""
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
        """The velocity that one expert group predicts.

        Args:
            latents: x_t, `[R, C, H, W]`.
            timestep: t of each row, `[R]` float32 in [0, 1].
            prefix_kv: the group's prefix KV cache, `[M, 2, R, Hkv, P, D]`.
            prefix_mask: True for prompt tokens, False for padding on the right, `[R, P]` bool.
            group: which expert.

        Returns:
            v, `[R, C, H, W]`.
        """
        hidden, time, modulation, rotary, mask = self.embed(latents, timestep, prefix_mask)
        scores = None
        for index, layer in enumerate(self.config.layers_of(group)):
            hidden, scores = self.layers[layer](hidden, time, modulation, rotary, prefix_kv[index], mask, scores)
        return self.heads[group](hidden, time).transpose(1, 2).reshape(latents.shape)  # [R, N, C] to [R, C, H, W]

    def embed(
        self, latents: Tensor, timestep: Tensor, prefix_mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor], Tensor]:
        """Returns what the layers of every group take: `hidden`, `time`, `modulation`, `rotary` and `mask`."""
        rows, _, height, width = latents.shape
        embedding = self.latent_embed(latents.flatten(2).transpose(1, 2))  # [R, N, hidden]
        rows_of, columns_of = (torch.arange(size, device=latents.device).float() for size in (height, width))
        row = rows_of[:, None].expand(height, width).reshape(-1)  # [N]
        column = columns_of.expand(height, width).reshape(-1)  # [N]
        hidden = embedding.float() + self._position_embedding(row, column)
        time = F.silu(self.time_embed(timestep))  # [R, hidden]
        modulation = self.time_modulation(time).view(rows, 6, -1)
        rotary = self._rotary(prefix_mask, row, column)
        mask = torch.cat([prefix_mask, prefix_mask.new_ones(rows, height * width)], dim=1)[:, None, None]
        return hidden, time, modulation, rotary, mask  # mask: [R, 1, 1, T]

    def _rotary(self, prefix_mask: Tensor, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        """Returns cosines and sines, each `[R, 1, N, D]`, of the latents' M-RoPE positions.

        Latent (r, c) has the position (p, p + r, p + c), p being the length of its own prompt.
        """
        offsets = torch.stack([torch.zeros_like(row), row, column], dim=-1)  # [N, 3]
        lengths = prefix_mask.sum(dim=1, dtype=torch.float32)  # [R]
        positions = lengths[:, None, None] + offsets  # [R, N, 3]
        angles = positions.index_select(-1, self.rotary_axes) * self.rotary_frequencies  # [R, N, D / 2]
        angles = torch.cat([angles, angles], dim=-1)[:, None]
        return angles.cos(), angles.sin()

    def _position_embedding(self, row: Tensor, column: Tensor) -> Tensor:
        """Returns a fixed 2-D sine-cosine embedding of (row, column), `[N, hidden]` float32.

        Rotary positions are relative. With few layers in an expert, "at the top left" is learned much sooner if each
        latent also has its absolute position.
        """
        quarter = self.config.hidden_size // 4
        exponents = torch.arange(quarter, dtype=torch.float32, device=row.device) / quarter
        frequencies = torch.exp(-math.log(100.0) * exponents)
        angles = torch.stack([row, column], dim=-1)[..., None] * frequencies  # [N, 2, hidden / 4]
        return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)


@dataclass(frozen=True)
class Prefix:
    """Encoded prompts: what the flow layers read of the VLM."""

    kv: tuple[Tensor, ...]
    """One tensor per expert group, `[M, 2, B, Hkv, P, D]`."""
    mask: Tensor
    """True for prompt tokens, `[B, P]` bool."""

    def rows(self, indices: Sequence[int]) -> Prefix:
        """The prefix of some rows, in the order given."""
        index = torch.tensor(list(indices), device=self.mask.device)
        return Prefix(tuple(kv.index_select(2, index) for kv in self.kv), self.mask.index_select(0, index))


class LatteFlow(nn.Module):
    """A whole checkpoint: the frozen VLM, the flow transformer and the autoencoder."""

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

    def tokenize(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of each prompt as the one user turn of the VLM's chat template.

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
        """Runs the VLM over prompts, once for all sampling steps."""
        rows = self.tokenize(prompts)
        device = self.latents_mean.device
        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id or 0
        input_ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids in rows], device=device)
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in rows], device=device)
        return self.encode_tokens(input_ids, mask)

    def encode_tokens(self, input_ids: Tensor, mask: Tensor) -> Prefix:
        """The prefix of token ids `[B, P]` int64, padded on the right where `mask` `[B, P]` is 0."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand(3, *input_ids.shape)
        cache = self.vlm.model.language_model(
            input_ids=input_ids, attention_mask=mask, position_ids=positions, use_cache=True
        ).past_key_values
        layers = [torch.stack([layer.keys, layer.values]) for layer in cache.layers]
        groups = range(self.config.schedule.num_groups)
        kv = tuple(torch.stack([layers[layer] for layer in self.config.layers_of(group)]) for group in groups)
        return Prefix(kv, mask.bool())

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Latents `[B, C, H, W]` of pixels `[B, 3, height, width]` in [-1, 1]."""
        return (self.vae.encode(pixels).latent - self.latents_mean) / self.latents_std

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images `[B, height, width, 3]` uint8 of latents `[B, C, H, W]`."""
        pixels = self.vae.decode(latents * self.latents_std + self.latents_mean).sample
        return pixels_to_uint8(pixels)

    @torch.no_grad()
    def generate(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] = "",
        num_inference_steps: int = DEFAULT_STEPS,
        guidance_scale: float | Sequence[float] = DEFAULT_GUIDANCE_SCALE,
        seed: int | Sequence[int] = 0,
        latents: Tensor | None = None,
        solver: str = "euler",
        shift: float = DEFAULT_SHIFT,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        output_type: str = "np",
        callback_on_step_end: Callable[[SampleStep], None] | None = None,
    ) -> np.ndarray:
        """Images of prompts, one for each.

        Args:
            negative_prompt: what guidance leads away from; one for all or one for each.
            guidance_scale: s in v = v_u + s·(v_c − v_u); 1 runs no unconditional row.
            seed: of each image; an int s gives s, s + 1, …
            latents: x₀ `[B, C, H, W]` float32 instead of noise from `seed`.
            solver: "euler" or "heun".
            shift: of the time grid, see `time_grid`.
            guidance_interval: [start, end) of the times with guidance (arXiv 2404.07724); elsewhere the scale is 1.
            output_type: "np" for `[B, height, width, 3]` uint8, "latent" for `[B, C, H, W]` float32.
            callback_on_step_end: sees every step.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else list(negative_prompt)
        scales = torch.tensor(guidance_scale, dtype=torch.float32).expand(len(prompts))
        device = self.latents_mean.device
        if latents is None:
            seeds = [seed + i for i in range(len(prompts))] if isinstance(seed, int) else list(seed)
            latents = torch.from_numpy(initial_latents(seeds, (self.config.latent_channels, *self.config.latent_size)))
        guided_rows = [i for i, scale in enumerate(scales.tolist()) if scale != 1.0]
        prefix = self.encode_prompts([*prompts, *(negatives[i] for i in guided_rows)])
        conditioned = range(len(prompts))

        def velocity(x: Tensor, t: float, group: int) -> Tensor:
            led = guided_rows if guidance_interval[0] <= t < guidance_interval[1] else []
            rows = x[[*conditioned, *led]]
            times = torch.full((len(rows),), t, device=device)
            v = self.flow(rows, times, prefix.kv[group][:, :, : len(rows)], prefix.mask[: len(rows)], group)
            return guided(v[: len(prompts)], v[len(prompts) :], led, scales.to(device))

        times = time_grid(num_inference_steps, shift)
        result = sample(velocity, latents.to(device), times, self.config.schedule, solver, callback_on_step_end)
        if output_type == "latent":
            return result.cpu().numpy()
        return self.decode_latents(result).cpu().numpy()


def pixels_to_uint8(pixels: Tensor) -> Tensor:
    """`[B, 3, height, width]` in [-1, 1] to `[B, height, width, 3]` uint8, rounded to nearest."""
    return pixels.permute(0, 2, 3, 1).float().add(1.0).mul(127.5).clamp(0.0, 255.0).round().to(torch.uint8)
