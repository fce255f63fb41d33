"""`latte-flow bench serving`."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from export.benchmarks.commands.report import Against, AsJson, Publisher, app, bundle_for_the_run
from export.benchmarks.serving import DISCIPLINES, Load, capacity, in_flight, poisson
from export.benchmarks.serving import serving as in_process
from runtime.console import stderr, stdout
from runtime.pipeline import LatteFlowPipeline
from runtime.requests import GenerationRequest

IN_FLIGHT = (1, 4, 16, 64)
SHARES = (0.5, 0.8, 0.95)
"""Of capacity, at which requests arrive."""
TRITON_ROUNDS = 3


@app.command(no_args_is_help=False)
def serving(
    bundle: Annotated[Path | None, typer.Option(help="A bundle; `shapes` is exported where none is given.")] = None,
    requests: Annotated[int, typer.Option(help="Requests of each load.", min=4)] = 96,
    triton: Annotated[bool, typer.Option(help="Also measure Triton beside the same scheduler.")] = True,
    against: Against = None,
    as_json: AsJson = False,
) -> None:
    """Step-level batching beside whole requests and one at a time, under load; and what Triton adds.

    \b
    Examples:
      latte-flow bench serving
      latte-flow bench serving --bundle my-bundle --requests 300 --json
    """
    publisher = Publisher(as_json, against)
    with bundle_for_the_run(bundle) as bundle:
        loads = _in_process_loads(bundle, requests)
        if triton:
            loads += _triton_loads(bundle, requests)

    def show() -> None:
        table = Table("load", "served by", "images per second", "p50", "p95", "p99", title=f"{requests} requests each")
        for load in loads:
            times = (f"{1000 * seconds:.0f} ms" for seconds in (load.p50_seconds, load.p95_seconds, load.p99_seconds))
            table.add_row(load.load, load.discipline, f"{load.images_per_second:.1f}", *times)
        stdout.print(table)

    publisher.publish({"requests": requests, "loads": [asdict(load) for load in loads]}, show)


def _in_process_loads(bundle: Path, requests: int) -> list[Load]:
    loads = []
    with LatteFlowPipeline.from_pretrained(bundle) as pipe:
        full = capacity(pipe, requests)
        stderr.print(f"capacity: {full:.1f} requests of mixed lengths a second")
        for clients in IN_FLIGHT:
            for discipline in DISCIPLINES:
                with in_process(pipe, discipline) as serve:
                    loads.append(in_flight(serve, discipline, clients, requests))
        for share in SHARES:
            for discipline in DISCIPLINES:
                with in_process(pipe, discipline) as serve:
                    loads.append(poisson(serve, discipline, share * full, share, requests))
    return loads


def _triton_loads(bundle: Path, requests: int) -> list[Load]:
    """Triton and the scheduler in process by turns, and the median run of each."""
    from model_repository.client import Client
    from model_repository.layout import write_repository
    from model_repository.server import TritonServer

    runs: dict[str, list[Load]] = {"in process": [], "Triton": []}
    with tempfile.TemporaryDirectory() as temporary:
        models = Path(temporary) / "models"
        write_repository(bundle, models, execution_environment=Path(sys.prefix))
        with TritonServer(models) as server, LatteFlowPipeline.from_pretrained(bundle) as pipe:
            client = Client(server.grpc_url)

            def through_triton(request: GenerationRequest) -> object:
                return client.generate(request.prompt, seed=request.seed)

            for _ in range(TRITON_ROUNDS):
                with in_process(pipe, "step-level") as serve:
                    runs["in process"].append(in_flight(serve, "in process", 16, requests))
                runs["Triton"].append(in_flight(through_triton, "Triton", 16, requests))
    return [sorted(of_one, key=lambda load: load.images_per_second)[len(of_one) // 2] for of_one in runs.values()]
