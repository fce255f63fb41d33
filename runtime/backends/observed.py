"""A backend whose runs are observed: for timelines, and to find values that are not finite."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from runtime.backends.base import Backend, Session
from runtime.backends.values import DeviceTensor, KeyValues, Value
from runtime.manifest import EngineEntry, FileEntry
from runtime.stopwatch import ResultT


class ObservedRun(NamedTuple):
    """The inputs and outputs of one run; times in seconds of `time.perf_counter`."""

    entry: EngineEntry
    feed: Mapping[str, Value]
    outputs: Mapping[str, DeviceTensor]
    start: float
    end: float


class ObservedBackend(Backend):
    """Wraps a backend so that its sessions report every run."""

    def __init__(self, backend: Backend) -> None:
        self.name = backend.name
        self._backend = backend

    def files(self, entry: EngineEntry) -> tuple[FileEntry, ...]:
        return self._backend.files(entry)

    def load(self, bundle: Path, entry: EngineEntry) -> Session:
        return _ObservedSession(self._backend.load(bundle, entry), self)

    def upload(self, array: np.ndarray) -> DeviceTensor:
        return self._backend.upload(array)

    def upload_rows(self, array: np.ndarray) -> list[Value]:
        return self._backend.upload_rows(array)

    def key_values(self, kv: tuple[Value, ...], mask: np.ndarray, limit: int) -> KeyValues:
        return self._backend.key_values(kv, mask, limit)

    def padded(self, length: int, limit: int) -> int:
        return self._backend.padded(length, limit)

    def synchronize(self) -> None:
        self._backend.synchronize()

    def timed(self, work: Callable[[], ResultT]) -> tuple[float, ResultT]:
        return self._backend.timed(work)

    def close(self) -> None:
        self._backend.close()

    @abstractmethod
    def observe(self, run: ObservedRun) -> None:
        """Called after every run."""


class _ObservedSession(Session):
    def __init__(self, session: Session, observer: ObservedBackend) -> None:
        super().__init__(session.entry)
        self._session = session
        self._observer = observer

    def _execute(self, feed: Mapping[str, Value]) -> dict[str, DeviceTensor]:
        start = time.perf_counter()
        outputs = self._session._execute(feed)
        self._observer.observe(ObservedRun(self.entry, feed, outputs, start, time.perf_counter()))
        return outputs

    def close(self) -> None:
        self._session.close()
