"""Encoded prompts, and how they become the rows of a batch.

Rows, not images, are the batch of the experts: a guided image has two rows, an unguided image has one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from runtime.backends import Backend, Value


@dataclass(frozen=True)
class PrefixRow:
    """An encoded prompt: its keys and values per expert group, `[M, 2, Hkv, P, D]`, P being its own length."""

    kv: tuple[np.ndarray, ...]

    @property
    def length(self) -> int:
        return int(self.kv[0].shape[3])

    @property
    def nbytes(self) -> int:
        return sum(kv.nbytes for kv in self.kv)


@dataclass(frozen=True)
class GuidedBatch:
    """B images as R rows: the conditional rows of all images, then the unconditional rows of the guided images."""

    prefix_kv: tuple[Value, ...]
    """Per expert group, `[M, 2, R, Hkv, P, D]`."""
    prefix_mask: Value
    """`[R, P]` bool."""
    guidance_scale: np.ndarray
    """`[B]` float32."""
    guided: tuple[int, ...] = ()
    """Images that have an unconditional row, in the order of those rows."""
    upload: Callable[[np.ndarray], Value] = np.asarray
    """Moves values that all steps share to the device."""
    upload_rows: Callable[[np.ndarray], list[Value]] = list
    """Moves values of which each step has a row to the device."""

    @property
    def batch(self) -> int:
        """B."""
        return len(self.guidance_scale)

    def row_of(self) -> np.ndarray:
        """Returns the image of every row, `[R]` int64."""
        return np.array([*range(self.batch), *self.guided], np.int64)

    def unconditional_row(self) -> np.ndarray:
        """Returns the row with each image's unconditional velocity, `[B]` int64: its own row if it has none.

        With its own row, v_u = v_c and guidance changes nothing, whatever the scale.
        """
        rows = np.arange(self.batch, dtype=np.int64)
        rows[list(self.guided)] = self.batch + np.arange(len(self.guided))
        return rows


def is_guided(guidance_scale: float) -> bool:
    """Returns whether a guidance scale needs an unconditional row. A scale of 1 disables guidance."""
    return guidance_scale != 1.0


def arrange_rows(
    backend: Backend,
    conditional: Sequence[PrefixRow],
    unconditional: Sequence[PrefixRow],
    guidance_scales: Sequence[float],
    limit: int,
) -> GuidedBatch:
    """Arranges encoded prompts as the rows of a batch, and uploads them.

    Args:
        limit: largest number of prefix tokens.
        conditional: one for each image.
        unconditional: one for each guided image, in order.
        guidance_scales: one for each image.
    """
    rows = [*conditional, *unconditional]
    kv, mask = pad_rows(rows, backend.padded(max(row.length for row in rows), limit))
    return GuidedBatch(
        prefix_kv=tuple(backend.upload(group) for group in kv),
        prefix_mask=backend.upload(mask),
        guidance_scale=np.asarray(guidance_scales, np.float32),
        guided=tuple(i for i, scale in enumerate(guidance_scales) if is_guided(scale)),
        upload=backend.upload,
        upload_rows=backend.upload_rows,
    )


def pad_rows(rows: Sequence[PrefixRow], width: int | None = None) -> tuple[list[np.ndarray], np.ndarray]:
    """Returns one array per expert group, `[M, 2, R, Hkv, P, D]`, padded on the right with zeros, and `[R, P]` bool.

    Args:
        width: P; by default the length of the longest row.
    """
    width = max(row.length for row in rows) if width is None else width
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


def row_of(groups: Sequence[np.ndarray], row: int, mask: np.ndarray) -> PrefixRow:
    """Returns one row of a batch, `[M, 2, R, Hkv, T, D]` per expert group, without what its mask `[T]` hides."""
    return PrefixRow(tuple(group[:, :, row][:, :, :, mask] for group in groups))
