"""The error of computing one more part of an expert in half precision: the reason to keep that part in fp32.

The expert runs in PyTorch as it is exported: weights and matrix products in half precision, the rest in fp32. Then
one more part at a time is rounded to half precision at every operation, and the velocity is compared with that of
the same expert in fp32.

Keys and values of the prefix have the size of a trained VLM's: those of `shapes` are of real prompts, and those of the
models with random weights have a part that all tokens share, so that products with the queries reach 67,614.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from export.benchmarks.report import AsJson, Publisher, app
from export.parity import relative_error
from latte.checkpoint import load_checkpoint
from latte.config import LatteFlowConfig, one_group
from latte.model import FlowTransformer
from latte.paper import PAPER
from latte.precision import TORCH_DTYPES, cast_parameters
from runtime.console import progress_bar, stdout
from runtime.manifest import Precision

aten = torch.ops.aten
ROWS, PREFIX = 2, 32
VECTORS = 6
"""Most vectors that adaLN makes for a layer; there are more latent tokens."""
MASSIVE = 6.5e4
"""A residual channel near fp16's largest number; trained language models have such channels (arXiv 2402.17762)."""
LARGEST_SCORE = 67_614
"""Largest product of a query and a key of a pretrained Qwen2-VL, before it is scaled."""
PROMPTS = ("a large red circle", "a small blue star above a small green ring")


@dataclass(frozen=True)
class Part:
    """Operations of an expert that the exporter keeps in fp32."""

    name: str
    ops: tuple[Any, ...]
    fits: Callable[[Tensor, LatteFlowConfig], bool]
    """Says which outputs of these operations belong to the part."""
    rounds_inputs: bool = False


def _is_hidden(out: Tensor, config: LatteFlowConfig) -> bool:
    return out.ndim == 3 and out.shape[-1] == config.hidden_size and out.shape[1] > VECTORS


PARTS = (
    Part("residual stream", (aten.add.Tensor,), _is_hidden),
    Part(
        "normalisation",
        (aten.pow.Tensor_Scalar, aten.mean.dim, aten.rsqrt.default),
        lambda out, config: out.ndim == 3,
    ),
    Part(
        "adaLN",
        (aten.mul.Tensor, aten.add.Tensor),
        lambda out, config: out.ndim in (3, 4) and out.shape[1] <= VECTORS and out.shape[-1] == config.hidden_size,
    ),
    Part("scores of attention", (aten.bmm.default,), lambda out, config: True, rounds_inputs=True),
    Part("softmax", (aten._softmax.default,), lambda out, config: True, rounds_inputs=True),
    Part("rotary angles", (aten.cos.default, aten.sin.default), lambda out, config: out.ndim == 4, rounds_inputs=True),
    Part(
        "timestep's sinusoids",
        (aten.cos.default, aten.sin.default),
        lambda out, config: out.ndim == 2,
        rounds_inputs=True,
    ),
)


class RoundedParts(TorchDispatchMode):
    """Rounds the operations of some parts to half precision; their dtype stays fp32."""

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
class Deviation:
    """The deviation of the velocity from fp32, with one more part in half precision."""

    model: str
    precision: str
    part: str
    """The additional part in half precision."""
    error: float | None
    """Relative to fp32; None if it is not finite."""


@dataclass(frozen=True)
class Subject:
    """An expert to study, with a prefix for it."""

    flow: FlowTransformer
    kv: Tensor
    """The prefix KV cache of the last expert group, `[M, 2, ROWS, Hkv, P, D]` float32."""
    mask: Tensor
    """`[ROWS, P]` bool."""


