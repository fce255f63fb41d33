"""What the benchmarks' commands have in common: their group, their options, and how a report is told."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from export.benchmarks.compare import Comparison, compare_reports, load_report
from export.benchmarks.machine import describe_machine, print_machine
from export.bundle import export_bundle
from export.commands import staged
from runtime.backends import PROVIDERS
from runtime.console import command_group, stderr, stdout

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Against = Annotated[
    Path | None,
    typer.Option("--compare", metavar="OLD.json", help="Flag what got slower since that report; then exit with 1."),
]
ProviderName = Annotated[str, typer.Option("--provider", help=f"One of {', '.join(PROVIDERS)}.")]

app = command_group("Measure side by side, on this machine.\n\n\b\nExample:\n  latte-flow bench understanding --json")


class Publisher:
    """Tells a report: as JSON or as tables, with the machine, and what changed since an old one."""

    def __init__(self, as_json: bool, against: Path | None = None) -> None:
        """Reads the old report, so that a wrong file is named before the work begins.

        Raises:
            InputError: `against` is no report.
        """
        self._as_json = as_json
        self._old = None if against is None else load_report(against)

    def publish(self, report: Mapping[str, Any], show: Callable[[], None]) -> None:
        """Ends the command with 1 where something got slower.

        Args:
            show: prints the report's tables.
        """
        machine = describe_machine()
        whole = {"machine": machine, **report}
        if self._as_json:
            typer.echo(json.dumps(whole))
        else:
            print_machine(machine)
            show()
        if self._old is not None:
            print_comparison(compare_reports(self._old, whole), stderr if self._as_json else stdout)


@contextmanager
def bundle_for_the_run(bundle: Path | None, checkpoint: str = "shapes") -> Iterator[Path]:
    """The bundle that was given, or one of the checkpoint that is gone afterwards."""
    if bundle is not None:
        yield bundle
        return
    with tempfile.TemporaryDirectory() as temporary:
        with staged() as on_stage:
            export_bundle(checkpoint, Path(temporary) / "bundle", verify=False, on_stage=on_stage)
        yield Path(temporary) / "bundle"


def print_comparison(comparisons: list[Comparison], console: Console) -> None:
    """A line for each measurement; ends the command with 1 if one is slower."""
    colours = {"slower": "red", "faster": "green", "same": "default"}
    table = Table("measured", "old", "new", "new / old time", "noise", "")
    for found in comparisons:
        verdict = f"[{colours[found.verdict]}]{found.verdict}[/]"
        numbers = (f"{found.old:.4g}", f"{found.new:.4g}", f"{found.slower_by:.2f}", f"{found.noise:.1%}")
        table.add_row(found.name, *numbers, verdict)
    console.print(table)
    if any(found.verdict == "slower" for found in comparisons):
        raise typer.Exit(1)
