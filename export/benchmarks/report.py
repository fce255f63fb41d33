"""What all benchmarks share: options, the report with its machine, and the comparison of two reports."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import onnxruntime
import torch
import typer
from rich.console import Console
from rich.table import Table

from export.bundle import export_bundle
from export.commands import staged
from runtime.backends import PROVIDERS
from runtime.console import command_group, stderr, stdout
from runtime.errors import InputError
from runtime.machine import cpu_name, find_gpu

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Against = Annotated[
    Path | None,
    typer.Option("--compare", metavar="OLD.json", help="Exit with 1 if something is slower than in this report."),
]
ProviderName = Annotated[str, typer.Option("--provider", help=f"Runs the engines; one of {', '.join(PROVIDERS)}.")]

app = command_group(
    "Measure speed, memory and quality on this machine.\n\n\b\nExample:\n  latte-flow bench understanding --json"
)

NOISE_FACTOR = 3.0
"""A measurement is slower if it is slower by more than this many times the spread of the rounds."""
SMALLEST_NOISE = 0.03
"""Relative spread that is assumed at least, since no two runs on a shared machine agree better."""
NOISE_OF_ONE = 0.1
"""Relative spread that is assumed for a single number."""


class Publisher:
    """Prints a report as JSON or as tables, with the machine, and compares it with an old one."""

    def __init__(self, as_json: bool, against: Path | None = None) -> None:
        """Reads the old report, so that a wrong file is refused before the work begins.

        Raises:
            InputError: `against` is not a report.
        """
        self._as_json = as_json
        self._old = None if against is None else load_report(against)

    def publish(self, report: Mapping[str, Any], show: Callable[[], None]) -> None:
        """Prints the report. Ends the command with 1 if something is slower than in the old report.

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
    """Yields the given bundle, or a temporary bundle of the checkpoint."""
    if bundle is not None:
        yield bundle
        return
    with tempfile.TemporaryDirectory() as temporary:
        with staged() as on_stage:
            export_bundle(checkpoint, Path(temporary) / "bundle", verify=False, on_stage=on_stage)
        yield Path(temporary) / "bundle"


def describe_machine() -> dict[str, str]:
    """Returns the processor, cores, GPU, and the versions of the packages that matter."""
    return {
        "processor": cpu_name(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "onnxruntime": onnxruntime.__version__,
        "transformers": version("transformers"),
        "latte-flow": version("latte-flow"),
    } | ({} if (gpu := find_gpu()) is None else {"GPU": f"{gpu.name}, driver {gpu.driver}"})


def print_machine(machine: dict[str, str]) -> None:
    """Prints one line per fact."""
    for name, value in machine.items():
        stdout.print(f"{name}: {value}", highlight=False)


def resident_megabytes(process: int | str = "self") -> float | None:
    """Returns the resident memory of a process in MB; None if the system does not report it."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def cpu_seconds(process: int | str = "self") -> float:
    """Returns the CPU time of all threads of a process; NaN if the system does not report it."""
    try:
        _, _, fields = Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(") ")
    except OSError:
        return math.nan
    user, system = fields.split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Comparison:
    """One measurement in both reports."""

    name: str
    old: float
    """Median, in seconds or per second."""
    new: float
    slower_by: float
    """Ratio of times: 1.2 means 20 % slower, whatever the unit."""
    noise: float
    """The larger relative spread of the rounds."""

    @property
    def verdict(self) -> str:
        """One of "slower", "faster" and "same"."""
        margin = NOISE_FACTOR * max(self.noise, SMALLEST_NOISE)
        if self.slower_by > 1 + margin:
            return "slower"
        return "faster" if self.slower_by < 1 / (1 + margin) else "same"


def compare_reports(old: dict[str, Any], new: dict[str, Any]) -> list[Comparison]:
    """Compares all times and rates that both reports contain.

    Raises:
        InputError: the reports have nothing in common.
    """
    before, after = dict(_series(old)), dict(_series(new))
    shared = [name for name in after if name in before]
    if not shared:
        raise InputError("the two reports have no measurement in common; compare two runs of the same benchmark")
    return [_compare(name, before[name], after[name]) for name in shared]


def load_report(path: Path) -> dict[str, Any]:
    """Reads a report that a benchmark printed with --json.

    Raises:
        InputError: the file is not such a report.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a report of `latte-flow bench … --json`: {error}") from error
    if not isinstance(report, dict) or "machine" not in report:
        raise InputError(f"{path} is not a report of `latte-flow bench … --json`: it names no machine")
    return report


def _series(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, list[float]]]:
    """Yields the numbers below keys that name times or rates, by the path of names to them.

    An object in a list is named by its texts, or by its index.
    """
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _series(inner, (*path, str(key)))
    elif isinstance(value, list) and not _are_numbers(value):
        for place, inner in enumerate(value):
            texts = [text for text in inner.values() if isinstance(text, str)] if isinstance(inner, dict) else []
            yield from _series(inner, (*path, ", ".join(texts) or str(place)))
    elif any("second" in key for key in path):
        numbers = value if isinstance(value, list) else [value]
        if _are_numbers(numbers):
            yield " / ".join(path), [float(number) for number in numbers]


def _are_numbers(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)


def _compare(name: str, old: list[float], new: list[float]) -> Comparison:
    before, after = statistics.median(old), statistics.median(new)
    faster, slower = (before, after) if "per_second" in name else (after, before)
    ratio = faster / slower if slower else 1.0
    return Comparison(name, before, after, ratio, max(_spread(old), _spread(new)))


def _spread(values: list[float]) -> float:
    """Returns the median absolute deviation relative to the median, scaled to a standard deviation."""
    if len(values) == 1:
        return NOISE_OF_ONE
    middle = statistics.median(values)
    return 1.4826 * statistics.median(abs(value - middle) for value in values) / middle if middle else 0.0


def print_comparison(comparisons: list[Comparison], console: Console) -> None:
    """Prints one line per measurement; ends the command with 1 if one is slower."""
    colours = {"slower": "red", "faster": "green", "same": "default"}
    table = Table("measured", "old", "new", "new / old time", "noise", "")
    for found in comparisons:
        verdict = f"[{colours[found.verdict]}]{found.verdict}[/]"
        numbers = (f"{found.old:.4g}", f"{found.new:.4g}", f"{found.slower_by:.2f}", f"{found.noise:.1%}")
        table.add_row(found.name, *numbers, verdict)
    console.print(table)
    if any(found.verdict == "slower" for found in comparisons):
        raise typer.Exit(1)


@app.command(no_args_is_help=True)
def compare(
    old: Annotated[Path, typer.Argument(help="Earlier report, from --json.")],
    new: Annotated[Path, typer.Argument(help="Later report of the same benchmark.")],
) -> None:
    """Compare two reports of a benchmark. Exits with 1 if something is slower beyond the noise.

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
