"""The experts and their twins in PyTorch, as they run on a GPU: eager, compiled, and as CUDA graphs.

Weights are random, and made on the device. A step is everything that happens between two latents: the rows of guidance,
the velocity, guidance and Euler's update. Only PyTorch is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.benchmarks.limits import PREFIX_TOKENS, ROWS_PER_IMAGE, Limits
from latte.config import LatteFlowConfig
from latte.model import FlowTransformer, RMSNorm, rotate
from latte.precision import TORCH_DTYPES, cast_parameters
from runtime.stopwatch import wall_time

Mode = Literal["eager", "CUDA graph", "compiled", "compiled, CUDA graph"]
Run = Callable[[], object]
GUIDANCE_SCALE, STEP_SIZE = 3.0, 1 / 40
WARM_UPS = 3
"""Runs before a capture, as PyTorch asks for."""
ZERO_AT_FIRST = 0.02
"""Standard deviation of what a model begins with at zero, so that a velocity depends on every weight."""
GEMM_SIDE = {"cuda": 8192, "cpu": 256}
COPIED_BYTES = {"cuda": 1 << 30, "cpu": 1 << 24}


class GuidedStep(nn.Module):
    """One sampling step of an expert group."""

    def __init__(self, flow: FlowTransformer, group: int) -> None:
        super().__init__()
        self.flow = flow
        self.group = group

    def forward(self, latents: Tensor, timestep: Tensor, prefix_kv: Tensor, prefix_mask: Tensor) -> Tensor:
        """Returns the next latents.

        Args:
            latents: `[B, C, H, W]` float32.
            timestep: `[2B]` float32.
            prefix_kv: of the conditional rows, then of the others, `[M, 2, 2B, Hkv, P, D]`.
            prefix_mask: `[2B, P]` bool.
        """
        rows = latents.repeat(ROWS_PER_IMAGE, 1, 1, 1).to(prefix_kv.dtype)
        conditional, other = self.flow(rows, timestep, prefix_kv, prefix_mask, self.group).float().chunk(2)
        return latents + STEP_SIZE * (other + GUIDANCE_SCALE * (conditional - other))


class TokenLayer(nn.Module):
    """A Qwen2-VL text layer that writes keys and values into memory of fixed capacity."""

    def __init__(self, config: LatteFlowConfig) -> None:
        super().__init__()
        hidden, kv_size = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.input_norm = RMSNorm(hidden, config.rms_norm_eps)
        self.qkv_proj = nn.Linear(hidden, hidden + 2 * kv_size)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)
        self.output_norm = RMSNorm(hidden, config.rms_norm_eps)
        self.gate_up_proj = nn.Linear(hidden, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, hidden, bias=False)

    def forward(
        self, hidden: Tensor, kv: Tensor, places: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor
    ) -> Tensor:
        rows, tokens, _ = hidden.shape
        heads = self.qkv_proj(self.input_norm(hidden)).view(rows, tokens, -1, self.head_dim).transpose(1, 2)
        query, key, value = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=1)  # [R, heads, S, D]
        kv[0].index_copy_(2, places, rotate(key, rotary))
        kv[1].index_copy_(2, places, value)
        query = rotate(query, rotary)
        attended = F.scaled_dot_product_attention(query, kv[0], kv[1], attn_mask=mask, enable_gqa=True)
        hidden = hidden + self.o_proj(attended.transpose(1, 2).reshape(rows, tokens, -1))
        gate, up = self.gate_up_proj(self.output_norm(hidden)).chunk(2, dim=-1)
        return hidden + self.down_proj(F.silu(gate) * up)


class TokenTwin(nn.Module):
    """An autoregressive model of the same layers, which writes image tokens (arXiv 2410.13848).

    It is given every advantage: keys and values in place, fused projections and attention, greedy tokens on the device.
    """

    def __init__(self, config: LatteFlowConfig, vocabulary: int) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(vocabulary, config.hidden_size)
        self.layers = nn.ModuleList(TokenLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, vocabulary, bias=False)

    def forward(self, tokens: Tensor, places: Tensor, kv: Tensor) -> Tensor:
        """Returns the next token of every image.

        Args:
            tokens: `[R, S]` int64, the conditional rows first.
            places: where the tokens are, `[S]` int64.
            kv: `[L, 2, R, Hkv, T, D]`; those of the tokens are written.
        """
        half = self.config.head_dim // 2
        exponents = torch.arange(half, device=tokens.device) / half
        angles = places[:, None] * self.config.rope_theta**-exponents  # [S, D/2]
        angles = torch.cat([angles, angles], dim=-1)[None, None]  # [1, 1, S, D]
        mask = torch.arange(kv.shape[4], device=tokens.device) <= places[:, None]  # [S, T]
        hidden = self.embed(tokens)
        for layer, layer_kv in zip(self.layers, kv, strict=True):
            hidden = layer(hidden, layer_kv, places, (angles.cos(), angles.sin()), mask)
        conditional, other = self.head(self.norm(hidden[:, -1])).float().chunk(2)
        return (other + GUIDANCE_SCALE * (conditional - other)).argmax(-1, keepdim=True)


def random_flow(config: LatteFlowConfig, precision: str, device: str) -> FlowTransformer:
    """Makes a flow transformer none of whose weights is zero."""
    torch.manual_seed(0)
    with torch.device(device):
        flow = FlowTransformer(config).eval().requires_grad_(False)
        for parameter in flow.parameters():
            if not parameter.any():
                parameter.normal_(std=ZERO_AT_FIRST)
    return cast_parameters(flow, TORCH_DTYPES[precision])


def random_token_twin(config: LatteFlowConfig, vocabulary: int, precision: str, device: str) -> TokenTwin:
    """Makes an autoregressive twin."""
    torch.manual_seed(0)
    with torch.device(device):
        twin = TokenTwin(config, vocabulary).eval().requires_grad_(False)
        for parameter in twin.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.02)
    return cast_parameters(twin, TORCH_DTYPES[precision])


def flow_inputs(config: LatteFlowConfig, images: int, precision: str, device: str) -> tuple[Tensor, ...]:
    """Returns random arguments of `GuidedStep`, equal on every device."""
    generator = torch.Generator().manual_seed(1)
    rows = ROWS_PER_IMAGE * images
    latents = torch.randn((images, config.latent_channels, *config.latent_size), generator=generator)
    kv_shape = (config.layers_per_group, 2, rows, config.num_key_value_heads, PREFIX_TOKENS, config.head_dim)
    kv = torch.randn(kv_shape, generator=generator).to(TORCH_DTYPES[precision])
    mask = torch.ones((rows, PREFIX_TOKENS), dtype=torch.bool)
    return tuple(value.to(device) for value in (latents, torch.full((rows,), 0.3), kv, mask))


def prompt_inputs(twin: TokenTwin, images: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns a prompt, its places, and memory for keys and values, for `TokenTwin`."""
    weight, config = twin.head.weight, twin.config
    rows = ROWS_PER_IMAGE * images
    kv_shape = (config.num_hidden_layers, 2, rows, config.num_key_value_heads, capacity, config.head_dim)
    tokens = torch.ones((rows, PREFIX_TOKENS), dtype=torch.int64, device=weight.device)
    return tokens, torch.arange(PREFIX_TOKENS, device=weight.device), weight.new_zeros(kv_shape)


