"""What the parts of the model do for training: the number of expert groups, and residual attention.

Each variant trains flow layers of its own on the frozen VLM and autoencoder of a checkpoint, with the same seed, number
of steps and settings. A step trains one group, and groups take turns. A variant without residual
attention keeps its gates at zero. The budget is small: it shows how fast variants learn, not how good they become.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.table import Table

from export.benchmarks.report import AsJson, Publisher, app
from latte.checkpoint import assemble, load_checkpoint
from latte.model import LatteFlow
from latte.shapes.autoencoder import to_pixels
from latte.shapes.captions import training_caption
from latte.shapes.flow import ShapesFlowStage
from latte.shapes.recipe import Shapes
from latte.shapes.scenes import draw, sample_scene
from latte.training.arguments import MixedPrecision
from latte.training.log import LOG
from latte.training.loop import train
from latte.training.settings import TrainSettings
from runtime.console import stdout

HELD_OUT_IMAGES = 256
EVALUATION_BATCH = 64
WINDOW = 10
"""Lines of the log over which a training loss is averaged."""
SHARES = (0.25, 0.5, 1.0)
"""Shares of the budget at which training losses are reported."""


@dataclass(frozen=True)
class Variant:
    """One model to train."""

    groups: int
    residual: bool = True

    @property
    def name(self) -> str:
        """A name that is also a folder's."""
        return f"{self.groups}-groups" if self.residual else f"{self.groups}-groups-without-residual"


VARIANTS = (Variant(1), Variant(2), Variant(4), Variant(4, residual=False), Variant(8))
"""One group is the dense model: all layers run in every step. With one layer in a group nothing is handed on."""


@dataclass(frozen=True)
class VariantResult:
    """What a variant learned within the budget."""

    variant: str
    layers: int
    """Number of layers that a sampling step runs."""
    seconds_per_step: float
    steps: list[int]
    losses: list[float]
    """Training losses at `steps`, the mean over groups."""
    held_out_loss: float
    """The error of the velocity, squared, over held-out scenes and all flow times, with the averaged weights."""


def train_variant(variant: Variant, base: LatteFlow, settings: TrainSettings, out: Path) -> VariantResult:
    """Trains a variant in `out`, or goes on from the state there, and measures it.

    Args:
        base: a checkpoint; its VLM and autoencoder are used.
    """
    config = base.config
    torch.manual_seed(settings.seed)
    model = assemble(
        base.vlm,
        base.vae,
        base.tokenizer,
        num_groups=variant.groups,
        latent_size=config.latent_size,
        latents_mean=config.latents_mean,
        latents_std=config.latents_std,
        max_prompt_tokens=config.max_prompt_tokens,
    )
    if not variant.residual:
        for layer in model.flow.layers:
            if layer.attention_gate is not None:
                layer.attention_gate.requires_grad_(False)  # zero at initialisation
    folder = out / variant.name
    train(ShapesFlowStage(model, settings.seed), settings, folder)
    rows = [json.loads(line) for line in (folder / LOG).read_text(encoding="utf-8").splitlines()]
    steps, losses = smoothed(rows)
    return VariantResult(
        variant=variant.name,
        layers=config.num_hidden_layers // variant.groups,
        seconds_per_step=rows[-1]["seconds"] / rows[-1]["step"],
        steps=steps,
        losses=losses,
        held_out_loss=held_out_loss(model, settings.seed),
    )


def smoothed(rows: Sequence[Mapping[str, float]]) -> tuple[list[int], list[float]]:
    """Returns steps, and losses averaged over groups and over `WINDOW` lines of a log."""
    means = [float(np.mean([row[name] for name in row if name.startswith("group_")])) for row in rows]
    width = min(WINDOW, len(means))
    averages = np.convolve(means, np.ones(width) / width, mode="valid")
    return [int(row["step"]) for row in rows[width - 1 :]], [float(value) for value in averages]


