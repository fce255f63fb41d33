"""A service under load: batching disciplines, the cost of Triton, many requests open at once, and PNG files.

All disciplines serve the same requests on the same engines in one process, one after another. Latency is measured
from the arrival of a request to its last image.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from rich.table import Table

from export.benchmarks.report import Against, AsJson, Publisher, app, bundle_for_the_run
from runtime.console import stderr, stdout
from runtime.errors import InputError
from runtime.pipeline import LatteFlowPipeline
from runtime.serving.policy import CostAwarePolicy, SchedulingPolicy, WholeRequestPolicy
from runtime.serving.requests import GenerationRequest, Limits
from runtime.serving.scheduler import Scheduler
from runtime.serving.stations import PipelineStations
from runtime.serving.worker import Worker

if TYPE_CHECKING:
    from export.benchmarks.open_requests import OpenResult
    from export.benchmarks.png_files import PngResult

Serve = Callable[[GenerationRequest], object]
"""Serves one request; returns when it is done."""
STEPS = (10, 20, 40)
"""Numbers of steps of the mixed requests."""
LIMITS = Limits(max_queued_images=100_000)


DISCIPLINES: dict[str, Callable[[], SchedulingPolicy]] = {
    "step-level": CostAwarePolicy,
    "whole requests": lambda: WholeRequestPolicy(16),
    "one at a time": lambda: WholeRequestPolicy(1),
}
IN_FLIGHT = (1, 4, 16, 64)
SHARES = (0.5, 0.8, 0.95)
"""Rates of arrival, relative to the capacity."""
TRITON_ROUNDS = 3
OPEN_REQUESTS = (16, 64, 256, 1000)
"""Numbers of requests that are sent at once."""


@dataclass(frozen=True)
class LoadResult:
    """Throughput and latency of one discipline under one load."""

    discipline: str
    load: str
    images_per_second: float
    p50_seconds: float
    """Median latency."""
    p95_seconds: float
    p99_seconds: float


@contextmanager
def in_process(pipe: LatteFlowPipeline, discipline: str) -> Iterator[Serve]:
    """Runs the scheduler in this process, with one discipline."""
    scheduler = Scheduler(PipelineStations(pipe), time.monotonic, LIMITS, DISCIPLINES[discipline]())
    worker = Worker(scheduler)
    try:
        yield lambda request: scheduler.submit(request).result()
    finally:
        worker.close()


def with_clients(serve: Serve, discipline: str, clients: int, requests: int) -> LoadResult:
    """Measures clients that each send their next request when they have the image of the last one."""
    latencies: list[float] = []

    def one(index: int) -> None:
        started = time.monotonic()
        serve(GenerationRequest(f"a red star {index % 7}", seed=index))
        latencies.append(time.monotonic() - started)

    started = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(one, range(requests)))
    return _load(discipline, f"{clients} in flight", latencies, time.monotonic() - started)


def poisson(serve: Serve, discipline: str, rate: float, share: float, requests: int, seed: int = 0) -> LoadResult:
    """Measures requests of mixed lengths that arrive at random, `rate` per second on average."""
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1 / rate, requests))
    steps = rng.choice(STEPS, requests)
    latencies: list[float] = []
    began = time.monotonic()

    def one(index: int) -> None:
        serve(GenerationRequest(f"a red star {index % 7}", num_inference_steps=int(steps[index]), seed=index))
        latencies.append(time.monotonic() - began - arrivals[index])

    threads = []
    for index in range(requests):
        time.sleep(max(0.0, arrivals[index] - (time.monotonic() - began)))
        threads.append(threading.Thread(target=one, args=(index,)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    return _load(discipline, f"Poisson, {share:.0%} of capacity", latencies, time.monotonic() - began)


def _load(discipline: str, load: str, latencies: list[float], seconds: float) -> LoadResult:
    p50_seconds, p95_seconds, p99_seconds = np.percentile(latencies, [50, 95, 99])
    return LoadResult(
        discipline, load, len(latencies) / seconds, float(p50_seconds), float(p95_seconds), float(p99_seconds)
    )


def capacity(pipe: LatteFlowPipeline, requests: int) -> float:
    """Measures how many mixed requests step-level batching serves per second when the queue is never empty."""
    rng = np.random.default_rng(1)
    scheduler = Scheduler(PipelineStations(pipe), time.monotonic, LIMITS)
    for index in range(requests):
        scheduler.submit(GenerationRequest("a red star", num_inference_steps=int(rng.choice(STEPS)), seed=index))
    started = time.monotonic()
    while scheduler.tick():
        pass
    return requests / (time.monotonic() - started)


@app.command(no_args_is_help=False)
def serving(
    bundle: Annotated[Path | None, typer.Option(help="Bundle; by default `shapes` is exported for the run.")] = None,
    requests: Annotated[int, typer.Option(help="Number of requests for each load.", min=4)] = 96,
    triton: Annotated[
        bool, typer.Option(help="Also measure Triton, many requests open at once, and PNG files.")
    ] = True,
    open_requests: Annotated[
        list[int] | None,
        typer.Option("--open", help="Requests open at once in Triton; may be repeated. By default 16, 64, 256, 1000."),
    ] = None,
    against: Against = None,
    as_json: AsJson = False,
) -> None:
    """Measure the service under load: batching disciplines, Triton, open requests, and PNG files by cores.

    \b
    Examples:
      latte-flow bench serving
      latte-flow bench serving --bundle my-bundle --requests 300 --json
      latte-flow bench serving --requests 4 --open 1000
    """
    publisher = Publisher(as_json, against)
    counts = tuple(open_requests or OPEN_REQUESTS)
    if min(counts) < 1:
        raise InputError(f"--open must be at least 1, got {min(counts)}")
    at_once: list[OpenResult] = []
    files: list[PngResult] = []
    with bundle_for_the_run(bundle) as bundle:
        loads = _in_process_loads(bundle, requests)
        if triton:
            loads += _triton_loads(bundle, requests)
            at_once = _open_loads(bundle, counts)
            files = _png_rates(bundle)

    def show() -> None:
        table = Table("load", "served by", "images per second", "p50", "p95", "p99", title=f"{requests} requests each")
        for load in loads:
            times = (f"{1000 * seconds:.0f} ms" for seconds in (load.p50_seconds, load.p95_seconds, load.p99_seconds))
            table.add_row(load.load, load.discipline, f"{load.images_per_second:.1f}", *times)
        stdout.print(table)
        if at_once:
            stdout.print(_open_table(at_once))
        if files:
            stdout.print(_png_table(files))

    measured = {
        "loads": [asdict(load) for load in loads],
        "open": [asdict(load) for load in at_once],
        "png": [asdict(rate) for rate in files],
    }
    publisher.publish({"requests": requests} | measured, show)


def _in_process_loads(bundle: Path, requests: int) -> list[LoadResult]:
    loads = []
    with LatteFlowPipeline.from_pretrained(bundle) as pipe:
        full = capacity(pipe, requests)
        stderr.print(f"capacity: {full:.1f} requests of mixed lengths a second")
        for clients in IN_FLIGHT:
            for discipline in DISCIPLINES:
                with in_process(pipe, discipline) as serve:
                    loads.append(with_clients(serve, discipline, clients, requests))
        for share in SHARES:
            for discipline in DISCIPLINES:
                with in_process(pipe, discipline) as serve:
                    loads.append(poisson(serve, discipline, share * full, share, requests))
    return loads


def _triton_loads(bundle: Path, requests: int) -> list[LoadResult]:
    """Measures Triton and the scheduler in this process in turns; returns the median run of each."""
    from export.benchmarks.triton_server import triton_server
    from model_repository.client import Client

    runs: dict[str, list[LoadResult]] = {"in process": [], "Triton": []}
    with triton_server(bundle, LIMITS) as server, LatteFlowPipeline.from_pretrained(bundle) as pipe:
        client = Client(server.grpc_url)

        def through_triton(request: GenerationRequest) -> object:
            return client.generate(request.prompt, seed=request.seed)

        for _ in range(TRITON_ROUNDS):
            with in_process(pipe, "step-level") as serve:
                runs["in process"].append(with_clients(serve, "in process", 16, requests))
            runs["Triton"].append(with_clients(through_triton, "Triton", 16, requests))
    return [sorted(of_one, key=lambda load: load.images_per_second)[len(of_one) // 2] for of_one in runs.values()]


def _open_loads(bundle: Path, counts: Sequence[int]) -> list[OpenResult]:
    from export.benchmarks.open_requests import open_loads

    results = []
    for result in open_loads(bundle, counts):
        stderr.print(f"{result.load}: last answer after {result.last_answer_seconds:.2f} s")
        results.append(result)
    return results


def _png_rates(bundle: Path) -> list[PngResult]:
    from export.benchmarks.png_files import png_rates

    return list(png_rates(bundle))


def _open_table(results: list[OpenResult]) -> Table:
    table = Table("open requests", "median answer", "last image drawn", "last image here", "lag", title="sent at once")
    for result in results:
        times = (result.median_answer_seconds, result.last_image_seconds, result.last_answer_seconds)
        table.add_row(result.load, *(f"{seconds:.2f} s" for seconds in times), f"{1000 * result.lag:.0f} ms")
    return table


def _png_table(results: list[PngResult]) -> Table:
    table = Table("image", "threads", "images per second", "against one thread", title="PNG files")
    alone = {result.size: result.images_per_second for result in results if result.threads == 1}
    for result in results:
        rate = result.images_per_second
        table.add_row(result.size, str(result.threads), f"{rate:.0f}", f"{rate / alone[result.size]:.2f}")
    return table
