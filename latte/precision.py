"""Precisions in PyTorch."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)
TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""The PyTorch dtype of each precision."""


def cast_parameters(module: ModuleT, dtype: torch.dtype) -> ModuleT:
    """Casts a module's parameters but not its buffers: `module.half()` would round the rotary frequencies too."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module
