"""What a device can do at most, what a run has to do at least, and so the shortest time that the run can take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from latte.config import LatteFlowConfig, one_group
from latte.model import FlowTransformer

PREFIX_TOKENS = 32
"""Of a prompt in its chat template."""
ROWS_PER_IMAGE = 2
"""With guidance."""
ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


class DataSheet(NamedTuple):
    """What NVIDIA says of a GPU: dense products without sparsity, accumulated in fp32."""

    bytes_per_second: float
    flops: float
    """In fp16 and bf16, by tensor cores."""
    fp32_flops: float
    """Without tensor cores, which have no fp32."""


DATA_SHEETS = {
    "H100 PCIe": DataSheet(2.0e12, 756e12, 51e12),
    "H100 NVL": DataSheet(3.9e12, 835e12, 60e12),
    "H100": DataSheet(3.35e12, 989e12, 67e12),
    "H200": DataSheet(4.8e12, 989e12, 67e12),
    "A100": DataSheet(2.04e12, 312e12, 19.5e12),
    "L40S": DataSheet(0.864e12, 362e12, 91.6e12),
    "L4": DataSheet(0.3e12, 121e12, 30.3e12),
}
"""By a part of the name that the driver gives; the first one that fits counts."""


@dataclass(frozen=True)
class Limits:
    """The rates of a device in one precision."""

    flops: float
    """Per second, of matrix products."""
    bytes_per_second: float
    source: str
    """"measured", or the data sheet's GPU."""


@dataclass(frozen=True)
class Work:
    """What a run does at least."""

    flops: int
    """Multiplications and additions of its matrix products."""
    bytes: int
    """Of the weights, keys and values, each read once."""

    def seconds(self, limits: Limits) -> float:
        """Returns the shortest time: of its arithmetic or of its memory, whichever is longer."""
        return max(self.flops / limits.flops, self.bytes / limits.bytes_per_second)

    def bound(self, limits: Limits) -> str:
        """Returns which of the two it is."""
        return "memory" if self.bytes / limits.bytes_per_second > self.flops / limits.flops else "arithmetic"


def limits_of(name: str, precision: str) -> Limits | None:
    """Returns the limits in the data sheet of a GPU, by its driver's name for it; None if it is not known."""
    for part, sheet in DATA_SHEETS.items():
        if part in name:
            flops = sheet.fp32_flops if precision == "fp32" else sheet.flops
            return Limits(flops, sheet.bytes_per_second, f"data sheet of {part}")
    return None


def step_work(config: LatteFlowConfig, layers: int, images: int, precision: str) -> Work:
    """Returns the work of a guided sampling step that runs this number of layers."""
    rows = ROWS_PER_IMAGE * images
    weights = ITEM_BYTES[precision] * active_parameters(config, layers)
    prefix = ITEM_BYTES[precision] * 2 * layers * rows * PREFIX_TOKENS * config.num_key_value_heads * config.head_dim
    return Work(images * step_flops(config, layers), weights + prefix)


def token_work(config: LatteFlowConfig, vocabulary: int, past: int, images: int, precision: str) -> Work:
    """Returns the work of one image token of each image, written with guidance by an autoregressive model.

    Args:
        past: number of tokens before it, the prompt's included.
    """
    rows, layers = ROWS_PER_IMAGE * images, config.num_hidden_layers
    weights = layers * _layer_parameters(config) + vocabulary * config.hidden_size
    attention = 2 * layers * config.hidden_size * (past + 1)
    kv = 2 * layers * rows * past * config.num_key_value_heads * config.head_dim
    return Work(2 * rows * (weights + attention), ITEM_BYTES[precision] * (weights + kv))


def step_flops(config: LatteFlowConfig, layers: int) -> int:
    """Counts the multiplications and additions of the matrix products in one guided image's step."""
    tokens = config.latent_size[0] * config.latent_size[1]
    attention = 2 * config.hidden_size * (tokens + PREFIX_TOKENS)
    return 2 * ROWS_PER_IMAGE * tokens * layers * (_layer_parameters(config) + attention)


def active_parameters(config: LatteFlowConfig, layers: int) -> int:
    """Counts the parameters that a step of a flow model with this number of layers in a group reads."""
    with torch.device("meta"):
        return sum(p.numel() for p in FlowTransformer(one_group(config, layers)).parameters())


def _layer_parameters(config: LatteFlowConfig) -> int:
    """Counts the weights of a layer's matrix products."""
    hidden, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
    return 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * config.intermediate_size
