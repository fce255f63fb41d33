"""Batches: `run-batch` against `pipe()` at its best batch size, and what a row costs as their number grows."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from export.benchmarks.report import Against, AsJson, ProviderName, Publisher, app, bundle_for_the_run
from export.benchmarks.timing import take_turns
from runtime.batch.cluster import READER_CPUS, Pool, on_ray
from runtime.batch.job import Job, Watcher, run_job
from runtime.batch.reading import RowOptions
from runtime.batch.shard import ShardOptions
from runtime.console import stderr, stdout
from runtime.pipeline import LatteFlowPipeline

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")


@dataclass(frozen=True)
class Side:
    """One way to draw the same prompts."""

    images_per_second: list[float]
    images_per_cpu_second: list[float]

    @property
    def median(self) -> float:
        """Median rate, in images per second."""
        return statistics.median(self.images_per_second)


@dataclass(frozen=True)
class Growth:
    """A whole job of some number of rows, in a process of its own."""

    rows: int
    start_seconds: float
    """Until the engines are loaded."""
    seconds_per_row: float
    """From then on."""
    peak_mb: float
    """Largest resident memory above that of the interpreter with its libraries."""


def prompts_for(number: int) -> list[str]:
    """Returns prompts of several lengths."""
    kinds = len(COLOURS) * len(SHAPES)
    return [
        f"a {COLOURS[i % len(COLOURS)]} {SHAPES[i // len(COLOURS) % len(SHAPES)]}"
        + (" above a large blue square" if i // kinds % 2 else "")
        for i in range(number)
    ]


class FromRow(Watcher):
    """Notes when some number of rows was finished."""

    def __init__(self, number: int) -> None:
        self._left = number
        self.seconds = self.cpu_seconds = 0.0

    def row_ended(self) -> None:
        self._left -= 1
        if not self._left:
            self.seconds, self.cpu_seconds = time.perf_counter(), time.process_time()


def measure_sides(
    bundle: Path, provider: str, images: int, steps: int, sizes: Sequence[int], rounds: int
) -> dict[str, Side]:
    """Draws the same prompts by calls of the pipeline, for each batch size, and by `run-batch`, in turns.

    A job has two parts of these prompts, of which the second is measured: with the first one its engines are loaded and
    warm, as those of the calls are. It reads its input, encodes PNGs and writes Parquet; the calls only draw.
    """
    prompts = prompts_for(images)
    with tempfile.TemporaryDirectory() as temporary, LatteFlowPipeline.from_pretrained(bundle, provider) as pipe:
        source = Path(temporary) / "prompts.txt"
        source.write_text("".join(f"{prompt}\n" for prompt in (*prompts, *prompts)))

        def calls(size: int) -> tuple[float, float]:
            started, cpu = time.perf_counter(), time.process_time()
            for first in range(0, images, size):
                pipe(prompts[first : first + size], num_inference_steps=steps, seed=first)
            return images / (time.perf_counter() - started), images / (time.process_time() - cpu)

        def job(size: int, turn: int) -> tuple[float, float]:
            watch = FromRow(images)
            options = RowOptions(defaults={"num_inference_steps": steps})
            out = Path(temporary) / f"{size}-{turn}"
            run_job(Job(source, out, bundle, "parquet", images, options, ShardOptions(size), provider), watch)
            seconds, cpu = time.perf_counter() - watch.seconds, time.process_time() - watch.cpu_seconds
            return images / seconds, images / cpu

        sides: dict[str, Any] = {}
        for size in sizes:
            sides[f"pipe(), {size} at a time"] = lambda _, size=size: calls(size)
            sides[f"run-batch, --batch-size {size}"] = lambda turn, size=size: job(size, turn)
        turns = take_turns(sides, rounds, lambda: stderr.print("one round"))
    return {name: Side(*map(list, zip(*turn.results, strict=True))) for name, turn in turns.items()}


class FirstToLast(Watcher):
    """Notes when the first and the last row was finished."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def row_ended(self) -> None:
        self.times.append(time.perf_counter())

    def rows_per_second(self, at_once: int) -> float:
        """Returns the rate after the first rows, which end together."""
        return (len(self.times) - at_once) / (self.times[-1] - self.times[0])


