"""Flow time: the expert schedule, the time grid that a sampler follows, the noise it starts from, and its defaults.

t = 0 is noise and t = 1 is data; x_t = t·x₁ + (1 − t)·x₀; the velocity is v = x₁ − x₀; a step is
x ← x + (t' − t)·v. The schedule is data: it is part of a checkpoint's config and of a bundle's manifest.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from runtime.arguments import numbers_for_each, real_number, whole_number
from runtime.errors import EngineError, InputError

DEFAULT_STEPS = 20
DEFAULT_GUIDANCE_SCALE = 3.0
DEFAULT_SHIFT = 1.0
LARGEST_GUIDANCE_SCALE = 100.0
LARGEST_SHIFT = 100.0
LARGEST_SEED = 2**63 - 1
LARGEST_LATENT = 1e6
"""Largest magnitude of a latent, which is about 1 in an image: beyond, norms of the decoder overflow."""


class ExpertSchedule(BaseModel):
    """Boundaries 0 = τ₀ < … < τ_K = 1; group k serves τ_k ≤ t < τ_{k+1}, and t = 1 belongs to the last."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    boundaries: tuple[float, ...]

    @field_validator("boundaries")
    @classmethod
    def _covers_the_unit_interval(cls, boundaries: tuple[float, ...]) -> tuple[float, ...]:
        rises = all(left < right for left, right in itertools.pairwise(boundaries))
        if len(boundaries) < 2 or boundaries[0] != 0.0 or boundaries[-1] != 1.0 or not rises:
            raise ValueError(f"boundaries must rise from 0.0 to 1.0 without a gap, got {list(boundaries)}")
        return boundaries

    @classmethod
    def uniform(cls, num_groups: int) -> ExpertSchedule:
        """`num_groups` intervals of equal length."""
        if num_groups < 1:
            raise ValueError(f"an expert schedule needs at least one group, got {num_groups}")
        return cls(boundaries=tuple(k / num_groups for k in range(num_groups + 1)))

    @property
    def num_groups(self) -> int:
        return len(self.boundaries) - 1

    def interval(self, group: int) -> tuple[float, float]:
        """(τ_k, τ_{k+1}) of group k."""
        return self.boundaries[group], self.boundaries[group + 1]

    def group_of(self, t: float) -> int:
        """The group that serves time t. A step belongs to the group of its start."""
        self._check(t)
        return min(bisect_right(self.boundaries, t) - 1, self.num_groups - 1)

    def group_ending_at(self, t: float) -> int:
        """The group whose interval reaches t from the left: it serves the far end of a step (Heun's second look)."""
        self._check(t)
        return max(bisect_left(self.boundaries, t) - 1, 0)

    def steps_per_group(self, times: Sequence[float]) -> list[int]:
        """How many steps of a time grid each group runs."""
        counts = Counter(self.group_of(t) for t in times[:-1])
        return [counts[group] for group in range(self.num_groups)]

    @staticmethod
    def _check(t: float) -> None:
        if not 0.0 <= t <= 1.0:
            raise ValueError(f"flow time must be in [0, 1], got {t}")


def is_same_fp32(first: float, second: float) -> bool:
    """Returns whether two numbers are the same in fp32, the type in which the service takes them."""
    return bool(np.float32(first) == np.float32(second))


