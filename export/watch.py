"""Where the first value that is not finite comes from."""

from __future__ import annotations

import numpy as np

from runtime.backends import Backend
from runtime.backends.observed import ObservedBackend, ObservedRun

FLOATING = {"float32", "float16", "bfloat16"}


class FiniteWatch(ObservedBackend):
    """A backend that looks at what every engine puts out."""

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self.reset()

    def reset(self) -> None:
        """Forgets what was seen."""
        self.first: str | None = None
        """What was not finite, first."""
        self._step = 0

    def observe(self, run: ObservedRun) -> None:
        for name, tensor in run.outputs.items():
            if self.first is None and tensor.dtype in FLOATING:
                values = tensor.numpy()
                lost = values.size - int(np.isfinite(values).sum())
                if lost:
                    group = "" if run.entry.group is None else f" (group {run.entry.group})"
                    after = f" after {self._step} steps" if self._step else ""
                    self.first = (
                        f"{lost} of {values.size} values of {run.entry.name}'s {name}{group} are not finite{after}"
                    )
        self._step += run.entry.name == "solver_step"
