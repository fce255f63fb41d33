"""`latte-flow bench`: every subject measures its sides by turns in one run, and prints the machine."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from export.benchmarks.machine import describe_machine
from export.benchmarks.serving import DISCIPLINES, Load, capacity, in_flight, poisson
from export.benchmarks.serving import serving as in_process
from export.benchmarks.understanding import Report, measure
from export.bundle import export_bundle
from export.commands import staged
from latte.checkpoint import load_checkpoint
from runtime.console import command_group, progress_bar, stderr, stdout
from runtime.pipeline import LatteFlowPipeline
from runtime.requests import GenerationRequest

IN_FLIGHT = (1, 4, 16, 64)
SHARES = (0.5, 0.8, 0.95)
"""Of capacity, at which requests arrive."""
TRITON_ROUNDS = 3

app = command_group("Measure side by side, on this machine.\n\n\b\nExample:\n  latte-flow bench understanding --json")


@app.command(no_args_is_help=False)
def understanding(
    checkpoint: Annotated[str, typer.Argument(help="`shapes`, or a checkpoint folder.")] = "shapes",
    bundle: Annotated[Path | None, typer.Option(help="Its bundle; exported for the run where none is given.")] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens of each answer.", min=2)] = 64,
    rounds: Annotated[int, typer.Option(help="Answers of each side.", min=1)] = 9,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Answer one question about one picture: the engines beside transformers' `generate`.

    \b
    Examples:
      latte-flow bench understanding
      latte-flow bench understanding my-checkpoint --bundle my-bundle --json
    """
    with tempfile.TemporaryDirectory() as temporary:
        if bundle is None:
            bundle = Path(temporary) / "bundle"
            with staged() as on_stage:
                export_bundle(checkpoint, bundle, verify=False, on_stage=on_stage)
        model = load_checkpoint(checkpoint)
        model.vlm.set_attn_implementation("sdpa")
        with LatteFlowPipeline.from_pretrained(bundle) as pipe, progress_bar() as progress:
            task = progress.add_task("answer", total=rounds)
            report = measure(pipe, model, new_tokens, rounds, lambda: progress.advance(task))
    machine = describe_machine()
    if as_json:
        typer.echo(json.dumps({"machine": machine, **_as_dict(report)}))
        return
    for name, value in machine.items():
        stdout.print(f"{name}: {value}", highlight=False)
    table = Table(
        "",
        "first token",
        "tokens per second",
        title=f"{report.prompt_tokens} tokens of prompt and picture, {report.new_tokens} new ones, {rounds} rounds",
    )
    for side in (report.engines, report.transformers):
        table.add_row(side.name, f"{1000 * side.first_token:.1f} ms", f"{side.rate:.1f}")
    table.add_row(
        "engines are faster by",
        f"{report.transformers.first_token / report.engines.first_token:.2f}x",
        f"{report.engines.rate / report.transformers.rate:.2f}x",
    )
    stdout.print(table)
    stdout.print(f"both sides wrote the same tokens: {'yes' if report.same_tokens else 'NO'}")
    for stage, megabytes in report.memory_mb.items():
        stdout.print(f"memory, {stage}: {megabytes:+.1f} MB", highlight=False)


@app.command(no_args_is_help=False)
def serving(
    bundle: Annotated[Path | None, typer.Option(help="A bundle; `shapes` is exported where none is given.")] = None,
    requests: Annotated[int, typer.Option(help="Requests of each load.", min=4)] = 96,
    triton: Annotated[bool, typer.Option(help="Also measure Triton beside the same scheduler.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Step-level batching beside whole requests and one at a time, under load; and what Triton adds.

    \b
    Examples:
      latte-flow bench serving
      latte-flow bench serving --bundle my-bundle --requests 300 --json
    """
    with tempfile.TemporaryDirectory() as temporary:
        if bundle is None:
            bundle = Path(temporary) / "bundle"
            with staged() as on_stage:
                export_bundle("shapes", bundle, verify=False, on_stage=on_stage)
        loads = _in_process_loads(bundle, requests)
        if triton:
            loads += _triton_loads(bundle, requests)
    machine = describe_machine()
    if as_json:
        typer.echo(json.dumps({"machine": machine, "requests": requests, "loads": [asdict(load) for load in loads]}))
        return
    for name, value in machine.items():
        stdout.print(f"{name}: {value}", highlight=False)
    table = Table("load", "served by", "images per second", "p50", "p95", "p99", title=f"{requests} requests each")
    for load in loads:
        times = (f"{1000 * seconds:.0f} ms" for seconds in (load.p50, load.p95, load.p99))
        table.add_row(load.load, load.discipline, f"{load.images_per_second:.1f}", *times)
    stdout.print(table)


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


def _as_dict(report: Report) -> dict[str, object]:
    sides = (report.engines, report.transformers)
    return {
        "prompt_tokens": report.prompt_tokens,
        "new_tokens": report.new_tokens,
        "same_tokens": report.same_tokens,
        "memory_mb": report.memory_mb,
        **{
            side.name: {
                "first_token_seconds": side.first_token_seconds,
                "tokens_per_second": side.tokens_per_second,
            }
            for side in sides
        },
    }