class SamplingDefaults(BaseModel):
    """How a model is sampled where the caller says nothing, and what its weights can do.

    It is data, like the schedule: part of a checkpoint's config and of a bundle's manifest.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_inference_steps: int = Field(default=DEFAULT_STEPS, ge=1)
    guidance_scale: float = Field(default=DEFAULT_GUIDANCE_SCALE, ge=-LARGEST_GUIDANCE_SCALE, le=LARGEST_GUIDANCE_SCALE)
    shift: float = Field(default=DEFAULT_SHIFT, ge=1 / LARGEST_SHIFT, le=LARGEST_SHIFT)
    guidance_interval: tuple[float, float] = Field(
        default=(0.0, 1.0), description="flow times [start, end) with guidance (arXiv 2404.07724)"
    )
    guidance_distilled: bool = Field(
        default=False,
        description="whether the weights have guidance of that scale built in: one row an image",
    )
    allowed_steps: tuple[int, ...] | None = Field(default=None, description="numbers of steps; None: any")

    @model_validator(mode="after")
    def _is_possible(self) -> SamplingDefaults:
        check_guidance_interval(self.guidance_interval)
        if self.allowed_steps is not None and self.num_inference_steps not in self.allowed_steps:
            raise ValueError(f"num_inference_steps {self.num_inference_steps} is not in {list(self.allowed_steps)}")
        return self

    def choose(
        self,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        shift: float | None = None,
        negative_prompt: str = "",
    ) -> Sampling:
        """Returns what to sample with; None takes the default.

        Raises:
            InputError: the weights cannot do it.
        """
        chosen = Sampling(
            self.num_inference_steps
            if num_inference_steps is None
            else whole_number("num_inference_steps", num_inference_steps),
            self.guidance_scale if guidance_scale is None else real_number("guidance_scale", guidance_scale),
            self.shift if shift is None else real_number("shift", shift),
        )
        self.check(*chosen, negative_prompt)
        return chosen

    def check(self, num_inference_steps: int, guidance_scale: float, shift: float, negative_prompt: str) -> None:
        """Raises `InputError` for what the weights cannot do."""
        if self.allowed_steps is not None and num_inference_steps not in self.allowed_steps:
            counts = " or ".join(map(str, self.allowed_steps))
            raise InputError(
                f"this model is distilled for {counts} steps, got num_inference_steps {num_inference_steps}"
            )
        if self.allowed_steps is not None and not is_same_fp32(shift, self.shift):
            raise InputError(f"this model is distilled for steps with shift {self.shift:g}, got {shift:g}")
        if self.guidance_distilled and not is_same_fp32(guidance_scale, self.guidance_scale):
            raise InputError(
                f"this model has guidance of scale {self.guidance_scale:g} built in, got guidance_scale "
                f"{guidance_scale:g}; leave it out, or use the model that it was distilled from"
            )
        if self.guidance_distilled and negative_prompt:
            raise InputError(
                "this model has guidance built in, without a negative prompt; leave it out, or use the model that it "
                "was distilled from"
            )

    def guided_in(self, guidance_interval: tuple[float, float] | None) -> SamplingDefaults:
        """Returns these defaults with guidance at other flow times, [start, end); None changes nothing.

        Raises:
            InputError: it is no such interval, or the weights have guidance built in.
        """
        if guidance_interval is None:
            return self
        start, end = check_guidance_interval(guidance_interval)
        if self.guidance_distilled:
            raise InputError(
                "this model has guidance built in at all times, got guidance_interval; leave it out, or use the model "
                "that it was distilled from"
            )
        return self.model_copy(update={"guidance_interval": (start, end)})

    def row_scale(self, guidance_scale: float, t: float) -> float:
        """Returns the scale that combines an image's rows at time t: 1, for a single row, without guidance there."""
        start, end = self.guidance_interval
        return guidance_scale if start <= t < end and not self.guidance_distilled else 1.0

    def scaled_steps(self, factor: float) -> int:
        """Returns the default number of steps times a factor, or the allowed number nearest to that."""
        return self.nearest_steps(max(1, round(self.num_inference_steps * factor)))

    def nearest_steps(self, wanted: int) -> int:
        """Returns the allowed number of steps that is nearest to the wanted one."""
        return wanted if self.allowed_steps is None else min(self.allowed_steps, key=lambda steps: abs(steps - wanted))


class Sampling(NamedTuple):
    """What to sample with."""

    num_inference_steps: int
    guidance_scale: float
    shift: float


