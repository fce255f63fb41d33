"""The base of all backends: the check of a feed, and values that may stay on the device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np

from runtime.errors import EngineError
from runtime.manifest import EngineEntry, FileEntry, TensorSpec


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