@torch.no_grad()
def held_out_loss(model: LatteFlow, seed: int) -> float:
    """Measures the loss of flow matching on scenes that training never renders, with flow times all over [0, 1)."""
    rng = np.random.default_rng([seed, 2])
    generator = torch.Generator().manual_seed(seed)
    schedule, errors = model.config.schedule, []
    for first in range(0, HELD_OUT_IMAGES, EVALUATION_BATCH):
        scenes = [sample_scene(rng, held_out=True) for _ in range(EVALUATION_BATCH)]
        data = model.encode_images(
            to_pixels(np.stack([draw(scene) for scene in scenes])).to(model.latents_mean.device)
        ).float()
        prefix = model.encode_prompts([training_caption(scene, rng)[0] for scene in scenes])
        noise = torch.randn(data.shape, generator=generator)
        t = first + torch.arange(EVALUATION_BATCH) + torch.rand(EVALUATION_BATCH, generator=generator)
        t = t.remainder(EVALUATION_BATCH) / EVALUATION_BATCH
        x = t[:, None, None, None] * data + (1 - t)[:, None, None, None] * noise
        groups = [schedule.group_of(float(time)) for time in t]
        for group in sorted(set(groups)):
            rows = [row for row, its_group in enumerate(groups) if its_group == group]
            its_prefix = prefix.rows(rows)
            error = model.flow(x[rows], t[rows], its_prefix.kv[group], its_prefix.mask, group) - (data - noise)[rows]
            errors += error.square().flatten(1).mean(1).tolist()
    return float(np.mean(errors))


def plot_ablations(results: Sequence[VariantResult], path: Path) -> None:
    """Plots the training losses of all variants over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for result in results:
        axes.plot(result.steps, result.losses, label=result.variant.replace("-", " "))
    axes.set(xlabel="step", ylabel="training loss, mean over groups", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


@app.command(no_args_is_help=False)
def ablations(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the runs; runs that were stopped continue.")],
    checkpoint: Annotated[
        str, typer.Option(help="`shapes`, or a checkpoint like it: its VLM and autoencoder.")
    ] = "shapes",
    steps: Annotated[int, typer.Option(help="Number of steps of each variant.", min=20)] = 4000,
    batch_size: Annotated[int, typer.Option(help="Rows per step.", min=1)] = Shapes.settings["flow"].train_batch_size,
    seed: Annotated[int, typer.Option(help="Seed of everything random.", min=0)] = 0,
    mixed_precision: Annotated[
        MixedPrecision, typer.Option(help="bf16 is faster on processors that support it.")
    ] = "no",
    plot: Annotated[Path | None, typer.Option(help="Write a plot of the losses to this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Train variants within a small budget: 1, 2, 4 and 8 expert groups, and no residual attention.

    \b
    Examples:
      latte-flow bench ablations --out ablations
      latte-flow bench ablations --out ablations --steps 8000 --mixed-precision bf16 --plot ablations.png
    """
    publisher = Publisher(as_json)
    changes = {
        "max_train_steps": steps,
        "train_batch_size": batch_size,
        "seed": seed,
        "mixed_precision": mixed_precision,
    }
    settings = TrainSettings.model_validate(Shapes.settings["flow"].model_dump() | changes)
    base = load_checkpoint(checkpoint)
    results = [train_variant(variant, base, settings, out) for variant in VARIANTS]
    if plot is not None:
        plot_ablations(results, plot)

    def show() -> None:
        shown = [f"loss at {share:.0%}" for share in SHARES]
        title = f"{steps} steps of {batch_size} rows, seed {seed}, mixed precision: {mixed_precision}"
        table = Table("variant", "layers in a step", "ms per step", *shown, "held-out loss", title=title)
        for result in results:
            places = [int(np.searchsorted(result.steps, share * steps)) for share in SHARES]
            losses = [f"{result.losses[min(place, len(result.losses) - 1)]:.4f}" for place in places]
            cost = f"{1000 * result.seconds_per_step:.0f}"
            table.add_row(result.variant, str(result.layers), cost, *losses, f"{result.held_out_loss:.4f}")
        stdout.print(table)

    publisher.publish(
        {"steps": steps, "batch_size": batch_size, "seed": seed, "variants": [asdict(r) for r in results]}, show
    )
