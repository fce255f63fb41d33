"""Where the randomness of an image comes from: its seed alone, not its place in a batch, not the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def initial_latents(seeds: Sequence[int], shape: tuple[int, int, int]) -> np.ndarray:
    """x₀ ~ N(0, I) for every seed: `[len(seeds), C, H, W]` float32, drawn with NumPy's Philox."""
    rows = [np.random.Generator(np.random.Philox(seed)).standard_normal(shape, np.float32) for seed in seeds]
    return np.stack(rows)
