"""What engines take and put out: arrays on the host or on a device, and the keys and values of answers."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class DeviceTensor(Protocol):
    """An array that stays where it was computed until `numpy` is called."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str:
        """The dtype by its name in the manifest: "float32", "float16", …"""

    def numpy(self) -> np.ndarray:
        """Returns a copy on the host."""


Value = np.ndarray | DeviceTensor


def to_host(value: Value) -> np.ndarray:
    """Returns a value as an array on the host."""
    return value if isinstance(value, np.ndarray) else value.numpy()


class KeyValues(Protocol):
    """Keys and values of a batch of answers, `[M, 2, B, Hkv, T, D]` per expert group, and which of them count."""

    @property
    def past(self) -> tuple[Value, ...]:
        """What the next run of `vlm` takes."""

    @property
    def mask(self) -> np.ndarray:
        """The attention mask of that run, in which each row has a new token, `[B, past + 1]` bool."""

    def add(self, kv: tuple[Value, ...]) -> None:
        """Takes the keys and values that this run put out."""

    def to_host(self) -> tuple[list[np.ndarray], np.ndarray]:
        """Returns them, `[M, 2, B, Hkv, T, D]` per expert group, and their mask, `[B, T]` bool."""


class GrowingKeyValues:
    """Keys and values as `vlm` puts them out: a run takes those of the run before, and puts out one token more."""

    def __init__(self, kv: tuple[Value, ...], mask: np.ndarray) -> None:
        self._kv = kv
        self._mask = _with_new_token(mask)

    @property
    def past(self) -> tuple[Value, ...]:
        return self._kv

    @property
    def mask(self) -> np.ndarray:
        return self._mask

    def add(self, kv: tuple[Value, ...]) -> None:
        """Takes the keys and values that a run put out."""
        self._kv = kv
        self._mask = _with_new_token(self._mask)

    def to_host(self) -> tuple[list[np.ndarray], np.ndarray]:
        """Returns arrays and their mask."""
        return [to_host(group) for group in self._kv], self._mask[:, :-1]


def _with_new_token(mask: np.ndarray) -> np.ndarray:
    return np.concatenate([mask, np.ones((len(mask), 1), bool)], axis=1)
