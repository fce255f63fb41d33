"""INT8 and FP8 against fp32 on `shapes`: size, speed, error of the velocity, images and answers, in one run.

ONNX Runtime computes FP8 as its graph says, in fp16 and slowly; the images are those of a GPU but for rounding.
"""

from __future__ import annotations

import math
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.table import Table

from export.benchmarks.report import Against, AsJson, Publisher, app, bundle_for_the_run
from export.benchmarks.timing import take_turns
from export.bundle import export_bundle
from export.commands import staged
from export.float8 import quantize_to_float8
from export.parity import psnr_db, relative_error
from export.quantization import GUIDANCE_SCALES, QUANTIZED_ROLES, QuantizationSettings, quantize_bundle
from latte.shapes.score import held_out_prompts, score_answers, score_drawing
from runtime.backends import to_host
from runtime.console import progress_bar, stdout
from runtime.flow_time import initial_latents, time_grid
from runtime.manifest import load_manifest
from runtime.pipeline import LatteFlowPipeline

MAX_ERRORS = (0.02, 0.05, 0.1, math.inf)
"""Limits to compare; the last quantises every product."""
FLOAT8_MAX_ERRORS = (0.05, 0.1, math.inf)
IMAGES = (1, 8)
"""In a timed call."""
PSNR_IMAGES = 32
VELOCITY_STEPS = 8


@dataclass(frozen=True)
class Variant:
    """One bundle."""

    name: str
    bundle: Path


@dataclass(frozen=True)
class VariantResult:
    """The measurements of one bundle."""

    name: str
    megabytes: float
    """Size of the engines that can be quantised: VLM, vision tower, experts."""
    quantized_share: float
    """Share of the matrix products with weights."""
    call_seconds: dict[str, list[float]]
    """Times of 20 guided steps, by the number of images."""
    velocity_error: dict[str, float]
    """Largest relative error of the guided velocity in any of 8 steps from fp32's latents, by guidance scale."""
    psnr_db: float
    """Against fp32, pooled over all images."""
    right: dict[str, float]
    """Shares of correct one-shape prompts, two-shape prompts and answers."""


def quantized_variants(
    bundle: Path, checkpoint: str, folder: Path, on_stage: Callable[[str], None], *, float8: bool = False
) -> list[Variant]:
    """Quantises an fp32 bundle at each limit, into a folder; returns the bundle itself and its INT8 forms.

    Args:
        checkpoint: what the bundle was exported from.
        float8: add the FP8 forms.
    """
    variants = [Variant("fp32", bundle)]
    for limit in MAX_ERRORS:
        name = _name("int8", limit)
        on_stage(f"quantise: {name}")
        variants.append(Variant(name, folder / f"int8-{limit:g}"))
        shutil.copytree(bundle, variants[-1].bundle)
        quantize_bundle(variants[-1].bundle, QuantizationSettings(max_error=limit))
    if float8:
        export_bundle(checkpoint, folder / "fp16", precision="fp16", verify=False)
    for limit in FLOAT8_MAX_ERRORS if float8 else ():
        on_stage(f"quantise: {_name('fp8', limit)}")
        variants.append(Variant(_name("fp8", limit), folder / f"fp8-{limit:g}"))
        shutil.copytree(folder / "fp16", variants[-1].bundle)
        quantize_to_float8(variants[-1].bundle, bundle, QuantizationSettings(max_error=limit))
    return variants


def _name(precision: str, limit: float) -> str:
    return f"{precision}, all" if limit == math.inf else f"{precision}, {limit:.1%}"


def measure_int8(
    variants: Sequence[Variant],
    prompts: int,
    questions: int,
    rounds: int,
    on_progress: Callable[[], None] = lambda: None,
) -> list[VariantResult]:
    """Scores each bundle and times them in turns; the others are compared with the first.

    Args:
        prompts: number of held-out prompts with one shape, and with two.
    """
    pipes = [LatteFlowPipeline.from_pretrained(variant.bundle, prefix_cache_bytes=0) for variant in variants]
    sides = {(i, count): partial(_draw, pipe, count) for i, pipe in enumerate(pipes) for count in IMAGES}
    turns = take_turns(sides, rounds, on_progress)
    texts = [text for text, _ in held_out_prompts(PSNR_IMAGES, 1, seed=2)]
    rows: list[VariantResult] = []
    reference: np.ndarray | None = None
    for i, (variant, pipe) in enumerate(zip(variants, pipes, strict=True)):
        images = np.asarray(pipe(texts, seed=list(range(len(texts))), output_type="np").images)
        reference = images if reference is None else reference
        right = {}
        for shapes in (1, 2):
            drawing = score_drawing(
                lambda prompts, seeds, pipe=pipe: np.asarray(  # type: ignore[misc]
                    pipe(list(prompts), seed=list(seeds), output_type="np").images
                ),
                prompts,
                shapes,
            )
            right[f"{shapes}_shape"] = drawing.share()
            on_progress()
        answers = score_answers(lambda images, asked, pipe=pipe: pipe.ask(list(images), list(asked)), questions)  # type: ignore[misc]
        right["answers"] = answers.share()
        on_progress()
        rows.append(
            VariantResult(
                variant.name,
                _megabytes(variant.bundle),
                _quantized_share(variant.bundle),
                {str(count): turns[i, count].seconds for count in IMAGES},
                {f"{scale:g}": velocity_error(pipe, pipes[0], texts, scale) for scale in GUIDANCE_SCALES},
                psnr_db(images, reference) or 0.0,
                right,
            )
        )
    for pipe in pipes:
        pipe.close()
    return rows


