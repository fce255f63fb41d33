"""Quality against cost: how many steps, of which solver, on which time grid, and when guidance is worth its rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export.verify import psnr_db
from latte.model import LatteFlow
from latte.score import held_out_prompts, score_drawing
from runtime.schedule import time_grid

STEPS = (4, 8, 12, 20, 40)
SCALE = 3.0
FINE_STEPS = 200
"""Of the solution that PSNR is measured against: Euler, uniform grid, guidance throughout."""
PSNR_PICTURES = 32
SAMPLERS: dict[str, dict[str, Any]] = {
    "Euler": {},
    "Heun": {"solver": "heun"},
    "Euler, shift 2": {"shift": 2.0},
    "Euler, shift 0.5": {"shift": 0.5},
    "Euler, guidance for t < 0.5": {"guidance_interval": (0.0, 0.5)},
    "Euler, guidance for t < 0.75": {"guidance_interval": (0.0, 0.75)},
    "Euler, guidance for t >= 0.25": {"guidance_interval": (0.25, 1.0)},
}
SETTINGS = tuple(itertools.product(SAMPLERS, STEPS))


@dataclass(frozen=True)
class Point:
    """One sampler with one number of steps."""

    sampler: str
    steps: int
    rows: int
    """Of experts, for an image: what it costs."""
    right: tuple[float, float]
    """Share of prompts of one and of two shapes that came out right in every attribute."""
    psnr_db: float
    """Against many steps from the same noise, the mean over pictures."""


def measure_steps(model: LatteFlow, prompts: int) -> Iterator[Point]:
    """Every sampler at every number of steps, on the same prompts and noise."""
    texts = [text for text, _ in held_out_prompts(PSNR_PICTURES, 1, 1)]
    fine = _draw(model, texts, range(PSNR_PICTURES), FINE_STEPS, {})
    for sampler, steps in SETTINGS:
        options = SAMPLERS[sampler]

        def draw(texts: Sequence[str], seeds: Sequence[int], steps: int = steps, options: Any = options) -> np.ndarray:
            return _draw(model, texts, seeds, steps, options)

        right = tuple(score_drawing(draw, prompts, shapes).share() for shapes in (1, 2))
        pictures = draw(texts, range(PSNR_PICTURES))
        psnr = [psnr_db(picture, expected) or 0.0 for picture, expected in zip(pictures, fine, strict=True)]
        yield Point(sampler, steps, rows_of(steps, options), (right[0], right[1]), float(np.mean(psnr)))


def rows_of(steps: int, options: dict[str, Any]) -> int:
    """Rows that an image takes through experts: one for each look at the velocity, two with guidance."""
    start, end = options.get("guidance_interval", (0.0, 1.0))
    rows = sum(2 if start <= t < end else 1 for t in time_grid(steps, options.get("shift", 1.0))[:-1])
    return rows * (2 if options.get("solver") == "heun" else 1)


def _draw(
    model: LatteFlow, texts: Sequence[str], seeds: Sequence[int], steps: int, options: dict[str, Any]
) -> np.ndarray:
    return model.generate(list(texts), seed=list(seeds), num_inference_steps=steps, guidance_scale=SCALE, **options)


def plot_steps(points: Sequence[Point], path: Path) -> None:
    """Share of right pictures, and PSNR, over the cost."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for sampler in SAMPLERS:
        ours = [point for point in points if point.sampler == sampler]
        rows = [point.rows for point in ours]
        left.plot(rows, [100 * point.right[1] for point in ours], marker="o", label=sampler)
        right.plot(rows, [point.psnr_db for point in ours], marker="o", label=sampler)
    for axes, label in ((left, "two-shape prompts right, %"), (right, "PSNR against 200 steps, dB")):
        axes.set_xscale("log")
        axes.set_xlabel("expert rows for an image")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.savefig(path, dpi=120)