def time_grid(num_inference_steps: int, shift: float = DEFAULT_SHIFT) -> list[float]:
    """Returns `num_inference_steps + 1` times from 0.0 (noise) to 1.0 (data), equally spaced unless shifted.

    Args:
        shift: s, which moves the noise level σ = 1 − t to s·σ / (1 + (s − 1)·σ), as in Stable Diffusion 3 (arXiv
            2403.03206, eq. 23). Above 1 the steps are shorter near the noise.

    Raises:
        InputError: fewer than one step, or a shift that is out of range.
    """
    if num_inference_steps < 1:
        raise InputError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
    if not 1 / LARGEST_SHIFT <= shift <= LARGEST_SHIFT:
        raise InputError(f"shift must be from {1 / LARGEST_SHIFT:g} to {LARGEST_SHIFT:g}, got {shift:g}")
    times = [i / num_inference_steps for i in range(num_inference_steps + 1)]
    return [t / (t + shift * (1 - t)) for t in times] if shift != 1.0 else times


def check_guidance_interval(interval: Sequence[float]) -> tuple[float, float]:
    """Returns start and end of an interval of flow times, or raises `InputError`."""
    if not isinstance(interval, Iterable) or isinstance(interval, str):
        raise InputError(f"guidance_interval must be a pair of flow times, start and end, got {interval!r}")
    times = list(interval)
    if len(times) != 2:
        raise InputError(f"guidance_interval must be a pair of flow times, start and end, got {len(times)} numbers")
    start, end = numbers_for_each("guidance_interval", times, 2)
    if not 0 <= start < end <= 1:
        raise InputError(f"guidance_interval must be flow times 0 <= start < end <= 1, got {start:g} to {end:g}")
    return start, end


def check_guidance_scale(scale: float, name: str = "guidance_scale") -> None:
    """Raises `InputError` for a scale with which latents leave the range of fp32, or of any image."""
    if not abs(scale) <= LARGEST_GUIDANCE_SCALE:
        largest = f"{LARGEST_GUIDANCE_SCALE:g}"
        raise InputError(f"{name} must be from -{largest} to {largest}, got {scale:g}")


def check_seeds(seeds: Sequence[int]) -> None:
    """Raises `InputError` for a seed that is not a non-negative 64-bit integer, the type that a service takes."""
    for seed in (min(seeds), max(seeds)):
        if not 0 <= seed <= LARGEST_SEED:
            raise InputError(f"a seed must be from 0 to {LARGEST_SEED}, got {seed}")


def check_finite(latents: np.ndarray) -> None:
    """Raises `EngineError` for latents `[B, C, H, W]` that would decode to one flat colour: not finite, or huge."""
    broken = [i for i, row in enumerate(latents) if not is_decodable(row)]
    if broken:
        fault = "beyond what decodes to an image" if np.isfinite(latents).all() else "not finite numbers"
        raise EngineError(
            f"the latents of {len(broken)} of {len(latents)} images are {fault} (image {broken[0]} is the first); try "
            "a smaller guidance scale, or an fp32 bundle"
        )


def is_decodable(latents: np.ndarray) -> bool:
    """Returns whether all latents are finite and small enough to be decoded."""
    return bool((np.abs(latents) <= LARGEST_LATENT).all())  # NaN is not


def check_moved(noise: np.ndarray, latents: np.ndarray) -> None:
    """Raises `EngineError` if sampling left the noise as it was, as the velocity of untrained experts does."""
    if np.array_equal(noise, latents):
        raise EngineError(
            "the experts predict no velocity, so the images are still noise: the checkpoint is untrained; "
            "train its flow layers, and export its bundle again"
        )


def initial_latents(seeds: Sequence[int], shape: tuple[int, int, int]) -> np.ndarray:
    """Draws x₀ ~ N(0, I) for every seed with NumPy's Philox: `[len(seeds), C, H, W]` float32.

    An image's noise depends on its own seed only: not on its place in a batch, and not on the device.
    """
    rows = [np.random.Generator(np.random.Philox(seed)).standard_normal(shape, np.float32) for seed in seeds]
    return np.stack(rows)
