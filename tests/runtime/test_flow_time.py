"""Who serves which flow time."""

from __future__ import annotations

import itertools

import pytest
from pydantic import ValidationError

from runtime.errors import InputError
from runtime.flow_time import ExpertSchedule, time_grid


def test_every_boundary_belongs_to_the_group_that_it_opens_and_one_to_the_last() -> None:
    schedule = ExpertSchedule.uniform(4)
    assert [schedule.group_of(t) for t in (0.0, 0.2499, 0.25, 0.5, 0.75, 0.9999, 1.0)] == [0, 0, 1, 2, 3, 3, 3]


def test_uneven_boundaries() -> None:
    schedule = ExpertSchedule(boundaries=(0.0, 0.1, 0.85, 1.0))
    assert [schedule.group_of(t) for t in (0.0, 0.0999, 0.1, 0.84, 0.85, 1.0)] == [0, 0, 1, 1, 2, 2]
    assert schedule.interval(1) == (0.1, 0.85)
    assert schedule.steps_per_group(time_grid(20)) == [2, 15, 3]


def test_the_far_end_of_a_step_belongs_to_the_interval_it_closes() -> None:
    schedule = ExpertSchedule.uniform(4)
    assert [schedule.group_ending_at(t) for t in (0.0, 0.25, 0.3, 0.5, 1.0)] == [0, 0, 1, 1, 3]


@pytest.mark.parametrize("groups", [1, 3, 4, 7])
@pytest.mark.parametrize("steps", [1, 2, 5, 20, 21])
def test_grid_points_on_boundaries_are_exact_and_all_steps_are_served(groups: int, steps: int) -> None:
    schedule = ExpertSchedule.uniform(groups)
    counts = schedule.steps_per_group(time_grid(steps))
    assert sum(counts) == steps
    if steps % groups == 0:
        assert counts == [steps // groups] * groups


@pytest.mark.parametrize(
    "boundaries",
    [(), (0.0,), (0.0, 0.5), (0.1, 1.0), (0.0, 0.5, 0.5, 1.0), (0.0, 0.7, 0.3, 1.0), (0.0, float("nan"), 1.0)],
)
def test_a_schedule_with_a_gap_or_overlap_is_refused(boundaries: tuple[float, ...]) -> None:
    with pytest.raises(ValidationError, match="boundaries must rise"):
        ExpertSchedule(boundaries=boundaries)


@pytest.mark.parametrize("t", [-0.001, 1.001, float("nan")])
def test_a_time_outside_the_flow_is_refused(t: float) -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        ExpertSchedule.uniform(2).group_of(t)


def test_a_grid_needs_a_step() -> None:
    assert time_grid(2) == [0.0, 0.5, 1.0]
    with pytest.raises(InputError, match="at least 1, got 0"):
        time_grid(0)


def test_a_shifted_grid_is_denser_near_the_noise_and_ends_where_it_should() -> None:
    assert time_grid(4, shift=1.0) == time_grid(4)
    shifted = time_grid(4, shift=3.0)
    assert shifted[0] == 0.0
    assert shifted[-1] == 1.0
    gaps = [later - earlier for earlier, later in itertools.pairwise(shifted)]
    assert gaps == sorted(gaps)
    # σ = 1 − t goes to s·σ / (1 + (s − 1)·σ): from 0.5 to 0.75.
    assert 1 - shifted[2] == pytest.approx(0.75)
    for shift in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match=r"shift must be from 0\.01 to 100"):
            time_grid(4, shift)
