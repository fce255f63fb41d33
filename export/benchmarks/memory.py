"""Memory of an export, and memory and start-up time of a bundle; each measurement is a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from export.benchmarks.generation import Size
from export.benchmarks.random_models import write_random_checkpoint
from export.benchmarks.report import Against, AsJson, ProviderName, Publisher, app
from export.commands import staged
from latte.checkpoint import resolve_checkpoint
from runtime.console import stdout
from runtime.errors import EngineError
from runtime.manifest import Precision


@dataclass(frozen=True)
class Footprint:
    """Memory and times of a process that generates two images."""

    low_memory: bool
    first_image_seconds: float
    """Time from opening the bundle to the first image."""
    second_image_seconds: float
    interpreter_mb: float
    """Largest resident memory before the bundle is opened."""
    peak_mb: float
    """Largest resident memory; pages of memory-mapped files count."""


@dataclass(frozen=True)
class ExportFootprint:
    """Memory and time of an export without verification."""

    seconds: float
    interpreter_mb: float
    """Largest resident memory with all libraries imported, before the checkpoint is opened."""
    peak_mb: float
    tracing_mb: float
    """Largest resident memory of a process that traced graphs; it shares the libraries' pages with its parent."""
    checkpoint_mb: float
    """Size of the checkpoint on disk."""


def measure_export(checkpoint: Path, bundle: Path, precision: Precision) -> ExportFootprint:
    """Measures an export."""
    size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file()) / 1e6
    found = _run("export", str(checkpoint), str(bundle), precision)
    return ExportFootprint(checkpoint_mb=size, **found)


def measure_memory(bundle: Path, provider: str) -> list[Footprint]:
    """Measures a bundle with all engines in memory, and with one at a time."""
    return [_probe(bundle, provider, low_memory) for low_memory in (False, True)]


def _probe(bundle: Path, provider: str, low_memory: bool) -> Footprint:
    return Footprint(low_memory=low_memory, **_run("draw", str(bundle), provider, str(int(low_memory))))


def _run(*arguments: str) -> dict[str, float]:
    command = [sys.executable, "-m", "export.benchmarks.memory_probe", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise EngineError(f"the measured process failed: {result.stderr.strip().splitlines()[-1]}")
    found: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return found


@app.command(no_args_is_help=False)
def memory(
    size: Annotated[
        Size, typer.Option(help="paper: 4 billion random parameters, 16 GB of disk while it runs.")
    ] = "shapes",
    provider: ProviderName = "cpu",
    draw: Annotated[bool, typer.Option(help="Also load the bundle and draw.")] = True,
    against: Against = None,
    as_json: AsJson = False,
) -> None:
    """Measure the memory of an export, and memory and time to the first image of a bundle.

    \b
    Examples:
      latte-flow bench memory
      latte-flow bench memory --size paper --no-draw
    """
    publisher = Publisher(as_json, against)
    with tempfile.TemporaryDirectory() as temporary, staged() as on_stage:
        checkpoint = resolve_checkpoint("shapes")
        if size == "paper":
            checkpoint = Path(temporary) / "checkpoint"
            on_stage("write a random checkpoint")
            write_random_checkpoint(checkpoint)
        bundle = Path(temporary) / "bundle"
        on_stage("export")
        export_footprint = measure_export(checkpoint, bundle, "fp16" if size == "paper" else "fp32")
        on_stage("draw")
        footprints = measure_memory(bundle, provider) if draw else []

    def show() -> None:
        above = export_footprint.peak_mb - export_footprint.interpreter_mb
        stdout.print(
            f"export of {export_footprint.checkpoint_mb / 1000:.2f} GB: {export_footprint.seconds:.0f} s, at most "
            f"{above:.0f} MB above the {export_footprint.interpreter_mb:.0f} MB of the interpreter with its libraries; "
            f"the largest process that traced graphs had {export_footprint.tracing_mb:.0f} MB"
        )
        if footprints:
            table = Table("engines in memory", "first image", "second image", "peak MB above the interpreter")
            for found in footprints:
                kept = "one at a time" if found.low_memory else "all"
                memory_mb = f"{found.peak_mb - found.interpreter_mb:.0f}"
                table.add_row(
                    kept, f"{found.first_image_seconds:.2f} s", f"{found.second_image_seconds:.2f} s", memory_mb
                )
            stdout.print(table)

    drawn = [asdict(footprint) for footprint in footprints]
    publisher.publish({"export": asdict(export_footprint), "draw": drawn}, show)
