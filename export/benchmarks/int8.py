"""What INT8 costs and gives on `shapes`: size, speed, pictures and answers beside fp32, in one run."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.quantization import ENGINES, QuantizationSettings, quantize_bundle
from export.verify import psnr_db
from latte.score import held_out_prompts, score_answers, score_drawing
from runtime.manifest import load_manifest
from runtime.pipeline import LatteFlowPipeline

MAX_ERRORS = (0.005, 0.02, 0.05, 1.0)
"""Limits to compare; the last quantises every product."""
PICTURES = (1, 8)
"""In a timed call."""
PSNR_PICTURES = 32


@dataclass(frozen=True)
class Variant:
    """One bundle."""

    name: str
    bundle: Path


@dataclass(frozen=True)
class Row:
    """What one bundle does."""

    name: str
    megabytes: float
    """Of the engines that are quantised: VLM, vision tower, experts."""
    quantized_share: float
    """Of the products with weights."""
    call_seconds: dict[str, list[float]]
    """Of 20 guided steps, by the number of pictures."""
    psnr_db: float
    """Against fp32, pooled over pictures."""
    right: dict[str, float]
    """Shares of one-shape prompts, two-shape prompts and questions."""


def quantized_variants(bundle: Path, folder: Path, on_stage: Callable[[str], None]) -> list[Variant]:
    """The fp32 bundle itself, and its INT8 forms at each limit, in a folder."""
    variants = [Variant("fp32", bundle)]
    for limit in MAX_ERRORS:
        name = "int8, all" if limit >= 1 else f"int8, {limit:.1%}"
        on_stage(f"quantise: {name}")
        variants.append(Variant(name, folder / f"int8-{limit:g}"))
        shutil.copytree(bundle, variants[-1].bundle)
        quantize_bundle(variants[-1].bundle, QuantizationSettings(max_error=limit))
    return variants


def measure_int8(
    variants: Sequence[Variant],
    prompts: int,
    questions: int,
    rounds: int,
    on_progress: Callable[[], None] = lambda: None,
) -> list[Row]:
    """Scores each bundle, and times them by turns; the first is what the others are compared with.

    Args:
        prompts: held-out ones of one and of two shapes, each.
    """
    pipes = [LatteFlowPipeline.from_pretrained(variant.bundle) for variant in variants]
    times: list[dict[str, list[float]]] = [{str(n): [] for n in PICTURES} for _ in variants]
    for turn in range(rounds + 1):
        for pipe, of_one in zip(pipes, times, strict=True):
            for pictures in PICTURES:
                started = time.perf_counter()
                pipe("a small red circle", num_images_per_prompt=pictures, seed=turn, output_type="latent")
                if turn:  # the first warms up
                    of_one[str(pictures)].append(time.perf_counter() - started)
        on_progress()
    texts = [text for text, _ in held_out_prompts(PSNR_PICTURES, 1, seed=2)]
    rows: list[Row] = []
    reference: np.ndarray | None = None
    for variant, pipe, of_one in zip(variants, pipes, times, strict=True):
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
            Row(
                variant.name,
                _megabytes(variant.bundle),
                _quantized_share(variant.bundle),
                of_one,
                psnr_db(images, reference) or 0.0,
                right,
            )
        )
        pipe.close()
    return rows


def speedup(row: Row, reference: Row, pictures: int) -> float:
    """How many times faster a call is."""
    old, new = (statistics.median(r.call_seconds[str(pictures)]) for r in (reference, row))
    return old / new


def _megabytes(bundle: Path) -> float:
    engines = [engine for engine in load_manifest(bundle).engines if engine.name.startswith(ENGINES)]
    return sum(file.size for engine in engines for file in engine.files) / 1e6


def _quantized_share(bundle: Path) -> float:
    quantizations = [engine.quantization for engine in load_manifest(bundle).engines if engine.quantization is not None]
    quantized = sum(len(q.quantized) for q in quantizations)
    return quantized / max(1, quantized + sum(len(q.kept) for q in quantizations))