def prepared(modules: Sequence[nn.Module], inputs: Sequence[tuple[Any, ...]], mode: Mode) -> Run:
    """Returns a function that runs all modules one after another, each on its inputs."""
    steps: list[Any] = [torch.compile(module, dynamic=False) if "compiled" in mode else module for module in modules]

    def run() -> list[Tensor]:
        return [step(*of_step) for step, of_step in zip(steps, inputs, strict=True)]

    if "CUDA graph" not in mode:
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def modes_of(device: str, compiled: bool) -> list[Mode]:
    """Returns the ways to run a model on a device."""
    if compiled:
        return ["compiled", "compiled, CUDA graph"] if device == "cuda" else ["compiled"]
    return ["eager", "CUDA graph"] if device == "cuda" else ["eager"]


def device_time(work: Callable[[], Any]) -> tuple[float, Any]:
    """Runs some work; returns the seconds between two events in the GPU's stream, and its result."""
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    result = work()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1000, result


def stopwatch_of(device: str) -> Callable[[Callable[[], Any]], tuple[float, Any]]:
    """Returns what times a run on a device."""
    return device_time if device == "cuda" else wall_time


def peak_memory(device: str) -> int | None:
    """Returns the largest number of bytes of the GPU that were in use since the last call; None on the CPU."""
    if device != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


def measured_limits(precision: str, device: str, rounds: int = 10) -> Limits:
    """Measures the best rates of a large matrix product, and of a copy, which reads and writes."""
    stopwatch = stopwatch_of(device)
    side = GEMM_SIDE[device]
    one, two = (torch.randn((side, side), device=device, dtype=TORCH_DTYPES[precision]) for _ in range(2))
    source = torch.zeros(COPIED_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product = min(stopwatch(lambda: one @ two)[0] for _ in range(rounds + 1))
    copy = min(stopwatch(lambda: target.copy_(source))[0] for _ in range(rounds + 1))
    return Limits(2 * side**3 / product, 2 * source.numel() / copy, "measured")
