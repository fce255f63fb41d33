"""Whether the weights in an engine's files are those of the checkpoint.

Comparing outputs cannot show a small error of a weight: in INT8 it disappears in what the precision itself costs.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from export.engines import load_engine
from export.weights import LoadedWeights, weights_of
from latte.model import LatteFlow
from runtime.errors import CheckpointError
from runtime.manifest import EngineEntry, Precision

CONSTANT = "constant_"
"""Initializers of this name are numbers of the graph, not weights."""
LEVELS, SCALES = ".levels", ".scales"
"""A quantised weight `[N, K]` is two initializers of its name with these endings, `[K, N]` int8 and `[N]` float32."""


def differing_weights(bundle: Path, entry: EngineEntry, model: LatteFlow) -> tuple[list[str], int]:
    """Compares an engine's weights with the checkpoint's, rounded to the engine's precision.

    Returns:
        the names of those that differ, and the number of those compared.
    """
    initializers = load_engine(bundle / entry.name).graph.initializers
    precision: Precision = "fp32" if entry.precision == "int8" else entry.precision
    weight = weights_of(entry.role, model, LoadedWeights(model), precision, entry.group)
    differing, count = [], 0
    for name, value in initializers.items():
        if name.startswith(CONSTANT) or name.endswith(SCALES):
            continue
        assert value.const_value is not None
        found, source = value.const_value.numpy(), name.removesuffix(LEVELS)
        try:
            expected = weight(source)
        except (AttributeError, CheckpointError):
            if not entry.fused:  # fusing makes new weights of several
                differing.append(f"{source}, which the checkpoint does not have")
            continue
        if source != name:
            scales = initializers[source + SCALES].const_value
            assert scales is not None
            same = is_quantized(expected.numpy(), found, scales.numpy())
        else:
            same = _equal(found, expected)
        count += 1
        if not same:
            differing.append(source)
    return differing, count


def is_quantized(weight: np.ndarray, levels: np.ndarray, scales: np.ndarray) -> bool:
    """Returns whether levels `[K, N]` times scales `[N]` are a weight `[N, K]` but for the rounding to levels."""
    if levels.shape != weight.shape[::-1] or scales.shape != weight.shape[:1] or not (scales > 0).all():
        return False
    # The largest level of an output is used, so that scales cannot be larger than needed.
    used = np.abs(levels.astype(np.int64)).max(axis=0)  # [N]
    off = np.abs(levels.T - weight / scales[:, None])
    full = (used >= 2**6 - 1) | (np.abs(weight).max(axis=1) == 0)
    return bool((off <= 0.5 + 1e-3).all() and full.all())


def _equal(found: np.ndarray, expected: torch.Tensor) -> bool:
    """Compares bytes, since NumPy has no bfloat16 of its own."""
    mine = np.ascontiguousarray(found).reshape(-1).view(np.uint8)
    theirs = expected.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return found.shape == tuple(expected.shape) and np.array_equal(mine, theirs)
