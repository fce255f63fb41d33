"""Keys and values of answers in device memory of a fixed capacity, so that the runs of `vlm` can be CUDA graphs."""

from __future__ import annotations

import numpy as np

from runtime.backends.cuda import Cuda, CudaTensor
from runtime.backends.values import Value, to_host

BUCKET = 128
"""The capacity is a multiple of this many tokens: runs have new shapes, and need new graphs, only that often."""


def padded(length: int, multiple: int, limit: int) -> int:
    """Returns the next multiple of a number, or `limit` if that is less; at least `length`."""
    return max(length, min(limit, -(-length // multiple) * multiple))


class CudaKeyValues:
    """Keys and values whose shapes and addresses stay the same while an answer grows.

    A run puts out its whole past and the new token; of that, the token is copied to its place in the past. What is not
    in use is masked, and zero: NaN would reach the result through the mask.
    """

    def __init__(self, cuda: Cuda, kv: tuple[Value, ...], mask: np.ndarray, limit: int) -> None:
        """Copies keys and values.

        Args:
            kv: `[M, 2, B, Hkv, T, D]` per expert group.
            mask: `[B, T]` bool.
            limit: the largest T that a run takes.
        """
        self._cuda = cuda
        self._limit = limit
        self._used = mask
        self._kv = self._placed(kv)

    @property
    def past(self) -> tuple[Value, ...]:
        return self._kv

    @property
    def mask(self) -> np.ndarray:
        rows, tokens = self._used.shape
        mask = np.zeros((rows, self._capacity + 1), bool)
        mask[:, :tokens] = self._used
        mask[:, -1] = True
        return mask

    def add(self, kv: tuple[Value, ...]) -> None:
        """Takes the keys and values that a run put out."""
        rows, tokens = self._used.shape
        self._used = np.concatenate([self._used, np.ones((rows, 1), bool)], axis=1)
        if tokens == self._capacity:
            self._kv = self._placed(kv)
            return
        with self._cuda.exclusive():
            for group, new in zip(self._kv, kv, strict=True):
                _copy_tokens(group, tokens, self._on_device(new), self._capacity, 1)

    def to_host(self) -> tuple[list[np.ndarray], np.ndarray]:
        """Returns arrays and their mask."""
        return [to_host(group)[:, :, :, :, : self._used.shape[1]] for group in self._kv], self._used

    @property
    def _capacity(self) -> int:
        return int(self._kv[0].shape[4])

    def _placed(self, kv: tuple[Value, ...]) -> tuple[CudaTensor, ...]:
        """Copies the first tokens to memory with room for more."""
        tokens = self._used.shape[1]
        capacity = padded(tokens + 1, BUCKET, self._limit) if tokens < self._limit else tokens
        groups = []
        with self._cuda.exclusive():
            for group in map(self._on_device, kv):
                target = CudaTensor(self._cuda, (*group.shape[:4], capacity, group.shape[5]), group.dtype)
                self._cuda.clear(target.address, target.nbytes)
                _copy_tokens(target, 0, group, 0, tokens)
                groups.append(target)
        return tuple(groups)

    def _on_device(self, value: Value) -> CudaTensor:
        return value if isinstance(value, CudaTensor) else CudaTensor.upload(self._cuda, to_host(value))


def _copy_tokens(target: CudaTensor, target_token: int, source: CudaTensor, source_token: int, tokens: int) -> None:
    """Copies tokens of `[M, 2, B, Hkv, T, D]`; T is that of each tensor."""
    *outer, capacity, width = target.shape
    size = width * np.dtype(target.dtype).itemsize
    target.cuda.copy_rows(
        target.address + target_token * size,
        capacity * size,
        source.address + source_token * size,
        source.shape[4] * size,
        tokens * size,
        int(np.prod(outer)),
    )
