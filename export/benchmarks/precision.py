"""What it costs to compute one more part of an expert in half precision: why the recipe keeps it in fp32.

The expert runs in PyTorch as it is exported, weights and products in half precision, the rest in fp32.
Then one part at a time is rounded to half precision as well, at every operation, and the velocity is
compared with that of the same expert in fp32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from export.components import TORCH_DTYPES, ExpertGraph, cast_parameters
from export.verify import relative_error
from latte.config import LatteFlowConfig
from latte.model import FlowTransformer
from runtime.manifest import Precision

aten = torch.ops.aten
ROWS, PREFIX = 2, 32
MASSIVE = 6.5e4
"""Of a residual channel, near fp16's largest number: trained language models have such ones (arXiv 2402.17762)."""


@dataclass(frozen=True)
class Part:
    """Operations of an expert that the recipe leaves in fp32."""

    name: str
    ops: tuple[Any, ...]
    fits: Callable[[Tensor, LatteFlowConfig], bool]
    """Which of their outputs belong to the part."""
    rounds_inputs: bool = False


def _is_hidden(out: Tensor, config: LatteFlowConfig) -> bool:
    return out.ndim == 3 and out.shape[-1] == config.hidden_size and out.shape[1] > 6


PARTS = (
    Part("residual stream", (aten.add.Tensor,), _is_hidden),
    Part(
        "normalisation",
        (aten.pow.Tensor_Scalar, aten.mean.dim, aten.rsqrt.default),
        lambda out, config: out.ndim == 3,
    ),
    Part(
        "adaLN", (aten.mul.Tensor, aten.add.Tensor), lambda out, config: out.ndim in (3, 4) and out.shape[1] in (1, 6)
    ),
    Part("softmax", (aten._softmax.default,), lambda out, config: True, rounds_inputs=True),
    Part("rotary angles", (aten.cos.default, aten.sin.default), lambda out, config: out.ndim == 4, rounds_inputs=True),
    Part(
        "timestep's sinusoids",
        (aten.cos.default, aten.sin.default),
        lambda out, config: out.ndim == 2,
        rounds_inputs=True,
    ),
)


class Rounded(TorchDispatchMode):
    """Rounds the parts' operations to half precision; their dtype stays fp32."""

    def __init__(self, parts: Sequence[Part], config: LatteFlowConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self._parts = parts
        self._config = config
        self._dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not isinstance(out, Tensor) or out.dtype != torch.float32:
            return out
        for part in self._parts:
            if func in part.ops and part.fits(out, self._config):
                if part.rounds_inputs:
                    args = [self._round(a) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
                    out = func(*args, **(kwargs or {}))
                out = self._round(out)
        return out

    def _round(self, value: Tensor) -> Tensor:
        return value.to(self._dtype).to(value.dtype)


@dataclass(frozen=True)
class Error:
    """Of the velocity, relative to fp32; None where it is not finite."""

    model: str
    precision: str
    part: str
    """That is in half precision too."""
    error: float | None


def study(name: str, flow: FlowTransformer, precisions: Sequence[Precision] = ("fp16", "bf16")) -> Iterator[Error]:
    """One expert group of a model, its last, with one more part in half precision at a time."""
    config = flow.config
    group = config.schedule.num_groups - 1
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn((ROWS, config.latent_channels, *config.latent_size), generator=generator)
    t = torch.tensor([0.78, 0.97])
    kv_shape = (config.layers_per_group, 2, ROWS, config.num_key_value_heads, PREFIX, config.head_dim)
    kv = torch.randn(kv_shape, generator=generator)
    mask = torch.ones((ROWS, PREFIX), dtype=torch.bool)
    with torch.no_grad():
        reference = flow(latents, t, kv, mask, group).numpy()
        for precision in precisions:
            dtype = TORCH_DTYPES[precision]
            narrow = ExpertGraph(cast_parameters(copy.deepcopy(flow), dtype))

            def error(parts: Sequence[Part], narrow: ExpertGraph = narrow, dtype: torch.dtype = dtype) -> float | None:
                with Rounded(parts, config, dtype) if parts else nullcontext():
                    velocity = narrow.flow(latents.to(dtype), t, kv.to(dtype), mask, group)
                return relative_error(velocity.float().numpy(), reference)

            yield Error(name, precision, "nothing: the recipe", error(()))
            for part in PARTS:
                yield Error(name, precision, part.name, error((part,)))
            yield Error(name, precision, "all of them", error(PARTS))


def random_flow(config: LatteFlowConfig, *, massive: bool = False, seed: int = 0) -> FlowTransformer:
    """Random weights; with `massive`, one channel of the residual stream begins and grows as in trained models."""
    torch.manual_seed(seed)
    flow = FlowTransformer(config)
    with torch.no_grad():
        for parameter in flow.parameters():
            if parameter.ndim == 2 and (parameter == 0).all():
                parameter.normal_(std=0.02)
        if massive:
            flow.latent_embed.bias[7] = MASSIVE
            for layer in flow.layers:
                layer.get_parameter("scale_shift_table")[5, 7] = MASSIVE  # what the MLP adds to it
    return flow.eval()
