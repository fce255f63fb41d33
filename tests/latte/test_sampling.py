"""The sampler against flows whose solution is known in closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from latte.sampling import SampleStep, guided, sample
from runtime.errors import InputError
from runtime.flow_time import ExpertSchedule, time_grid

MEAN, STD = 1.5, 0.5


def gaussian_velocity(x: torch.Tensor, t: float, group: int) -> torch.Tensor:
    """v(x, t) = E[x₁ − x₀ | x_t = x] for data N(MEAN, STD²) and noise N(0, 1)."""
    variance = t**2 * STD**2 + (1 - t) ** 2
    return MEAN + (t * STD**2 - (1 - t)) / variance * (x - t * MEAN)


def error_of(solver: str, steps: int) -> float:
    x0 = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None, None, None]
    x1 = sample(gaussian_velocity, x0, time_grid(steps), ExpertSchedule.uniform(4), solver)
    return float((x1 - (MEAN + STD * x0)).abs().max())


def test_the_flow_carries_noise_to_the_gaussian_target() -> None:
    """The exact map of this flow is x₁ = MEAN + STD·x₀."""
    assert error_of("euler", 2000) < 2e-3
    assert error_of("heun", 200) < 1e-4


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_the_error_falls_with_the_solvers_order(solver: str, order: int) -> None:
    rate = np.log2(error_of(solver, 50) / error_of(solver, 100))
    assert rate == pytest.approx(order, abs=0.25)


def test_one_euler_step_is_the_formula() -> None:
    x = torch.tensor([[[[0.3]]]])
    v = gaussian_velocity(x, 0.0, 0)
    assert torch.equal(sample(gaussian_velocity, x, time_grid(1), ExpertSchedule.uniform(1)), x + v)


def test_each_step_runs_the_group_of_its_start_and_heun_ends_in_the_interval_it_reached() -> None:
    seen: list[tuple[float, int]] = []

    def record(x: torch.Tensor, t: float, group: int) -> torch.Tensor:
        seen.append((t, group))
        return torch.zeros_like(x)

    x = torch.zeros(1, 1, 1, 1)
    sample(record, x, time_grid(4), ExpertSchedule.uniform(2))
    assert seen == [(0.0, 0), (0.25, 0), (0.5, 1), (0.75, 1)]
    seen.clear()
    sample(record, x, time_grid(2), ExpertSchedule.uniform(2), "heun")
    assert seen == [(0.0, 0), (0.5, 0), (0.5, 1), (1.0, 1)]


def test_fewer_steps_than_groups_skip_groups() -> None:
    steps: list[SampleStep] = []
    x = torch.zeros(1, 1, 1, 1)
    sample(lambda x, t, group: x, x, time_grid(2), ExpertSchedule.uniform(4), on_step_end=steps.append)
    assert [step.group for step in steps] == [0, 2]


def test_guidance_moves_guided_rows_and_leaves_the_others() -> None:
    conditional, unconditional = torch.full((2, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 1.0)
    result = guided(conditional, unconditional, [1], torch.tensor([1.0, 3.0]))
    assert result.flatten().tolist() == [2.0, 4.0]


def test_an_unknown_solver_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match="known are euler, heun"):
        sample(gaussian_velocity, torch.zeros(1), time_grid(1), ExpertSchedule.uniform(1), "rk4")
