"""A soak: mixed requests with cancels, kills and reloads, and whether the service keeps its promises under them."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from export.benchmarks.report import AsJson, Publisher, app, bundle_for_the_run
from runtime.console import stderr, stdout
from runtime.errors import InputError

End = Literal["answer", "error", "cancelled", "lost"]
ENDS: tuple[End, ...] = ("answer", "error", "cancelled", "lost")
KINDS = ("images", "images with previews", "PNG", "question")
GROWTH = 1.1
"""Memory may grow by this factor after the first tenth of the requests."""
NOT_OURS = {".ses"}
"""ONNX Runtime keeps this file, one for each user, in the folder for temporary files."""
REQUESTS_FOR_MEMORY = 1000
"""With fewer requests the first tenth is no more than a warm-up, and memory is not judged."""


@dataclass(frozen=True)
class Plan:
    """What a soak does. Two soaks with one seed send the same requests, and kill and reload after the same numbers."""

    requests: int
    cancel: float
    """Share of the requests that the client cancels."""
    kill_every: int
    """Requests between two kills, on average; 0 for none."""
    reload_every: int
    """Requests between two reloads, on average; 0 for none."""
    clients: int
    deadline: float
    """Of each request, in seconds."""
    seed: int


@dataclass(frozen=True)
class Ended:
    """How a request ended."""

    index: int
    kind: str
    end: End
    began: float
    """On the monotonic clock, as `ended`."""
    ended: float
    code: str = ""
    """Code of an error, or "no code"."""
    message: str = ""


@dataclass(frozen=True)
class Outage:
    """A server that was not there, from its end to its readiness, on the monotonic clock."""

    began: float
    ended: float
    fault: str
    killed: bool
    """Whether the soak killed it."""


@dataclass(frozen=True)
class MemorySample:
    """Resident memory in MB of the server and of the model's process after a number of requests."""

    requests: int
    server: float
    model: float


@dataclass
class Record:
    """All that a soak saw."""

    ended: list[Ended] = field(default_factory=list)
    outages: list[Outage] = field(default_factory=list)
    memory: list[MemorySample] = field(default_factory=list)
    kills: int = 0
    reloads: int = 0
    faults: list[str] = field(default_factory=list)
    """What went wrong elsewhere than in a request, one line each."""
    left_behind: list[str] = field(default_factory=list)
    """Files, regions of shared memory and processes after the server was closed."""
    seconds: float = 0.0


def broken_promises(plan: Plan, record: Record) -> list[str]:
    """Returns one line for each promise that the service did not keep."""
    broken = list(record.faults)
    if (missing := plan.requests - len(record.ended)) > 0:
        broken.append(f"{missing} requests have no end")
    if lost := [ended.index for ended in record.ended if ended.end == "lost"]:
        broken.append(f"{len(lost)} requests were lost: neither answer nor error within the deadline, {_first(lost)}")
    unexcused = [ended for ended in record.ended if ended.end == "error" and not _excused(ended, record.outages)]
    for code, count in sorted(Counter(ended.code for ended in unexcused).items()):
        example = next(ended for ended in unexcused if ended.code == code)
        broken.append(
            f"{count} requests failed while the server ran, with {code}: request {example.index}, {example.message}"
        )
    broken += [f"the server died by itself: {outage.fault}" for outage in record.outages if not outage.killed]
    if plan.requests >= REQUESTS_FOR_MEMORY:
        for name, (before, after) in growth(plan, record).items():
            if after > GROWTH * before:
                broken.append(f"memory of the {name} grew from {before:.0f} to {after:.0f} MB after the first tenth")
    if record.left_behind:
        broken.append(f"left behind: {', '.join(record.left_behind)}")
    return broken


def growth(plan: Plan, record: Record) -> dict[str, tuple[float, float]]:
    """Returns the largest memory in MB in the first tenth of the requests, and after it, of each process."""
    first = [sample for sample in record.memory if sample.requests <= plan.requests / 10]
    later = [sample for sample in record.memory if sample.requests > plan.requests / 10]
    if not first or not later:
        return {}
    return {
        "server": (max(sample.server for sample in first), max(sample.server for sample in later)),
        "model": (max(sample.model for sample in first), max(sample.model for sample in later)),
    }


def _excused(ended: Ended, outages: Sequence[Outage]) -> bool:
    """Returns whether the server was away while a request was open."""
    return any(ended.began <= outage.ended and outage.began <= ended.ended for outage in outages)


def _first(indices: Sequence[int]) -> str:
    return f"first request {min(indices)}"


@contextmanager
def own_temporary_folder() -> Iterator[Path]:
    """Lets this process and those that it starts keep temporary files in a folder of their own, in /tmp."""
    before = os.environ.get("TMPDIR"), tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="latte-flow-soak-") as folder:
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        try:
            yield Path(folder)
        finally:
            tempfile.tempdir = before[1]
            if before[0] is None:
                del os.environ["TMPDIR"]
            else:
                os.environ["TMPDIR"] = before[0]


