"""The command `fidelity`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image
from rich.progress import Progress
from rich.table import Table

from latte.checkpoint import load_checkpoint, load_image_processor, resolve_checkpoint
from latte.data.batches import Choices
from latte.data.images import BadRowError, ImagePolicy, render
from latte.data.pixel_rows import PixelRows
from latte.data.source import open_data_set
from latte.fidelity.distances import frechet_distance, kernel_distance
from latte.fidelity.features import image_features
from latte.model import LatteFlow
from runtime.console import progress_bar, stderr, stdout
from runtime.errors import InputError
from runtime.files import make_writable_folder
from runtime.images import save_png

PROMPTS_AT_ONCE = 16
PLAIN = Choices(caption=0, dropout=1, flip=1, place=0.5)
"""A row's first caption, and its image as it is."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def fidelity(
    checkpoint: Annotated[str, typer.Argument(help="The name of a shipped checkpoint, or a folder.")],
    data: Annotated[str, typer.Option(help="Data set of images with captions, as for `train`.")],
    split: Annotated[str, typer.Option(help="Split of the data with held-out images.")] = "test",
    count: Annotated[int, typer.Option(help="Number of held-out images, and of generated ones.", min=4)] = 2048,
    images: Annotated[
        Path | None, typer.Option(help="Folder of images that were generated elsewhere, instead.", metavar="DIR")
    ] = None,
    features: Annotated[
        str | None, typer.Option(help="Checkpoint whose vision tower sees the images. Default: CHECKPOINT.")
    ] = None,
    num_inference_steps: Annotated[int | None, typer.Option(help="Number of sampling steps.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first image; the next has the next seed.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write the images into `generated` and `held-out` here, for other tools."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure how far generated images are from held-out ones: Fréchet and kernel distance.

    Each held-out image's first caption is drawn. The features are those of the VLM's own vision tower, so the figures
    compare with each other, not with the FID and KID of a paper.

    \b
    Examples:
      latte-flow fidelity run/checkpoint --data my-images --split validation
      latte-flow fidelity run/checkpoint --data my-images --features my-checkpoint --out images
    """
    model = load_checkpoint(checkpoint).to("cuda" if torch.cuda.is_available() else "cpu")
    policy = _policy_of(model)
    held_out, prompts = _held_out(data, split, count, policy)
    with progress_bar() as progress:
        if images is None:
            generated = _generate(model, prompts, num_inference_steps, guidance_scale, seed, progress)
        else:
            generated = _read_images(images, policy)[:count]
        if out is not None:
            _write(generated, out / "generated")
            _write(held_out, out / "held-out")
        seeing = resolve_checkpoint(features or checkpoint)
        vlm = model.vlm if features is None else load_checkpoint(seeing).vlm.to(model.vlm.device)
        processor = load_image_processor(seeing)
        task = progress.add_task("compute features", total=len(generated) + len(held_out))
        ours, theirs = (
            image_features(vlm, processor, part, lambda n: progress.advance(task, n)) for part in (generated, held_out)
        )
    _report(ours, theirs, as_json)


def _policy_of(model: LatteFlow) -> ImagePolicy:
    factor = model.config.vae_scale_factor
    height, width = (factor * side for side in model.config.latent_size)
    return ImagePolicy(height, width, factor)


def _held_out(data: str, split: str, count: int, policy: ImagePolicy) -> tuple[list[np.ndarray], list[str]]:
    """Returns the first images of a split, each `[height, width, 3]` uint8, with their first captions."""
    data_set = open_data_set(data, split)
    rows = PixelRows(data_set, policy)
    images: list[np.ndarray] = []
    prompts: list[str] = []
    for number in range(len(data_set)):
        if len(images) == count:
            break
        try:
            row = rows.load(number, 0, PLAIN)
        except BadRowError as error:
            stderr.print(f"left out {rows.name_of(number)}: {error}", style="yellow", markup=False, soft_wrap=True)
            continue
        assert row.pixels is not None
        images.append(row.pixels)
        prompts.append(row.prompt)
    return images, prompts


def _generate(
    model: LatteFlow,
    prompts: Sequence[str],
    steps: int | None,
    guidance_scale: float | None,
    seed: int,
    progress: Progress,
) -> list[np.ndarray]:
    task = progress.add_task("draw", total=len(prompts))
    images: list[np.ndarray] = []
    for start in range(0, len(prompts), PROMPTS_AT_ONCE):
        part = prompts[start : start + PROMPTS_AT_ONCE]
        images += list(
            model.generate(part, num_inference_steps=steps, guidance_scale=guidance_scale, seed=seed + start)
        )
        progress.advance(task, len(part))
    return images


def _read_images(folder: Path, policy: ImagePolicy) -> list[np.ndarray]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if len(paths) < 4:
        raise InputError(f"{folder} contains {len(paths)} images; at least 4 are needed")
    images = []
    for path in paths:
        try:
            images.append(render(path.read_bytes(), policy, policy.sizes[0]))
        except BadRowError as error:
            raise InputError(f"{path} cannot be used: {error}") from error
    return images


def _write(images: Sequence[np.ndarray], folder: Path) -> None:
    make_writable_folder(folder)
    for number, image in enumerate(images):
        save_png(Image.fromarray(image), folder / f"{number:05}.png")


def _report(generated: np.ndarray, held_out: np.ndarray, as_json: bool) -> None:
    kernel = kernel_distance(generated, held_out)
    report = {
        "generated_images": len(generated),
        "held_out_images": len(held_out),
        "features": held_out.shape[1],
        "frechet_distance": frechet_distance(generated, held_out),
        "frechet_distance_of_halves": frechet_distance(held_out[::2], held_out[1::2]),
        "kernel_distance": kernel.mean,
        "kernel_distance_std": kernel.std,
    }
    if min(len(generated), len(held_out)) <= held_out.shape[1]:
        message = f"note: with fewer images than features ({held_out.shape[1]}) the Fréchet distance is far too large"
        stderr.print(message, style="yellow", soft_wrap=True)
    if as_json:
        typer.echo(json.dumps(report))
        return
    table = Table("", "distance", title=f"{len(generated):,} generated and {len(held_out):,} held-out images")
    table.add_row("Fréchet distance", f"{report['frechet_distance']:.4g}")
    table.add_row("kernel distance", f"{kernel.mean:.4g} ± {kernel.std:.2g}", end_section=True)
    table.add_row("Fréchet distance of the held-out images' halves", f"{report['frechet_distance_of_halves']:.4g}")
    stdout.print(table)
