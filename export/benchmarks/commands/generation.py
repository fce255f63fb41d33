"""`latte-flow bench generation`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from export.benchmarks.commands.report import Against, AsJson, ProviderName, Publisher, app
from export.benchmarks.generation import (
    IMAGES,
    Size,
    measure_generation,
    plot_generation,
    report_as_dict,
)
from export.commands import staged
from export.paper_size import PAPER
from latte.checkpoint import load_config, resolve_checkpoint
from runtime.console import stdout


@app.command(no_args_is_help=False)
def generation(
    size: Annotated[Size, typer.Option(help="Of all models; their weights are random.")] = "shapes",
    provider: ProviderName = "cpu",
    rounds: Annotated[int, typer.Option(help="Of each measurement.", min=1)] = 5,
    images: Annotated[list[int] | None, typer.Option(help="Pictures in a call; 1, 2 and 8 by default.")] = None,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Also time torch.compile.")] = True,
    plot: Annotated[Path | None, typer.Option(help="Draw the comparison here.")] = None,
    against: Against = None,
    as_json: AsJson = False,
) -> None:
    """The expert engines beside a dense twin, an autoregressive twin and PyTorch, in one run.

    \b
    Examples:
      latte-flow bench generation
      latte-flow bench generation --size paper --rounds 3 --plot generation.png
      latte-flow bench generation --json > old.json; latte-flow bench generation --compare old.json
    """
    publisher = Publisher(as_json, against)
    config = PAPER if size == "paper" else load_config(resolve_checkpoint("shapes"))
    counts = tuple(images or IMAGES)
    with staged() as on_stage:
        report = measure_generation(size, config, provider, rounds, counts, compiled, on_stage)
    if plot is not None:
        plot_generation(report, plot)

    def show() -> None:
        table = Table("a guided step", *(f"{n} image{'s' * (n > 1)}" for n in counts), "experts are faster by")
        for side, timings in report.step.items():
            ratio = timings[counts[0]].median / report.step["experts"][counts[0]].median
            shown = (f"{1000 * timings[n].median:.1f} ms" if n in timings else "" for n in counts)
            table.add_row(side, *shown, "" if side == "experts" else f"{ratio:.2f}x")
        stdout.print(table)
        table = Table("a call, without the decoder", *(f"{n} image{'s' * (n > 1)}" for n in counts), "to experts")
        for name, seconds, base in report.calls():
            shown = (f"{seconds(n):.2f} s" for n in counts)
            table.add_row(name, *shown, f"{seconds(counts[0]) / base(counts[0]):.2f}x")
        stdout.print(table)
        stdout.print(
            f"an expert step of one image runs at {report.rate / 1e9:.1f} GFLOP/s, {report.efficiency:.0%} of the "
            f"{report.gemm_peak / 1e9:.1f} that ONNX Runtime's matrix product reaches here"
        )
        for note in report.notes:
            stdout.print(f"note: {note}")

    publisher.publish({"provider": provider} | report_as_dict(report), show)
