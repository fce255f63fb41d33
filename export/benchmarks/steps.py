"""Quality against cost: number of steps, solver, time grid, and the interval with guidance."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.table import Table

from export.benchmarks.report import AsJson, Publisher, app
from export.parity import psnr_db
from latte.checkpoint import load_checkpoint
from latte.model import LatteFlow
from latte.shapes.score import held_out_prompts, score_drawing
from runtime.console import progress_bar, stdout
from runtime.flow_time import initial_latents, time_grid

STEPS = (4, 8, 12, 20, 40)
FINE_STEPS = 200
"""Steps of the solution that PSNR is measured against: Euler, uniform time grid, guidance throughout."""
PSNR_IMAGES = 32
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
DISTILLED = "distilled"
"""The sampler of a distilled checkpoint: Euler with one row for an image, by a uniform time grid."""
DISTILLED_STEPS = (1, 2, 4, 8)
"""Numbers of steps of a distilled checkpoint, also those that it is not meant for."""


@dataclass(frozen=True)
class SamplerResult:
    """The quality and the cost of one sampler with one number of steps."""

    sampler: str
    steps: int
    rows: int
    """Expert rows for one image: the cost."""
    right: tuple[float, float]
    """Shares of one-shape and two-shape prompts whose images are right in every attribute."""
    psnr_db: float
    """Against many steps from the same noise, averaged over images."""


def measure_steps(
    model: LatteFlow, prompts: int, guidance_scale: float, distilled: LatteFlow | None = None
) -> Iterator[SamplerResult]:
    """Measures every sampler with every number of steps, on the same prompts and noise.

    Args:
        distilled: a student of the model, to compare with it.
    """
    texts = [text for text, _ in held_out_prompts(PSNR_IMAGES, 1, 1)]
    guided = partial(model.generate, guidance_scale=guidance_scale)
    fine = _draw(guided, texts, range(PSNR_IMAGES), FINE_STEPS, {})
    sides = [
        (sampler, steps, partial(_draw, guided, steps=steps, options=SAMPLERS[sampler])) for sampler, steps in SETTINGS
    ]
    if distilled is not None:
        sides += [(DISTILLED, steps, partial(_draw_distilled, distilled, steps=steps)) for steps in DISTILLED_STEPS]
    for sampler, steps, draw in sides:
        right = tuple(score_drawing(draw, prompts, shapes).share() for shapes in (1, 2))
        images = draw(texts, range(PSNR_IMAGES))
        psnr = [psnr_db(image, expected) or 0.0 for image, expected in zip(images, fine, strict=True)]
        rows = steps if sampler == DISTILLED else rows_of(steps, guidance_scale, SAMPLERS[sampler])
        yield SamplerResult(sampler, steps, rows, (right[0], right[1]), float(np.mean(psnr)))


def rows_of(steps: int, guidance_scale: float, options: dict[str, Any]) -> int:
    """Returns the expert rows for one image: one for each evaluation of the velocity, two with guidance."""
    start, end = (1.0, 0.0) if guidance_scale == 1.0 else options.get("guidance_interval", (0.0, 1.0))
    rows = sum(2 if start <= t < end else 1 for t in time_grid(steps, options.get("shift", 1.0))[:-1])
    return rows * (2 if options.get("solver") == "heun" else 1)


def _draw(
    generate: Callable[..., np.ndarray],
    texts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    options: dict[str, Any],
) -> np.ndarray:
    return generate(list(texts), seed=list(seeds), num_inference_steps=steps, **options)


def _draw_distilled(model: LatteFlow, texts: Sequence[str], seeds: Sequence[int], steps: int) -> np.ndarray:
    shape = (model.config.latent_channels, *model.config.latent_size)
    noise = torch.from_numpy(initial_latents(list(seeds), shape))
    final = model.sample(texts, [""] * len(texts), [1.0] * len(texts), noise, time_grid(steps))
    with torch.no_grad():
        return model.decode_latents(final).numpy()


def plot_steps(results: Sequence[SamplerResult], path: Path) -> None:
    """Plots the share of right images, and PSNR, over the cost."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for sampler in (*SAMPLERS, DISTILLED):
        ours = [point for point in results if point.sampler == sampler]
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


@app.command(no_args_is_help=False)
def steps(
    checkpoint: Annotated[str, typer.Argument(help="`shapes`, or a checkpoint trained like it.")] = "shapes",
    distilled: Annotated[
        str | None, typer.Option(help="A checkpoint that `latte-flow distill` made of it, to compare with it.")
    ] = None,
    prompts: Annotated[int, typer.Option(help="Number of held-out prompts of each kind.", min=1)] = 100,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Guidance scale; by default the checkpoint's. A distilled one has its own.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot of score and PSNR over cost to this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure quality against the number of steps: solvers, time grids, and intervals with guidance.

    \b
    Examples:
      latte-flow bench steps
      latte-flow bench steps my-checkpoint --prompts 500 --plot steps.png
      latte-flow bench steps my-checkpoint --distilled few/checkpoint
    """
    publisher = Publisher(as_json)
    model = load_checkpoint(checkpoint)
    scale = model.config.sampling.guidance_scale if guidance_scale is None else guidance_scale
    student = None if distilled is None else load_checkpoint(distilled)
    with progress_bar() as progress:
        task = progress.add_task("draw", total=len(SETTINGS) + len(DISTILLED_STEPS) * (student is not None))
        found = []
        for point in measure_steps(model, prompts, scale, student):
            found.append(point)
            progress.advance(task)
    if plot is not None:
        plot_steps(found, plot)

    def show() -> None:
        title = f"{prompts} prompts each, guidance {scale:g}"
        table = Table("sampler", "steps", "expert rows", "1 shape", "2 shapes", "PSNR", title=title)
        for point in found:
            shares = (f"{share:.1%}" for share in point.right)
            table.add_row(point.sampler, str(point.steps), str(point.rows), *shares, f"{point.psnr_db:.1f} dB")
        stdout.print(table)

    publisher.publish({"prompts": prompts, "guidance_scale": scale, "points": [asdict(p) for p in found]}, show)