def study(name: str, subject: Subject, precisions: Sequence[Precision] = ("fp16", "bf16")) -> Iterator[Deviation]:
    """Measures a model's last expert group with one more part in half precision at a time."""
    flow, kv, mask = subject.flow, subject.kv, subject.mask
    config = flow.config
    group = config.schedule.num_groups - 1
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn((ROWS, config.latent_channels, *config.latent_size), generator=generator)
    t = torch.tensor([0.78, 0.97])
    with torch.no_grad():
        reference = flow(latents, t, kv, mask, group).numpy()
        for precision in precisions:
            dtype = TORCH_DTYPES[precision]
            narrow = cast_parameters(copy.deepcopy(flow), dtype)

            def error(
                parts: Sequence[Part], narrow: FlowTransformer = narrow, dtype: torch.dtype = dtype
            ) -> float | None:
                with RoundedParts(parts, config, dtype) if parts else nullcontext():
                    velocity = narrow(latents.to(dtype), t, kv.to(dtype), mask, group)
                found = relative_error(velocity.float().numpy(), reference)
                return found if math.isfinite(found) else None

            yield Deviation(name, precision, "nothing: the recipe", error(()))
            for part in PARTS:
                yield Deviation(name, precision, part.name, error((part,)))
            yield Deviation(name, precision, "all of them", error(PARTS))


def shipped_subject() -> Subject:
    """Returns `shapes` with the prefix of two prompts."""
    model = load_checkpoint("shapes")
    prefix = model.encode_prompts(PROMPTS)
    return Subject(model.flow, prefix.kv[-1], prefix.mask)


def random_subject(config: LatteFlowConfig, *, massive: bool = False) -> Subject:
    """Returns random flow layers with a random prefix; with `massive`, their largest values are a trained model's."""
    generator = torch.Generator().manual_seed(0)
    kv_shape = (config.layers_per_group, 2, ROWS, config.num_key_value_heads, PREFIX, config.head_dim)
    kv = torch.randn(kv_shape, generator=generator)
    if massive:
        # Queries and keys share one direction in the two dimensions of the lowest rotary frequency.
        kv[:, 0, ..., config.head_dim // 2 - 1] += LARGEST_SCORE**0.5
    return Subject(random_flow(config, massive=massive), kv, torch.ones((ROWS, PREFIX), dtype=torch.bool))


def random_flow(config: LatteFlowConfig, *, massive: bool = False, seed: int = 0) -> FlowTransformer:
    """Returns random flow layers; with `massive`, some values are as large as in trained models.

    Those are one residual channel, and one dimension of every head's queries and keys.
    """
    torch.manual_seed(seed)
    flow = FlowTransformer(config)
    with torch.no_grad():
        for parameter in flow.parameters():
            if parameter.ndim == 2 and (parameter == 0).all():
                parameter.normal_(std=0.02)
        if massive:
            flow.latent_embed.bias[7] = MASSIVE
            for layer in flow.layers:
                layer.get_parameter("scale_shift_table")[-1, 7] = MASSIVE  # what the MLP adds to it
                for name in ("q_proj", "k_proj"):
                    bias = layer.get_parameter(f"{name}.bias")
                    bias[config.head_dim // 2 - 1 :: config.head_dim] = LARGEST_SCORE**0.5
    return flow.eval()


@app.command(no_args_is_help=False)
def precision(
    as_json: AsJson = False,
) -> None:
    """Measure the error of half precision in each part of an expert that the exporter keeps in fp32.

    \b
    Example:
      latte-flow bench precision
    """
    publisher = Publisher(as_json)
    expert = one_group(PAPER, PAPER.layers_per_group)
    models = {
        "shapes": shipped_subject,
        "hidden 1536, random": lambda: random_subject(expert),
        "hidden 1536, massive": lambda: random_subject(expert, massive=True),
    }
    errors: list[Deviation] = []
    with progress_bar() as progress:
        task = progress.add_task("", total=2 * (len(PARTS) + 2) * len(models))
        for name, make in models.items():
            progress.update(task, description=name)
            for error in study(name, make()):
                errors.append(error)
                progress.advance(task)

    def show() -> None:
        columns = [(model, half) for model in models for half in ("fp16", "bf16")]
        found = {(error.model, error.precision, error.part): error.error for error in errors}
        table = Table("in half precision too", *(f"{model}, {half}" for model, half in columns), title="relative error")
        for part in dict.fromkeys(error.part for error in errors):
            values = (found[(*column, part)] for column in columns)
            table.add_row(part, *("not finite" if value is None else f"{value:.1e}" for value in values))
        stdout.print(table)

    publisher.publish({"errors": [asdict(error) for error in errors]}, show)
