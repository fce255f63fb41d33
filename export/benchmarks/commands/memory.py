"""`latte-flow bench memory`."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from export.benchmarks.commands.report import Against, AsJson, ProviderName, Publisher, app
from export.benchmarks.generation import Size
from export.benchmarks.memory import measure_export, measure_memory
from export.commands import staged
from export.random_checkpoint import write_random_checkpoint
from latte.checkpoint import resolve_checkpoint
from runtime.console import stdout


@app.command(no_args_is_help=False)
def memory(
    size: Annotated[
        Size, typer.Option(help="paper: 4 billion random parameters, 16 GB of disk while it runs.")
    ] = "shapes",
    provider: ProviderName = "cpu",
    draw: Annotated[bool, typer.Option(help="Also load the bundle and draw, all engines and one at a time.")] = True,
    against: Against = None,
    as_json: AsJson = False,
) -> None:
    """Memory of an export; memory and time to the first image with all engines and with one at a time.

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
            f"{above:.0f} MB above the {export_footprint.interpreter_mb:.0f} MB of the interpreter with its libraries"
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
