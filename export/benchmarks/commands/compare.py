"""`latte-flow bench compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from export.benchmarks.commands.report import app, print_comparison
from export.benchmarks.compare import compare_reports, load_report
from runtime.console import stderr, stdout


@app.command(no_args_is_help=True)
def compare(
    old: Annotated[Path, typer.Argument(help="Report of an earlier run, from --json.")],
    new: Annotated[Path, typer.Argument(help="Report of a later run of the same benchmark.")],
) -> None:
    """Compare two runs of a benchmark. Exits with 1 if something got slower beyond the noise of the rounds.

    \b
    Example:
      latte-flow bench generation --json > new.json && latte-flow bench compare old.json new.json
    """
    before, after = load_report(old), load_report(new)
    for name in sorted(before["machine"].keys() | after["machine"].keys()):
        values = before["machine"].get(name), after["machine"].get(name)
        if values[0] != values[1]:
            stderr.print(f"note: {name} was {values[0]}, is {values[1]}")
    print_comparison(compare_reports(before, after), stdout)
