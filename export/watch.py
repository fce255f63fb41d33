"""Where the first value that is not finite comes from: a backend that looks at what every engine puts out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from runtime.backends import Backend, DeviceTensor, Session, Value
from runtime.manifest import EngineEntry

FLOATING = {"float32", "float16", "bfloat16"}


class FiniteWatch(Backend):
    """Another backend, watched."""

    def __init__(self, backend: Backend) -> None:
        self.name = backend.name
        self._backend = backend
        self.reset()

    def reset(self) -> None:
        """Forgets what was seen."""
        self.first: str | None = None
        """What was not finite, first."""
        self._step = 0

    def load(self, bundle: Path, entry: EngineEntry) -> Session:
        return _WatchedSession(self._backend.load(bundle, entry), self)

    def upload(self, array: np.ndarray) -> DeviceTensor:
        return self._backend.upload(array)

    def see(self, entry: EngineEntry, outputs: Mapping[str, DeviceTensor]) -> None:
        """Takes in the outputs of a run."""
        for name, tensor in outputs.items():
            if self.first is None and tensor.dtype in FLOATING:
                values = tensor.numpy()
                lost = values.size - int(np.isfinite(values).sum())
                if lost:
                    group = "" if entry.group is None else f" (group {entry.group})"
                    after = f" after {self._step} steps" if self._step else ""
                    self.first = f"{lost} of {values.size} values of {entry.name}'s {name}{group} are not finite{after}"
        self._step += entry.name == "solver_step"


class _WatchedSession(Session):
    def __init__(self, session: Session, watch: FiniteWatch) -> None:
        super().__init__(session.entry)
        self._session = session
        self._watch = watch

    def _execute(self, feed: Mapping[str, Value]) -> dict[str, DeviceTensor]:
        outputs = self._session.run(feed)
        self._watch.see(self.entry, outputs)
        return outputs

    def close(self) -> None:
        self._session.close()
