"""Walking the flow from noise to data. Knows nothing of the model: a velocity is a function."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from runtime.errors import InputError
from runtime.flow_time import ExpertSchedule

Velocity = Callable[[Tensor, float, int], Tensor]
"""(x_t, t, expert group) to v, of x_t's shape."""
SOLVERS = ("euler", "heun")


@dataclass(frozen=True)
class SampleStep:
    """What a callback sees after a step."""

    index: int
    t: float
    """Time at which the step started."""
    group: int
    velocity: Tensor
    latents: Tensor
    """x after the step."""


def sample(
    velocity: Velocity,
    latents: Tensor,
    times: Sequence[float],
    schedule: ExpertSchedule,
    solver: str = "euler",
    on_step_end: Callable[[SampleStep], None] | None = None,
) -> Tensor:
    """Integrates dx/dt = v(x, t) over the time grid, from x₀ = `latents`.

    Euler is x + h·v(x, t). Heun looks again from the far end, x + h/2·(v(x, t) + v(x + h·v, t + h)), with
    the expert whose interval reaches t + h from the left.
    """
    if solver not in SOLVERS:
        raise InputError(f"unknown solver {solver!r}; known are {', '.join(SOLVERS)}")
    x = latents
    for index, (t, t_next) in enumerate(itertools.pairwise(times)):
        group = schedule.group_of(t)
        v = velocity(x, t, group)
        if solver == "heun":
            v = (v + velocity(x + (t_next - t) * v, t_next, schedule.group_ending_at(t_next))) / 2
        x = x + (t_next - t) * v
        if on_step_end is not None:
            on_step_end(SampleStep(index, t, group, v, x))
    return x


def guided(conditional: Tensor, unconditional: Tensor, guided_rows: Sequence[int], scales: Tensor) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598), v = v_u + s·(v_c − v_u), on the rows that have it.

    Args:
        conditional: v_c, `[B, C, H, W]`.
        unconditional: v_u of `guided_rows` only, `[len(guided_rows), C, H, W]`.
        scales: s of each row, `[B]`.
    """
    if not guided_rows:
        return conditional
    rows = list(guided_rows)
    result = conditional.clone()
    scale = scales[rows].view(-1, 1, 1, 1)
    result[rows] = unconditional + scale * (conditional[rows] - unconditional)
    return result
