"""The base of all backends, and the check of a feed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from runtime.backends.values import DeviceTensor, GrowingKeyValues, KeyValues, Value
from runtime.errors import EngineError
from runtime.manifest import EngineEntry, FileEntry, TensorSpec
from runtime.stopwatch import ResultT, wall_time


class Session(ABC):
    """A loaded engine. Subclasses execute it; this class checks what it is fed."""

    def __init__(self, entry: EngineEntry) -> None:
        self.entry = entry

    def run(self, feed: Mapping[str, Value]) -> dict[str, DeviceTensor]:
        """Runs the engine. Its outputs are the caller's, and no later run changes them.

        Raises:
            EngineError: the feed does not fit the engine, or the engine failed.
        """
        check_feed(self.entry, feed)
        return self._execute(feed)

    @abstractmethod
    def _execute(self, feed: Mapping[str, Value]) -> dict[str, DeviceTensor]:
        """Runs the engine on a feed that was checked."""

    def refit(self, bundle: Path, entry: EngineEntry) -> None:
        """Replaces the weights by those of another engine with the same graph, whose files were checked.

        Raises:
            EngineError: the provider, or this engine, cannot do that.
        """
        raise EngineError(f"engine {self.entry.name}: this provider replaces no weights; open the other bundle instead")

    @abstractmethod
    def close(self) -> None:
        """Frees the engine."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Backend(ABC):
    """Loads engines for one provider."""

    name: str

    def files(self, entry: EngineEntry) -> tuple[FileEntry, ...]:
        """Returns the files of an engine that `load` reads and that must be checked before."""
        return entry.files

    @abstractmethod
    def load(self, bundle: Path, entry: EngineEntry) -> Session:
        """Loads an engine whose files were checked.

        Raises:
            EngineError: the engine cannot be loaded here.
        """

    @abstractmethod
    def upload(self, array: np.ndarray) -> DeviceTensor:
        """Copies an array to the device, for inputs that several runs share."""

    def upload_rows(self, array: np.ndarray) -> list[Value]:
        """Returns the rows of an array, `array[0]`, …, for one run each: a backend may upload them together."""
        return list(array)

    def key_values(self, kv: tuple[Value, ...], mask: np.ndarray, limit: int) -> KeyValues:
        """Returns where keys and values of answers are kept between the runs of `vlm`.

        Args:
            kv: those of the first run, `[M, 2, B, Hkv, T, D]` per expert group.
            mask: which of them count, `[B, T]` bool.
            limit: the largest T that a run takes.
        """
        return GrowingKeyValues(kv, mask)

    def padded(self, length: int, limit: int) -> int:
        """Returns the length to pad tokens to, at most `limit` if `length` is: a backend may prefer few lengths."""
        return length

    def synchronize(self) -> None:  # noqa: B027 - most backends' runs have ended when they return
        """Waits until all runs have ended."""

    def timed(self, work: Callable[[], ResultT]) -> tuple[float, ResultT]:
        """Runs some work; returns the seconds that the device took for it, and its result."""
        return wall_time(work)

    def close(self) -> None:  # noqa: B027 - most backends have nothing to free
        """Frees what the sessions share, and the sessions that are open. Nothing of the backend can be used then."""


def check_feed(entry: EngineEntry, feed: Mapping[str, Value]) -> None:
    """Raises `EngineError` unless the names, dtypes, fixed sizes and named axes of a feed fit the engine."""
    expected = [spec.name for spec in entry.inputs]
    if set(feed) != set(expected):
        raise EngineError(f"engine {entry.name} takes {', '.join(expected)}; got {', '.join(sorted(feed))}")
    axes: dict[str, int] = {}
    for spec in entry.inputs:
        value = feed[spec.name]
        dtype, shape = _dtype_name(value.dtype), tuple(value.shape)
        if dtype != spec.dtype or not _shape_fits(spec, shape, axes):
            raise EngineError(
                f"engine {entry.name}: {spec.name} must be {spec.dtype} {_shown(spec.shape)}, "
                f"got {dtype} {_shown(shape)}"
                + (f" (with {', '.join(f'{name}={size}' for name, size in axes.items())})" if axes else "")
            )


@cache  # NumPy builds the name at each call, which takes as long as all other checks of a tensor
def _dtype_name(dtype: np.dtype | str) -> str:
    return str(dtype)


def _shape_fits(spec: TensorSpec, shape: tuple[int, ...], axes: dict[str, int]) -> bool:
    if len(shape) != len(spec.shape):
        return False
    for axis, size in zip(spec.shape, shape, strict=True):
        if size != (axes.setdefault(axis, size) if isinstance(axis, str) else axis):
            return False
    return True


def _shown(shape: tuple[int | str, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"