@app.command(no_args_is_help=False)
def soak(
    bundle: Annotated[Path | None, typer.Option(help="Bundle; by default `shapes` is exported for the run.")] = None,
    requests: Annotated[int, typer.Option(help="Number of requests.", min=1)] = 10_000,
    cancel: Annotated[float, typer.Option(help="Share of requests that are cancelled.", min=0, max=1)] = 0.2,
    kill_every: Annotated[
        int, typer.Option(help="Kill the model's process after so many requests, on average; 0 for never.", min=0)
    ] = 2500,
    reload_every: Annotated[
        int, typer.Option(help="Reload the model after so many requests, on average; 0 for never.", min=0)
    ] = 1000,
    clients: Annotated[int, typer.Option(help="Requests open at once.", min=1, max=256)] = 16,
    deadline: Annotated[float, typer.Option(help="Deadline of each request, in seconds.")] = 60.0,
    seed: Annotated[int, typer.Option(help="Seed of the requests, cancels, kills and reloads.", min=0)] = 0,
    as_json: AsJson = False,
) -> None:
    """Send mixed requests to a server that is killed and reloaded. Exits with 1 if the service breaks a promise.

    The promises: every request ends in an answer or an error within its deadline; a request fails only if the server
    was killed while it was open; memory stays within 10 % after the first tenth; nothing is left in /dev/shm or /tmp.

    \b
    Examples:
      latte-flow bench soak
      latte-flow bench soak --requests 1000 --cancel 0.2 --kill-every 400 --reload-every 300 --seed 7 --json
    """
    from export.benchmarks.soak_run import run_soak
    from model_repository.signals import ends_by_interrupt

    if not 1 <= deadline < float("inf"):
        raise InputError(f"--deadline must be at least 1 second, got {deadline}")
    publisher = Publisher(as_json)
    plan = Plan(requests, cancel, kill_every, reload_every, clients, deadline, seed)
    with ends_by_interrupt(), bundle_for_the_run(bundle) as bundle, own_temporary_folder() as folder:
        record = run_soak(bundle.absolute(), plan, lambda line: stderr.print(line, markup=False, highlight=False))
        record.left_behind += sorted({path.name for path in folder.iterdir()} - NOT_OURS)
    broken = broken_promises(plan, record)
    publisher.publish(_report(plan, record, broken), lambda: _show(plan, record))
    for line in broken:
        stderr.print(f"broken promise: {line}", markup=False, style="red")
    if broken:
        raise typer.Exit(1)


def _report(plan: Plan, record: Record, broken: list[str]) -> dict[str, object]:
    errors = {ended.code: ended.message for ended in record.ended if ended.end == "error"}
    return {
        "plan": asdict(plan),
        "seconds": record.seconds,
        "ends": {kind: _ends(record, kind) for kind in KINDS},
        "errors": [
            {"code": code, "count": sum(ended.code == code for ended in record.ended), "example": example}
            for code, example in sorted(errors.items())
        ],
        "slowest_seconds": max((ended.ended - ended.began for ended in record.ended), default=0.0),
        "kills": record.kills,
        "reloads": record.reloads,
        "outages_seconds": [outage.ended - outage.began for outage in record.outages],
        "memory_mb": growth(plan, record),
        "left_behind": record.left_behind,
        "broken": broken,
    }


def _ends(record: Record, kind: str) -> dict[str, int]:
    counts = Counter(ended.end for ended in record.ended if ended.kind == kind)
    return {end: counts[end] for end in ENDS}


def _show(plan: Plan, record: Record) -> None:
    rate = len(record.ended) / record.seconds
    table = Table("request", *ENDS, title=f"{plan.requests} requests, seed {plan.seed}: {rate:.1f} a second")
    for kind in KINDS:
        table.add_row(kind, *map(str, _ends(record, kind).values()))
    totals = Counter(ended.end for ended in record.ended)
    table.add_row("all", *(str(totals[end]) for end in ENDS))
    stdout.print(table)
    for code, count in sorted(Counter(ended.code for ended in record.ended if ended.end == "error").items()):
        stdout.print(f"errors with {code}: {count}", highlight=False)
    slowest = max((ended.ended - ended.began for ended in record.ended), default=0.0)
    stdout.print(f"slowest request: {slowest:.1f} s, deadline {plan.deadline:g} s", highlight=False)
    away = max((outage.ended - outage.began for outage in record.outages), default=0.0)
    stdout.print(f"kills: {record.kills}, longest outage {away:.1f} s; reloads: {record.reloads}", highlight=False)
    judged = "" if plan.requests >= REQUESTS_FOR_MEMORY else f" (judged from {REQUESTS_FOR_MEMORY} requests on)"
    for name, (before, after) in growth(plan, record).items():
        stdout.print(f"memory of the {name}: {before:.0f} MB in the first tenth, {after:.0f} MB after{judged}")
    stdout.print(f"left in /dev/shm and /tmp: {', '.join(record.left_behind) or 'nothing'}", highlight=False)
