"""The loop over engines, with scripted sessions and a flow whose solution is known."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from runtime.backends.base import Value
from runtime.flow_time import ExpertSchedule, time_grid
from runtime.sampler import GuidedBatch, Sampler, SamplerStep

MEAN, STD = 1.5, 0.5


class FakeTensor:
    """A device tensor that lives on the host."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.shape, self.dtype = array.shape, str(array.dtype)

    def numpy(self) -> np.ndarray:
        return self.array.copy()


def host(value: Value) -> np.ndarray:
    return value if isinstance(value, np.ndarray) else value.numpy()


class GaussianExpert:
    """The exact velocity of N(MEAN, STD²); rows whose prefix is marked 0 get the velocity of N(0, 1), which is 0."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, int]] = []

    def run(self, feed: Mapping[str, Value]) -> dict[str, FakeTensor]:
        x, t = host(feed["latents"]), host(feed["timestep"])
        self.calls.append((float(t[0]), len(x)))
        t = t[:, None, None, None].astype(np.float64)
        variance = t**2 * STD**2 + (1 - t) ** 2
        v = MEAN + (t * STD**2 - (1 - t)) / variance * (x - t * MEAN)
        plain = (2 * t - 1) / (t**2 + (1 - t) ** 2) * x
        conditional = host(feed["prefix_mask"])[:, :1, None, None]
        return {"velocity": FakeTensor(np.where(conditional, v, plain).astype(np.float32))}


class NumpySolver:
    """`solver_step` in NumPy."""

    def run(self, feed: Mapping[str, Value]) -> dict[str, FakeTensor]:
        x, v = host(feed["latents"]), host(feed["velocity"])
        conditional, unconditional = v[: len(x)], v[host(feed["unconditional_row"])]
        scale, step = (host(feed[name])[:, None, None, None] for name in ("guidance_scale", "step_size"))
        x = x + step * (unconditional + scale * (conditional - unconditional))
        return {"next_latents": FakeTensor(x), "row_latents": FakeTensor(x[host(feed["row_of"])])}


def make_batch(scales: list[float]) -> GuidedBatch:
    guided = tuple(i for i, scale in enumerate(scales) if scale != 1.0)
    mask = np.array([[True]] * len(scales) + [[False]] * len(guided))
    return GuidedBatch((np.zeros(1),) * 4, mask, np.array(scales, np.float32), guided)


def make_sampler(scales: list[float]) -> tuple[Sampler, list[GaussianExpert]]:
    experts = [GaussianExpert() for _ in range(4)]
    engines = {f"expert_{k}": expert for k, expert in enumerate(experts)} | {"solver_step": NumpySolver()}
    return Sampler(engines, ExpertSchedule.uniform(4), make_batch(scales)), experts  # type: ignore[arg-type]


def test_the_loop_carries_noise_to_the_gaussian_target() -> None:
    x0 = np.linspace(-2, 2, 9, dtype=np.float32)[:, None, None, None]
    sampler, _ = make_sampler([1.0] * 9)
    x1 = host(sampler.run(x0, time_grid(1000)))
    assert np.abs(x1 - (MEAN + STD * x0)).max() < 4e-3


def test_each_step_runs_one_group_and_guided_images_are_two_rows() -> None:
    sampler, experts = make_sampler([1.0, 3.0, 1.0, 2.0])
    sampler.run(np.zeros((4, 1, 1, 1), np.float32), time_grid(8))
    assert [[t for t, _ in expert.calls] for expert in experts] == [
        [0.0, 0.125],
        [0.25, 0.375],
        [0.5, 0.625],
        [0.75, 0.875],
    ]
    assert {rows for expert in experts for _, rows in expert.calls} == {6}


def test_no_unconditional_row_runs_at_a_scale_of_one() -> None:
    sampler, experts = make_sampler([1.0, 1.0])
    sampler.run(np.zeros((2, 1, 1, 1), np.float32), time_grid(4))
    assert {rows for expert in experts for _, rows in expert.calls} == {2}


def test_an_image_is_the_same_alone_and_beside_others_of_other_scales() -> None:
    x0 = np.array([0.3, -1.0, 2.0], np.float32)[:, None, None, None]
    together = host(make_sampler([1.0, 3.0, 5.0])[0].run(x0, time_grid(12)))
    for i, scale in enumerate([1.0, 3.0, 5.0]):
        alone = host(make_sampler([scale])[0].run(x0[i : i + 1], time_grid(12)))
        np.testing.assert_array_equal(together[i : i + 1], alone)


def test_guidance_extrapolates_from_the_unconditional_velocity() -> None:
    sampler, _ = make_sampler([3.0])
    x0 = np.array([[[[0.5]]]], np.float32)
    (inputs,) = sampler.step_inputs([0.0, 0.5])
    step = host(sampler.step(x0, x0[[0, 0]], inputs)[0])
    v_c, v_u = MEAN - 0.5, -0.5
    assert step.item() == pytest.approx(0.5 + 0.5 * (v_u + 3 * (v_c - v_u)))


def test_images_of_one_batch_may_be_at_different_times_of_a_group() -> None:
    sampler, _ = make_sampler([1.0, 3.0])
    (inputs,) = sampler.step_inputs([[0.25, 0.3], [0.35, 0.45]])
    assert inputs.group == 1
    np.testing.assert_allclose(inputs.timestep, [0.25, 0.3, 0.3])
    np.testing.assert_allclose(inputs.step_size, [0.1, 0.15], rtol=1e-6)


def test_a_callback_sees_every_step_and_may_replace_the_latents() -> None:
    seen: list[SamplerStep] = []

    def zero_at_the_end(step: SamplerStep) -> np.ndarray | None:
        seen.append(step)
        return np.zeros((1, 1, 1, 1), np.float32) if step.index == 3 else None

    sampler, _ = make_sampler([3.0])
    x = sampler.run(np.ones((1, 1, 1, 1), np.float32), time_grid(4), zero_at_the_end)
    assert [(step.index, step.t, step.group) for step in seen] == [(0, 0.0, 0), (1, 0.25, 1), (2, 0.5, 2), (3, 0.75, 3)]
    assert host(x).item() == 0.0