def velocity_error(
    pipe: LatteFlowPipeline, reference: LatteFlowPipeline, prompts: Sequence[str], scale: float
) -> float:
    """Returns the largest relative error of the guided velocity in any step, with the reference's latents as input."""
    geometry = reference.manifest.geometry
    count = len(prompts)
    x = initial_latents(list(range(count)), (geometry.latent_channels, *geometry.latent_size))
    samplers = [side.sampler(prompts, [""] * count, [scale] * count) for side in (reference, pipe)]
    errors = []
    for inputs in samplers[0].step_inputs(time_grid(VELOCITY_STEPS)):
        expected, value = (to_host(sampler.step(x, sampler.rows_of(x), inputs)[0]) for sampler in samplers)
        errors.append(relative_error(value - x, expected - x))  # a step is the velocity times its length
        x = expected
    return max(errors)


def _draw(pipe: LatteFlowPipeline, images: int, turn: int) -> None:
    pipe("a small red circle", num_images_per_prompt=images, seed=turn, output_type="latent")


def speedup(result: VariantResult, reference: VariantResult, images: int) -> float:
    """Returns how many times as fast a call is."""
    old, new = (statistics.median(r.call_seconds[str(images)]) for r in (reference, result))
    return old / new


def _megabytes(bundle: Path) -> float:
    engines = [engine for engine in load_manifest(bundle).engines if engine.role in QUANTIZED_ROLES]
    return sum(file.size for engine in engines for file in engine.files) / 1e6


def _quantized_share(bundle: Path) -> float:
    quantizations = [engine.quantization for engine in load_manifest(bundle).engines if engine.quantization is not None]
    quantized = sum(len(q.quantized) for q in quantizations)
    return quantized / max(1, quantized + sum(len(q.kept) for q in quantizations))


@app.command(no_args_is_help=False)
def int8(
    checkpoint: Annotated[str, typer.Argument(help="`shapes`, or a checkpoint trained like it.")] = "shapes",
    bundle: Annotated[Path | None, typer.Option(help="An fp32 bundle; by default one is exported for the run.")] = None,
    prompts: Annotated[int, typer.Option(help="Number of held-out prompts of each kind.", min=1)] = 500,
    questions: Annotated[int, typer.Option(help="Number of held-out questions.", min=1)] = 500,
    rounds: Annotated[int, typer.Option(help="Number of timed calls of each kind.", min=1)] = 15,
    float8: Annotated[
        bool,
        typer.Option("--fp8", help="Score FP8 too, which is for GPUs: here its times say nothing."),
    ] = False,
    against: Against = None,
    as_json: AsJson = False,
) -> None:
    """Measure INT8 against fp32 on the CPU: size, speed, error of the velocity, and the score of images and answers.

    \b
    Examples:
      latte-flow bench int8
      latte-flow bench int8 my-checkpoint --prompts 100 --json
      latte-flow bench int8 --fp8 --prompts 200 --rounds 1
    """
    publisher = Publisher(as_json, against)
    with bundle_for_the_run(bundle, checkpoint) as bundle, tempfile.TemporaryDirectory() as temporary:
        with staged() as on_stage:
            variants = quantized_variants(bundle, checkpoint, Path(temporary), on_stage, float8=float8)
        with progress_bar() as progress:
            task = progress.add_task("time and score", total=rounds + 1 + 3 * len(variants))
            rows = measure_int8(variants, prompts, questions, rounds, lambda: progress.advance(task))

    def show() -> None:
        table = Table(
            "",
            "products",
            "MB",
            *(f"{n} image{'s' * (n > 1)}" for n in IMAGES),
            *(f"velocity, scale {scale:g}" for scale in GUIDANCE_SCALES),
            "PSNR",
            "1 shape",
            "2 shapes",
            "answers",
            title="error allowed to an engine; speed of the steps of a call against fp32",
        )
        for row in rows:
            faster = (f"{speedup(row, rows[0], n):.2f}x" for n in IMAGES)
            right = (f"{row.right[what]:.1%}" for what in ("1_shape", "2_shape", "answers"))
            off = ("" if row is rows[0] else f"{error:.1%}" for error in row.velocity_error.values())
            psnr = "" if row is rows[0] else f"{row.psnr_db:.1f} dB"
            table.add_row(row.name, f"{row.quantized_share:.0%}", f"{row.megabytes:.1f}", *faster, *off, psnr, *right)
        stdout.print(table)

    publisher.publish({"prompts": prompts, "questions": questions, "rows": [asdict(row) for row in rows]}, show)
