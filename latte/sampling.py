"""ODE solvers for flow matching, and classifier-free guidance.

The solvers do not depend on the model: a velocity is any function of (x, t, expert group).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from runtime.errors import InputError
from runtime.flow_time import ExpertSchedule

Velocity = Callable[[Tensor, float, int], Tensor]
"""Maps x_t `[B, C, H, W]`, flow time t and the expert group to the velocity v, in the shape of x_t."""
SOLVERS = ("euler", "heun")


@dataclass(frozen=True)
class SampleStep:
    """What happened in a step."""

    index: int
    t: float
    """Flow time at which the step started."""
    group: int
    """The expert group at `t`."""
    velocity: Tensor
    """The velocity that the step used, `[B, C, H, W]`; with Heun, the mean of two."""
    latents: Tensor
    """x after the step, `[B, C, H, W]`."""


def sample(
    velocity: Velocity,
    latents: Tensor,
    times: Sequence[float],
    schedule: ExpertSchedule,
    solver: str = "euler",
    on_step_end: Callable[[SampleStep], None] | None = None,
) -> Tensor:
    """Integrates dx/dt = v(x, t) along a time grid; returns the last x, `[B, C, H, W]`.

    Euler's step is x + h·v(x, t). Heun's is x + h/2·(v(x, t) + v(x + h·v(x, t), t + h)); the second velocity comes
    from the expert group whose interval ends at t + h or contains it.

    Args:
        latents: x₀, `[B, C, H, W]`.
        times: the time grid, S + 1 flow times from 0 to 1 for S steps.
        solver: "euler" or "heun".
        on_step_end: called after each step.

    Raises:
        InputError: the solver is unknown.
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
    """Applies classifier-free guidance (arXiv 2207.12598), v = v_u + s·(v_c − v_u); returns v, `[B, C, H, W]`.

    Rows outside `guided_rows` keep v_c.

    Args:
        conditional: v_c, `[B, C, H, W]`.
        unconditional: v_u of the guided rows only, `[len(guided_rows), C, H, W]`.
        guided_rows: indices of the guided rows, in the order of `unconditional`.
        scales: guidance scale s of every row, `[B]`.
    """
    if not guided_rows:
        return conditional
    rows = list(guided_rows)
    result = conditional.clone()
    scale = scales[rows].view(-1, 1, 1, 1)  # [len(rows), 1, 1, 1]
    result[rows] = unconditional + scale * (conditional[rows] - unconditional)
    return result
