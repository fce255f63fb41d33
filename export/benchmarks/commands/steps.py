"""`latte-flow bench steps`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from export.benchmarks.commands.report import AsJson, Publisher, app
from export.benchmarks.steps import SETTINGS, measure_steps, plot_steps
from latte.checkpoint import load_checkpoint
from runtime.console import progress_bar, stdout


@app.command(no_args_is_help=False)
def steps(
    checkpoint: Annotated[str, typer.Argument(help="`shapes`, or a checkpoint of the same world.")] = "shapes",
    prompts: Annotated[int, typer.Option(help="Held-out prompts of one and of two shapes, each.", min=1)] = 100,
    plot: Annotated[Path | None, typer.Option(help="Draw score and PSNR over the cost here.")] = None,
    as_json: AsJson = False,
) -> None:
    """Quality against the number of steps: solvers, shifted time grids, and guidance on an interval of time.

    \b
    Examples:
      latte-flow bench steps
      latte-flow bench steps my-checkpoint --prompts 500 --plot steps.png
    """
    publisher = Publisher(as_json)
    model = load_checkpoint(checkpoint)
    with progress_bar() as progress:
        task = progress.add_task("draw", total=len(SETTINGS))
        found = []
        for point in measure_steps(model, prompts):
            found.append(point)
            progress.advance(task)
    if plot is not None:
        plot_steps(found, plot)

    def show() -> None:
        table = Table("sampler", "steps", "expert rows", "1 shape", "2 shapes", "PSNR", title=f"{prompts} prompts each")
        for point in found:
            shares = (f"{share:.1%}" for share in point.right)
            table.add_row(point.sampler, str(point.steps), str(point.rows), *shares, f"{point.psnr_db:.1f} dB")
        stdout.print(table)

    publisher.publish({"prompts": prompts, "points": [asdict(p) for p in found]}, show)
