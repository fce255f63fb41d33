"""A provider on this machine: does it compute what PyTorch computes, what does it draw, how fast is it?

Made for a GPU that is at hand for a few minutes; `make bench-gpu` runs it for CUDA.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from export.bundle import export_bundle
from export.verify import verify_bundle
from latte.model import LatteFlow
from runtime.manifest import ParityRow, Precision
from runtime.pictures import contact_sheet, save_png
from runtime.pipeline import LatteFlowPipeline

PROMPTS = ("a small red circle", "a large green star above a small blue square", "a pink ring", "a large orange cross")
BATCHES = (1, 8)
"""Pictures in one call."""


@dataclass(frozen=True)
class Timing:
    """Median time of a call."""

    precision: str
    provider: str
    options: str
    pictures: int
    milliseconds: float


@dataclass(frozen=True)
class ProviderReport:
    """All that one run found."""

    parity: dict[str, list[ParityRow]]
    """By precision."""
    timings: list[Timing]
    sheets: list[Path]


def run_provider(
    checkpoint: str,
    model: LatteFlow,
    provider: str,
    out: Path,
    precisions: tuple[Precision, ...],
    variants: tuple[Mapping[str, str], ...],
    rounds: int,
    on_stage: Callable[[str], None],
) -> ProviderReport:
    """Exports, verifies on the provider, draws, and times; the CPU beside it in the same run.

    Args:
        variants: provider options to time side by side, the defaults first.
        rounds: calls of each; the variants take turns.
    """
    report = ProviderReport({}, [], [])
    for precision in precisions:
        bundle = out / f"bundle-{precision}"
        on_stage(f"{precision}: export")
        export_bundle(checkpoint, bundle, precision=precision, verify=False, force=True)
        on_stage(f"{precision}: verify on {provider}")
        report.parity[precision] = verify_bundle(bundle, model, provider)
        on_stage(f"{precision}: draw and time")
        sides = [(provider, options) for options in variants] + [("cpu", {})] * (provider != "cpu")
        pipes = [LatteFlowPipeline.from_pretrained(bundle, name, options) for name, options in sides]
        images = pipes[0](list(PROMPTS), seed=0).images
        sheet = out / f"{provider}-{precision}.png"
        save_png(contact_sheet(images, PROMPTS), sheet)
        report.sheets.append(sheet)
        for pictures in BATCHES:
            times: list[list[float]] = [[] for _ in pipes]
            for turn in range(rounds + 1):
                for pipe, taken in zip(pipes, times, strict=True):
                    started = time.perf_counter()
                    pipe("a red star", num_images_per_prompt=pictures, seed=turn)
                    taken.append(time.perf_counter() - started)
            for (name, options), taken in zip(sides, times, strict=True):
                shown = ", ".join(f"{key}={value}" for key, value in options.items())
                milliseconds = 1000 * statistics.median(taken[1:])  # the first call warms up
                report.timings.append(Timing(precision, name, shown, pictures, milliseconds))
        for pipe in pipes:
            pipe.close()
    return report
