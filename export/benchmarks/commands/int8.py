"""`latte-flow bench int8`."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from export.benchmarks.commands.report import Against, AsJson, Publisher, app, bundle_for_the_run
from export.benchmarks.int8 import MAX_ERRORS, PICTURES, measure_int8, quantized_variants, speedup
from export.commands import staged
from runtime.console import progress_bar, stdout
from runtime.pipeline import DEFAULT_STEPS


@app.command(no_args_is_help=False)
def int8(
    checkpoint: Annotated[str, typer.Argument(help="`shapes`, or a checkpoint of the same world.")] = "shapes",
    bundle: Annotated[Path | None, typer.Option(help="In fp32; exported for the run where none is given.")] = None,
    prompts: Annotated[int, typer.Option(help="Held-out prompts of one and of two shapes, each.", min=1)] = 500,
    questions: Annotated[int, typer.Option(help="Held-out questions.", min=1)] = 500,
    rounds: Annotated[int, typer.Option(help="Timed calls of each kind.", min=1)] = 15,
    against: Against = None,
    as_json: AsJson = False,
) -> None:
    """INT8 beside fp32 on the CPU: size, speed, PSNR, and the score of pictures and answers.

    \b
    Examples:
      latte-flow bench int8
      latte-flow bench int8 my-checkpoint --prompts 100 --json
    """
    publisher = Publisher(as_json, against)
    with bundle_for_the_run(bundle, checkpoint) as bundle, tempfile.TemporaryDirectory() as temporary:
        with staged() as on_stage:
            variants = quantized_variants(bundle, Path(temporary), on_stage)
        with progress_bar() as progress:
            task = progress.add_task("time and score", total=rounds + 1 + 3 * (len(MAX_ERRORS) + 1))
            rows = measure_int8(variants, prompts, questions, rounds, lambda: progress.advance(task))

    def show() -> None:
        table = Table(
            "",
            "products",
            "MB",
            *(f"{n} image{'s' * (n > 1)}" for n in PICTURES),
            "PSNR",
            "1 shape",
            "2 shapes",
            "answers",
            title=f"error allowed to an engine; speed of {DEFAULT_STEPS} guided steps against fp32",
        )
        for row in rows:
            faster = (f"{speedup(row, rows[0], n):.2f}x" for n in PICTURES)
            right = (f"{row.right[what]:.1%}" for what in ("1_shape", "2_shape", "answers"))
            psnr = "" if row is rows[0] else f"{row.psnr_db:.1f} dB"
            table.add_row(row.name, f"{row.quantized_share:.0%}", f"{row.megabytes:.1f}", *faster, psnr, *right)
        stdout.print(table)

    publisher.publish({"prompts": prompts, "questions": questions, "rows": [asdict(row) for row in rows]}, show)