def measure_workers(bundle: Path, provider: str, images: int, steps: int, counts: Sequence[int]) -> dict[str, float]:
    """Draws the same prompts on Ray of this machine with each number of workers; returns images per second.

    Each worker has the CPUs that it would have if there were as many as there are at most. The time until the first
    part is left out, and with it the start.
    """
    cpus = (len(os.sched_getaffinity(0)) - READER_CPUS) / max(counts)
    shard = max(1, images // 8)
    options = RowOptions(defaults={"num_inference_steps": steps})
    found = {}
    with tempfile.TemporaryDirectory() as temporary, on_ray(Pool(workers=max(counts), cpus_per_worker=cpus)):
        source = Path(temporary) / "prompts.txt"
        source.write_text("".join(f"{prompt}\n" for prompt in prompts_for(images)))
        for count in counts:
            watch = FirstToLast()
            job = Job(
                source, Path(temporary) / str(count), bundle, rows_per_shard=shard, rows=options, provider=provider
            )
            with on_ray(Pool(workers=count, cpus_per_worker=cpus)) as runner:
                run_job(job, watch, runner)
            found[f"{count} worker{'s' * (count > 1)} of {cpus:g} CPUs"] = watch.rows_per_second(shard)
            stderr.print(f"{count} workers")
    return found


def best(sides: dict[str, Side], kind: str) -> str:
    """Returns the quickest of the sides whose names begin with `kind`."""
    return max((name for name in sides if name.startswith(kind)), key=lambda name: sides[name].median)


def measure_growth(bundle: Path, provider: str, rows: Sequence[int], steps: int) -> list[Growth]:
    """Runs whole jobs of growing numbers of rows, each in a process of its own."""
    found = []
    for number in rows:
        with tempfile.TemporaryDirectory() as temporary:
            source = Path(temporary) / "prompts.txt"
            source.write_text("".join(f"{prompt}\n" for prompt in prompts_for(number)))
            arguments = (bundle, provider, source, Path(temporary) / "out", steps)
            command = [sys.executable, "-m", "export.benchmarks.memory_probe", "batch", *map(str, arguments)]
            answer = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        stderr.print(f"{number} rows")
        per_row = answer["seconds"] / number
        found.append(Growth(number, answer["start_seconds"], per_row, answer["peak_mb"] - answer["interpreter_mb"]))
    return found


def _ratio(ones: list[float], others: list[float]) -> float:
    """Returns the median ratio of rates of the same rounds."""
    return statistics.median(one / other for one, other in zip(ones, others, strict=True))


@app.command(no_args_is_help=False)
def batch(
    bundle: Annotated[Path | None, typer.Option(help="Bundle; by default `shapes` is exported for the run.")] = None,
    provider: ProviderName = "cpu",
    images: Annotated[int, typer.Option(help="Number of images for each side in a round.", min=1)] = 256,
    steps: Annotated[int, typer.Option(help="Number of steps of an image.", min=1)] = 20,
    size: Annotated[list[int] | None, typer.Option(help="A batch size; may be repeated.", min=1)] = None,
    rounds: Annotated[int, typer.Option(help="Number of rounds, after one that warms up.", min=1)] = 5,
    rows: Annotated[list[int] | None, typer.Option(help="Rows of a whole job; may be repeated.", min=1)] = None,
    row_steps: Annotated[int, typer.Option(help="Number of steps in these jobs.", min=1)] = 2,
    workers: Annotated[
        list[int] | None, typer.Option(help="Also on Ray, with so many workers; may be repeated.", min=1)
    ] = None,
    against: Against = None,
    as_json: AsJson = False,
) -> None:
    """Measure `run-batch` against calls of the pipeline, and what a row costs in jobs of 100, 1,000 and 10,000 rows.

    \b
    Examples:
      latte-flow bench batch
      latte-flow bench batch --workers 1 --workers 2
      latte-flow bench batch --size 8 --size 16 --rows 100 --rows 1000
    """
    publisher = Publisher(as_json, against)
    with bundle_for_the_run(bundle) as bundle:
        sides = measure_sides(bundle, provider, images, steps, size or (4, 8, 16, 32), rounds)
        on_workers = measure_workers(bundle, provider, images, steps, workers) if workers else {}
        growth = measure_growth(bundle, provider, rows or (100, 1_000, 10_000), row_steps)
    quickest = {kind: best(sides, kind) for kind in ("pipe()", "run-batch")}
    calls, jobs = sides[quickest["pipe()"]], sides[quickest["run-batch"]]
    ratio = _ratio(jobs.images_per_second, calls.images_per_second)
    cpu_ratio = _ratio(jobs.images_per_cpu_second, calls.images_per_cpu_second)

    def show() -> None:
        table = Table("side", "images/s", "images per CPU second", title=f"{images} images of {steps} steps")
        for name, side in sides.items():
            table.add_row(name, f"{side.median:.2f}", f"{statistics.median(side.images_per_cpu_second):.2f}")
        stdout.print(table)
        stdout.print(
            f"{quickest['run-batch']} draws {ratio:.2f} times as many images a second as {quickest['pipe()']}, "
            f"{cpu_ratio:.2f} times as many in a CPU second"
        )
        for name, rate in on_workers.items():
            stdout.print(f"on Ray, {name}: {rate:.2f} images/s")
        table = Table("rows", "start s", "ms a row", "MB", title=f"whole jobs of {row_steps} steps")
        for one in growth:
            numbers = (f"{one.start_seconds:.2f}", f"{1000 * one.seconds_per_row:.1f}", f"{one.peak_mb:.0f}")
            table.add_row(f"{one.rows:,}", *numbers)
        stdout.print(table)

    report = {
        "provider": provider,
        "sides": {name: asdict(side) for name, side in sides.items()},
        "best": quickest,
        "ratio": ratio,
        "cpu_ratio": cpu_ratio,
        "workers": [{"workers": name, "images_per_second": rate} for name, rate in on_workers.items()],
        "growth": [asdict(one) for one in growth],
    }
    publisher.publish(report, show)
