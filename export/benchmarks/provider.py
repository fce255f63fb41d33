"""A provider on this machine: its parity with PyTorch, its images and its speed.

It is meant for a GPU that is available for a few minutes; `make bench-gpu` runs it for CUDA.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from export.benchmarks.report import app, describe_machine, print_machine
from export.benchmarks.timing import take_turns
from export.bundle import export_bundle
from export.commands import parity_table, raise_if_failed, staged
from export.plans.build import BuildOptions, build_plans
from export.reference import Reference
from export.verify import verify_bundle
from runtime.backends import PROVIDERS, open_backend
from runtime.console import stdout
from runtime.files import write_text
from runtime.flow_time import DEFAULT_STEPS
from runtime.images import contact_sheet, save_png
from runtime.manifest import ParityRow, Precision
from runtime.pipeline import LatteFlowPipeline
from runtime.plans import TENSORRT

PROMPTS = ("a small red circle", "a large green star above a small blue square", "a pink ring", "a large orange cross")
BATCHES = (1, 8)
"""Images in one call."""
VARIANTS = {"cuda": ("io_binding",), "tensorrt": ("cuda_graphs",), "tensorrt-rtx": ("cuda_graphs",)}
"""Options that are switched off in a second round of calls, by provider."""


@dataclass(frozen=True)
class CallTiming:
    """Median time of a call."""

    precision: str
    provider: str
    options: str
    images: int
    milliseconds: float


@dataclass(frozen=True)
class ProviderReport:
    """Everything that one run measured."""

    parity: dict[str, list[ParityRow]]
    """Rows of the verification, by precision."""
    timings: list[CallTiming]
    sheets: list[Path]


def run_provider(
    checkpoint: str,
    reference: Reference,
    provider: str,
    out: Path,
    precisions: tuple[Precision, ...],
    variants: tuple[Mapping[str, str], ...],
    rounds: int,
    on_stage: Callable[[str], None],
) -> ProviderReport:
    """Exports, verifies on the provider, generates images, and times calls against the CPU in the same run.

    A provider that runs TensorRT plans gets plans of the default sizes.

    Args:
        variants: provider options to time, the defaults first.
        rounds: number of calls of each variant; the variants take turns.
    """
    report = ProviderReport({}, [], [])
    for precision in precisions:
        bundle = out / f"bundle-{precision}"
        on_stage(f"{precision}: export")
        export_bundle(checkpoint, bundle, precision=precision, verify=False, force=True)
        if provider in TENSORRT:
            on_stage(f"{precision}: build plans")
            build_plans(bundle, BuildOptions(provider=provider))
        on_stage(f"{precision}: verify on {provider}")
        report.parity[precision] = verify_bundle(bundle, reference, provider)
        on_stage(f"{precision}: draw and time")
        sides = [(provider, options) for options in variants] + [("cpu", {})] * (provider != "cpu")
        open_pipe = partial(LatteFlowPipeline.from_pretrained, bundle, prefix_cache_bytes=0)
        pipes = [open_pipe(name, options) for name, options in sides]
        images = pipes[0](list(PROMPTS), seed=0).images
        sheet = out / f"{provider}-{precision}.png"
        save_png(contact_sheet(images, PROMPTS), sheet)
        report.sheets.append(sheet)
        for count in BATCHES:
            calls = {i: partial(_draw, pipe, count) for i, pipe in enumerate(pipes)}
            for (name, options), turns in zip(sides, take_turns(calls, rounds).values(), strict=True):
                shown = ", ".join(f"{key}={value}" for key, value in options.items())
                report.timings.append(CallTiming(precision, name, shown, count, 1000 * turns.median))
        for pipe in pipes:
            pipe.close()
    return report


def _draw(pipe: LatteFlowPipeline, images: int, turn: int) -> None:
    pipe("a red star", num_images_per_prompt=images, seed=turn)


@app.command(no_args_is_help=False)
def provider(
    name: Annotated[
        str, typer.Argument(metavar="PROVIDER", help=f"Provider to measure; one of {', '.join(PROVIDERS)}.")
    ] = "cuda",
    checkpoint: Annotated[str, typer.Option(help="The name of a shipped checkpoint, or a folder.")] = "shapes",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for bundles, images and report.")] = Path("bench"),
    rounds: Annotated[int, typer.Option(help="Number of calls of each kind.", min=1)] = 9,
) -> None:
    """Verify one provider and time it against the CPU; writes OUT/report.json.

    \b
    Examples:
      latte-flow bench provider cuda --out bench
      latte-flow bench provider cpu --rounds 3
    """
    open_backend(name)  # reports what is missing before the work begins
    variants = ({}, *({option: "0"} for option in VARIANTS.get(name, ())))
    reference = Reference.from_pretrained(checkpoint)
    with staged() as on_stage:
        report = run_provider(checkpoint, reference, name, out, ("fp32", "fp16"), variants, rounds, on_stage)
    machine = describe_machine()
    parity = {half: [row.model_dump() for row in rows] for half, rows in report.parity.items()}
    timings = [asdict(timing) for timing in report.timings]
    write_text(out / "report.json", json.dumps({"machine": machine, "timings": timings, "parity": parity}, indent=2))
    print_machine(machine)
    table = Table("precision", "provider", "options", "images", f"{DEFAULT_STEPS} steps")
    for timing in report.timings:
        shown = f"{timing.milliseconds:.1f} ms"
        table.add_row(timing.precision, timing.provider, timing.options, str(timing.images), shown)
    stdout.print(table)
    for half, rows in report.parity.items():
        stdout.print(parity_table(rows), f"{half}: {sum(row.passed for row in rows)} of {len(rows)} rows passed")
    for sheet in (*report.sheets, out / "report.json"):
        typer.echo(str(sheet))
    raise_if_failed([row for rows in report.parity.values() for row in rows if not row.passed])
