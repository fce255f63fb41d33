"""The flow-matching loop over engines.

Rows, not images, are the batch of the experts: a guided image is two rows, an unguided one is one.
Latents and velocities stay device tensors from the first step to the last.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from runtime.backends.base import DeviceTensor, Session, Value, to_host
from runtime.schedule import ExpertSchedule

Engines = Mapping[str, Session]
OnStep = Callable[["SamplerStep"], Value | None]
"""Is called after a step; latents that it returns replace the step's."""


@dataclass(frozen=True)
class SamplerStep:
    """What happened in a step."""

    index: int
    t: float
    t_next: float
    group: int
    latents: DeviceTensor
    """x after the step, `[B, C, H, W]` float32."""


@dataclass(frozen=True)
class GuidedBatch:
    """B images as R rows: all conditional rows first, then the unconditional rows of the guided images."""

    prefix_kv: tuple[Value, ...]
    """Per group, `[M, 2, R, Hkv, P, D]`."""
    prefix_mask: Value
    """`[R, P]` bool."""
    guidance_scale: np.ndarray
    """`[B]` float32."""
    guided: tuple[int, ...] = ()
    """Images that have an unconditional row, in the order of those rows."""
    upload: Callable[[np.ndarray], Value] = np.asarray
    """Moves what all steps share to the device."""

    @property
    def batch(self) -> int:
        return len(self.guidance_scale)

    @property
    def rows(self) -> int:
        return self.batch + len(self.guided)

    def row_of(self) -> np.ndarray:
        """The image of every row, `[R]` int64."""
        return np.array([*range(self.batch), *self.guided], np.int64)

    def unconditional_row(self) -> np.ndarray:
        """The row whose velocity an image is guided away from, `[B]` int64: its own where it has none.

        With its own, v_u = v_c and guidance changes nothing, whatever the scale.
        """
        rows = np.arange(self.batch, dtype=np.int64)
        rows[list(self.guided)] = self.batch + np.arange(len(self.guided))
        return rows


class Sampler:
    """Euler's method over the expert engines for one batch."""

    def __init__(self, engines: Engines, schedule: ExpertSchedule, batch: GuidedBatch) -> None:
        self._engines = engines
        self._schedule = schedule
        self._batch = batch
        self._row_of = batch.row_of()
        constants = {
            "unconditional_row": batch.unconditional_row(),
            "guidance_scale": batch.guidance_scale.astype(np.float32),
            "row_of": self._row_of,
        }
        self._constants = {name: batch.upload(value) for name, value in constants.items()}

    def run(self, latents: np.ndarray, times: Sequence[float], on_step: OnStep | None = None) -> Value:
        """Integrates from `latents` `[B, C, H, W]` float32 along the time grid; returns the last latents."""
        x: Value = latents
        rows: Value = self.rows_of(latents)
        # All steps' inputs at once: between two engines every call of NumPy counts.
        grid = np.asarray(times, np.float64)
        timesteps = np.repeat(grid[:-1, None], self._batch.rows, axis=1).astype(np.float32)
        step_sizes = np.repeat(np.diff(grid)[:, None], self._batch.batch, axis=1).astype(np.float32)
        for index, (t, t_next) in enumerate(itertools.pairwise(times)):
            x, rows = self._step(x, rows, self._schedule.group_of(t), timesteps[index], step_sizes[index])
            if on_step is not None:
                replaced = on_step(SamplerStep(index, t, t_next, self._schedule.group_of(t), x))
                if replaced is not None:
                    x = replaced
                    rows = self.rows_of(replaced)
        return x

    def rows_of(self, latents: Value) -> np.ndarray:
        """The latents of every row `[R, C, H, W]` from those of the images `[B, C, H, W]`."""
        rows: np.ndarray = to_host(latents)[self._row_of]
        return rows

    def step(
        self, latents: Value, row_latents: Value, t: float | np.ndarray, t_next: float | np.ndarray
    ) -> tuple[DeviceTensor, DeviceTensor]:
        """One step: the next latents `[B, C, H, W]`, and the same by rows `[R, C, H, W]`.

        Args:
            t, t_next: of all images, or of each, `[B]`; all t are of one expert group.
        """
        start, step_size = np.zeros((2, self._batch.batch))
        start += t
        step_size += t_next - start
        group = self._schedule.group_of(float(start[0]))
        timestep = start[self._row_of].astype(np.float32)
        return self._step(latents, row_latents, group, timestep, step_size.astype(np.float32))

    def _step(
        self, latents: Value, row_latents: Value, group: int, timestep: np.ndarray, step_size: np.ndarray
    ) -> tuple[DeviceTensor, DeviceTensor]:
        velocity = self._engines[f"expert_{group}"].run(
            {
                "latents": row_latents,
                "timestep": timestep,
                "prefix_kv": self._batch.prefix_kv[group],
                "prefix_mask": self._batch.prefix_mask,
            }
        )["velocity"]
        feed = {"latents": latents, "velocity": velocity, "step_size": step_size}
        outputs = self._engines["solver_step"].run(feed | self._constants)
        return outputs["next_latents"], outputs["row_latents"]
