"""Encoded prompts, and how they become the rows of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runtime.backends import Backend
from runtime.sampler import GuidedBatch


@dataclass(frozen=True)
class PrefixRow:
    """An encoded prompt: its keys and values per group, `[M, 2, Hkv, P, D]`, P its own length."""

    kv: tuple[np.ndarray, ...]

    @property
    def length(self) -> int:
        return int(self.kv[0].shape[3])


def arrange_rows(
    backend: Backend,
    conditional: Sequence[PrefixRow],
    unconditional: Sequence[PrefixRow],
    guidance_scales: Sequence[float],
) -> GuidedBatch:
    """Encoded prompts as the rows of a batch: those of all images, then those that guided images are led away from.

    Args:
        unconditional: one for each image whose scale is not 1, in their order.
        guidance_scales: one for each image.
    """
    kv, mask = _side_by_side([*conditional, *unconditional])
    return GuidedBatch(
        prefix_kv=tuple(backend.upload(group) for group in kv),
        prefix_mask=backend.upload(mask),
        guidance_scale=np.asarray(guidance_scales, np.float32),
        guided=tuple(i for i, scale in enumerate(guidance_scales) if scale != 1.0),
        upload=backend.upload,
    )


def _side_by_side(rows: Sequence[PrefixRow]) -> tuple[list[np.ndarray], np.ndarray]:
    """Rows in one batch: per group `[M, 2, R, Hkv, P, D]`, padded on the right with zeros, and the mask `[R, P]`."""
    width = max(row.length for row in rows)
    mask = np.zeros((len(rows), width), bool)
    groups = []
    for first in rows[0].kv:
        layers, two, heads, _, head_dim = first.shape
        groups.append(np.zeros((layers, two, len(rows), heads, width, head_dim), first.dtype))
    for i, row in enumerate(rows):
        mask[i, : row.length] = True
        for group, kv in zip(groups, row.kv, strict=True):
            group[:, :, i, :, : row.length] = kv
    return groups, mask
