"""The flow-matching loop over engines.

Latents and velocities stay device tensors from the first step to the last.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from runtime.backends import DeviceTensor, Session, Value, to_host
from runtime.flow_time import ExpertSchedule
from runtime.rows import GuidedBatch

Engines = Mapping[str, Session]
OnStep = Callable[["SamplerStep"], Value | None]
"""Called after each step; latents that it returns replace the step's."""


@dataclass(frozen=True)
class SamplerStep:
    """What happened in a step."""

    index: int
    t: float
    """Time at which the step started."""
    group: int
    latents: DeviceTensor
    """x after the step, `[B, C, H, W]` float32."""


class StepInputs(NamedTuple):
    """What a step needs besides the latents."""

    group: int
    """The expert group of the step."""
    timestep: Value
    """t of every row, `[R]` float32."""
    step_size: Value
    """Length of the step in flow time for every image, `[B]` float32."""


class Sampler:
    """Euler's method over the expert engines, for one batch."""

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

    def run(self, latents: Value, times: Sequence[float], on_step: OnStep | None = None, first_step: int = 0) -> Value:
        """Integrates from `latents` `[B, C, H, W]` float32 along the time grid; returns the last latents.

        Args:
            first_step: number of the first step, for `on_step`, where these times are part of a longer grid.
        """
        x: Value = latents
        rows: Value = self.rows_of(latents)
        for index, inputs in enumerate(self.step_inputs(times)):
            x, rows = self.step(x, rows, inputs)
            if on_step is not None:
                replaced = on_step(SamplerStep(first_step + index, times[index], inputs.group, x))
                if replaced is not None:
                    x = replaced
                    rows = self.rows_of(replaced)
        return x

    def step_inputs(self, times: Sequence[float] | np.ndarray) -> list[StepInputs]:
        """Makes the inputs of all steps at once: between two engines every call of NumPy counts.

        Args:
            times: the time grid, `[S + 1]`, or one grid for each image, `[S + 1, B]`. In each step all images must
                be in the same expert group.
        """
        grid = np.asarray(times, np.float64).reshape(len(times), -1)
        groups = [self._schedule.group_of(t) for t in grid[:-1, 0]]
        grid = np.broadcast_to(grid, (len(grid), self._batch.batch))  # [S + 1, B]
        timesteps = grid[:-1, self._row_of].astype(np.float32)  # [S, R]
        step_sizes = np.diff(grid, axis=0).astype(np.float32)  # [S, B]
        rows = (self._batch.upload_rows(values) for values in (timesteps, step_sizes))
        return list(itertools.starmap(StepInputs, zip(groups, *rows, strict=True)))

    def rows_of(self, latents: Value) -> np.ndarray:
        """Returns the latents of every row, `[R, C, H, W]`, from those of the images, `[B, C, H, W]`."""
        rows: np.ndarray = to_host(latents)[self._row_of]
        return rows

    def step(self, latents: Value, row_latents: Value, inputs: StepInputs) -> tuple[DeviceTensor, DeviceTensor]:
        """Runs one step; returns the next latents by image, `[B, C, H, W]`, and by row, `[R, C, H, W]`."""
        velocity = self._engines[f"expert_{inputs.group}"].run(
            {
                "latents": row_latents,
                "timestep": inputs.timestep,
                "prefix_kv": self._batch.prefix_kv[inputs.group],
                "prefix_mask": self._batch.prefix_mask,
            }
        )["velocity"]
        feed = {"latents": latents, "velocity": velocity, "step_size": inputs.step_size}
        outputs = self._engines["solver_step"].run(feed | self._constants)
        return outputs["next_latents"], outputs["row_latents"]
