"""The gateway against the scheduler in this process, and many streams of images open at once."""

from __future__ import annotations

import http.client
import json
import statistics
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from export.benchmarks.gateway_server import GatewayProcess, gateway_process
from export.benchmarks.open_streams import StreamsResult, open_streams
from export.benchmarks.report import Against, AsJson, Publisher, app, bundle_for_the_run, cpu_seconds
from export.benchmarks.serving import Serve, in_process, with_clients
from runtime.console import stderr, stdout
from runtime.errors import ServiceError
from runtime.pipeline import LatteFlowPipeline
from runtime.serving.requests import GenerationRequest

IN_FLIGHT = 16
MOST_OVERHEAD = 0.05
"""Share of the throughput that the gateway may cost."""
SIDES = ("in process", "gateway")


@dataclass(frozen=True)
class Side:
    """One side's rounds, in the order in which they were run."""

    images_per_second: list[float]
    p50_seconds: list[float]
    cpu_seconds_per_image: list[float]
    """Of the process that draws, with all that it does beside drawing."""


def overhead(sides: dict[str, Side]) -> float:
    """Returns the share of the throughput that the gateway costs: the median of the rounds."""
    pairs = zip(*(sides[name].images_per_second for name in SIDES), strict=True)
    return 1 - statistics.median(through / direct for direct, through in pairs)


@contextmanager
def through(server: GatewayProcess) -> Iterator[Serve]:
    """Sends requests to a gateway, one connection a thread.

    By `http.client`, since whatever the client takes of two cores is taken from the gateway.
    """
    own = threading.local()
    opened: list[http.client.HTTPConnection] = []

    def serve(request: GenerationRequest) -> object:
        if not hasattr(own, "connection"):
            own.connection = http.client.HTTPConnection(server.host, server.port)
            opened.append(own.connection)
        body = json.dumps({"prompt": request.prompt, "seed": request.seed})
        own.connection.request("POST", "/v1/images/generations", body, {"Content-Type": "application/json"})
        answer = own.connection.getresponse()
        content = answer.read()
        if answer.status != http.client.OK:
            raise ServiceError(f"the gateway answered {answer.status}: {content[:200].decode(errors='replace')}")
        return json.loads(content)["data"][0]["b64_json"]

    try:
        yield serve
    finally:
        for connection in opened:
            connection.close()


def compared(bundle: Path, server: GatewayProcess, requests: int, rounds: int) -> dict[str, Side]:
    """Measures both sides in turns; each begins every second round."""
    sides = {name: Side([], [], []) for name in SIDES}
    with (
        LatteFlowPipeline.from_pretrained(bundle) as pipe,
        in_process(pipe, "step-level") as direct,
        through(server) as remote,
    ):
        served = {"in process": direct, "gateway": remote}
        for serve in served.values():
            with_clients(serve, "warm-up", IN_FLIGHT, IN_FLIGHT)
        for turn in range(rounds):
            for name in SIDES if turn % 2 == 0 else SIDES[::-1]:
                process = server.pid if name == "gateway" else "self"
                before = cpu_seconds(process)
                load = with_clients(served[name], name, IN_FLIGHT, requests)
                used = cpu_seconds(process) - before
                sides[name].images_per_second.append(load.images_per_second)
                sides[name].p50_seconds.append(load.p50_seconds)
                sides[name].cpu_seconds_per_image.append(used / requests)
                stderr.print(f"round {turn + 1}, {name}: {load.images_per_second:.1f} images per second")
    return sides


@app.command(no_args_is_help=False)
def gateway(
    bundle: Annotated[Path | None, typer.Argument(help="Bundle; by default `shapes` is exported for the run.")] = None,
    requests: Annotated[int, typer.Option(help="Number of requests of a round.", min=1)] = 96,
    rounds: Annotated[int, typer.Option(help="Number of rounds of each side.", min=1)] = 6,
    streams: Annotated[int, typer.Option(help="Streams of images to open at once; 0: none.", min=0)] = 1000,
    against: Against = None,
    as_json: AsJson = False,
) -> None:
    """Measure what the gateway costs at 16 requests in flight, and a thousand streams open at once.

    Exits with 1 if a stream is lost.

    \b
    Examples:
      latte-flow bench gateway bundle
      latte-flow bench gateway bundle --requests 32 --streams 0 --json
    """
    publisher = Publisher(as_json, against)
    opened: StreamsResult | None = None
    with bundle_for_the_run(bundle) as bundle:
        with gateway_process(bundle) as server:
            sides = compared(bundle, server, requests, rounds)
        if streams:
            # Its memory is that of the streams only.
            with gateway_process(bundle, max_queued_images=2 * streams) as server:
                opened = open_streams(server, streams)
    cost = overhead(sides)

    def show() -> None:
        title = f"{IN_FLIGHT} in flight, {rounds} rounds of {requests} requests in turns, medians"
        table = Table("served by", "images per second", "p50", "CPU per image", title=title)
        for name, side in sides.items():
            rate, p50, cpu = (statistics.median(values) for values in asdict(side).values())
            table.add_row(name, f"{rate:.1f}", f"{1000 * p50:.0f} ms", f"{1000 * cpu:.1f} ms")
        stdout.print(table)
        verdict = "within" if cost <= MOST_OVERHEAD else "more than"
        stdout.print(f"the gateway costs {cost:.1%} of the throughput: {verdict} the {MOST_OVERHEAD:.0%} it may cost")
        if opened is not None:
            opened.show()

    report = {"sides": {name: asdict(side) for name, side in sides.items()}, "overhead": cost}
    publisher.publish(report | {"streams": None if opened is None else asdict(opened)}, show)
    if opened is not None and opened.lost:
        raise typer.Exit(1)
