"""`latte-flow bench provider`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from export.benchmarks.commands.report import app
from export.benchmarks.machine import describe_machine, print_machine
from export.benchmarks.providers import run_provider
from export.commands import parity_table, raise_if_failed, staged
from latte.checkpoint import load_checkpoint
from runtime.backends import PROVIDERS, open_backend
from runtime.console import stdout
from runtime.files import write_text
from runtime.pipeline import DEFAULT_STEPS


@app.command(no_args_is_help=False)
def provider(
    name: Annotated[str, typer.Argument(metavar="PROVIDER", help=f"One of {', '.join(PROVIDERS)}.")] = "cuda",
    checkpoint: Annotated[str, typer.Option(help="`shapes`, or a checkpoint folder.")] = "shapes",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for bundles, pictures and report.")] = Path("bench"),
    rounds: Annotated[int, typer.Option(help="Calls of each kind.", min=1)] = 9,
) -> None:
    """Export, verify, draw and time on one provider, beside the CPU; writes OUT/report.json.

    \b
    Examples:
      latte-flow bench provider cuda --out bench
      latte-flow bench provider cpu --rounds 3
    """
    open_backend(name)  # what is missing is said before the work
    variants: tuple[dict[str, str], ...] = ({}, {"io_binding": "0"}) if name == "cuda" else ({},)
    model = load_checkpoint(checkpoint)
    with staged() as on_stage:
        report = run_provider(checkpoint, model, name, out, ("fp32", "fp16"), variants, rounds, on_stage)
    machine = describe_machine()
    parity = {half: [row.model_dump() for row in rows] for half, rows in report.parity.items()}
    timings = [asdict(timing) for timing in report.timings]
    write_text(out / "report.json", json.dumps({"machine": machine, "timings": timings, "parity": parity}, indent=2))
    print_machine(machine)
    table = Table("precision", "provider", "options", "pictures", f"{DEFAULT_STEPS} steps")
    for timing in report.timings:
        shown = f"{timing.milliseconds:.1f} ms"
        table.add_row(timing.precision, timing.provider, timing.options, str(timing.pictures), shown)
    stdout.print(table)
    for half, rows in report.parity.items():
        stdout.print(parity_table(rows), f"{half}: {sum(row.passed for row in rows)} of {len(rows)} rows passed")
    for sheet in (*report.sheets, out / "report.json"):
        typer.echo(str(sheet))
    raise_if_failed([row for rows in report.parity.values() for row in rows if not row.passed])
