"""`latte-flow bench`: every subject measures its sides by turns in one run, and prints the machine."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from export.benchmarks.compare import Comparison, compare_reports, load_report
from export.benchmarks.generation import IMAGES, Size, measure_generation, plot_generation, report_as_dict
from export.benchmarks.machine import describe_machine, print_machine
from export.benchmarks.memory import measure_export, measure_memory
from export.benchmarks.precision import PARTS, Error, random_flow, study
from export.benchmarks.providers import run_provider
from export.benchmarks.serving import DISCIPLINES, Load, capacity, in_flight, poisson
from export.benchmarks.serving import serving as in_process
from export.benchmarks.stages import measure_stages
from export.benchmarks.steps import SETTINGS, measure_steps, plot_steps
from export.benchmarks.understanding import Report, measure
from export.bundle import export_bundle
from export.commands import parity_table, raise_if_failed, staged
from export.paper_size import PAPER, one_group
from export.random_checkpoint import write_random_checkpoint
from latte.checkpoint import load_checkpoint, load_config, resolve_checkpoint
from runtime.backends import PROVIDERS, open_backend
from runtime.console import command_group, progress_bar, stderr, stdout
from runtime.files import write_text
from runtime.pipeline import DEFAULT_STEPS, LatteFlowPipeline
from runtime.requests import GenerationRequest

IN_FLIGHT = (1, 4, 16, 64)
SHARES = (0.5, 0.8, 0.95)
"""Of capacity, at which requests arrive."""
TRITON_ROUNDS = 3

app = command_group("Measure side by side, on this machine.\n\n\b\nExample:\n  latte-flow bench understanding --json")


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
    with bundle_for_the_run(bundle, checkpoint) as bundle:
        model = load_checkpoint(checkpoint)
        model.vlm.set_attn_implementation("sdpa")
        with LatteFlowPipeline.from_pretrained(bundle) as pipe, progress_bar() as progress:
            task = progress.add_task("answer", total=rounds)
            report = measure(pipe, model, new_tokens, rounds, lambda: progress.advance(task))
    machine = describe_machine()
    if as_json:
        typer.echo(json.dumps({"machine": machine, **_as_dict(report)}))
        return
    print_machine(machine)
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
def generation(
    size: Annotated[Size, typer.Option(help="Of all models; their weights are random.")] = "shapes",
    provider: Annotated[str, typer.Option(help=f"One of {', '.join(PROVIDERS)}.")] = "cpu",
    rounds: Annotated[int, typer.Option(help="Of each measurement.", min=1)] = 5,
    images: Annotated[list[int] | None, typer.Option(help="Pictures in a call; 1, 2 and 8 by default.")] = None,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Also time torch.compile.")] = True,
    plot: Annotated[Path | None, typer.Option(help="Draw the comparison here.")] = None,
    against: Annotated[
        Path | None, typer.Option("--compare", metavar="OLD.json", help="Flag what got slower since that report.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """The expert engines beside a dense twin, an autoregressive twin and PyTorch, in one run.

    \b
    Examples:
      latte-flow bench generation
      latte-flow bench generation --size paper --rounds 3 --plot generation.png
      latte-flow bench generation --json > old.json; latte-flow bench generation --compare old.json
    """
    old = None if against is None else load_report(against)
    config = PAPER if size == "paper" else load_config(resolve_checkpoint("shapes"))
    counts = tuple(images or IMAGES)
    with staged() as on_stage:
        report = measure_generation(size, config, provider, rounds, counts, compiled, on_stage)
    machine = describe_machine()
    if plot is not None:
        plot_generation(report, plot)
    if as_json:
        typer.echo(json.dumps({"machine": machine, "provider": provider} | report_as_dict(report)))
        return
    print_machine(machine)
    table = Table("a guided step", *(f"{n} image{'s' * (n > 1)}" for n in counts), "experts are faster by")
    for side, timings in report.step.items():
        ratio = timings[counts[0]].median / report.step["experts"][counts[0]].median
        shown = (f"{1000 * timings[n].median:.1f} ms" if n in timings else "" for n in counts)
        table.add_row(side, *shown, "" if side == "experts" else f"{ratio:.2f}x")
    stdout.print(table)
    table = Table("a call, without the decoder", *(f"{n} image{'s' * (n > 1)}" for n in counts), "to experts")
    for name, seconds, base in report.calls():
        shown = (f"{seconds(n):.2f} s" for n in counts)
        table.add_row(name, *shown, f"{seconds(counts[0]) / base(counts[0]):.2f}x")
    stdout.print(table)
    stdout.print(
        f"an expert step of one image runs at {report.rate / 1e9:.1f} GFLOP/s, {report.efficiency:.0%} of the "
        f"{report.gemm_peak / 1e9:.1f} that ONNX Runtime's matrix product reaches here"
    )
    for note in report.notes:
        stdout.print(f"note: {note}")
    if old is not None:
        print_comparison(compare_reports(old, {"machine": machine} | report_as_dict(report)))


@app.command(no_args_is_help=False)
def stages(
    bundle: Annotated[Path | None, typer.Option(help="A bundle; `shapes` is exported where none is given.")] = None,
    provider: Annotated[str, typer.Option(help=f"One of {', '.join(PROVIDERS)}.")] = "cpu",
    images: Annotated[int, typer.Option(help="Pictures in a call.", min=1)] = 1,
    rounds: Annotated[int, typer.Option(help="Calls.", min=1)] = 9,
    trace: Annotated[Path | None, typer.Option(help="Write a Chrome trace of the last call here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Where a call's time goes: tokeniser, prefix, each expert, solver, decoder, and the host between steps.

    \b
    Examples:
      latte-flow bench stages
      latte-flow bench stages --bundle my-bundle --images 8 --trace trace.json
    """
    with bundle_for_the_run(bundle) as bundle:
        profile = measure_stages(bundle, provider, images, rounds, trace)
    machine = describe_machine()
    if as_json:
        typer.echo(json.dumps({"machine": machine, "provider": provider, "images": images} | asdict(profile)))
        return
    print_machine(machine)
    table = Table("stage", "runs", "ms", "share", title=f"{images} image{'s' * (images > 1)}, {DEFAULT_STEPS} steps")
    for stage in profile.stages:
        share = f"{stage.seconds / profile.seconds:.1%}"
        table.add_row(stage.what, str(stage.runs or ""), f"{1000 * stage.seconds:.2f}", share)
    table.add_row("all", "", f"{1000 * profile.seconds:.2f}", "")
    stdout.print(table)
    stdout.print(f"host between steps: {profile.host_share_of_a_step:.1%} of a step")


@app.command(no_args_is_help=False)
def steps(
    checkpoint: Annotated[str, typer.Argument(help="`shapes`, or a checkpoint of the same world.")] = "shapes",
    prompts: Annotated[int, typer.Option(help="Held-out prompts of one and of two shapes, each.", min=1)] = 100,
    plot: Annotated[Path | None, typer.Option(help="Draw score and PSNR over the cost here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Quality against the number of steps: solvers, shifted time grids, and guidance on an interval of time.

    \b
    Examples:
      latte-flow bench steps
      latte-flow bench steps my-checkpoint --prompts 500 --plot steps.png
    """
    model = load_checkpoint(checkpoint)
    with progress_bar() as progress:
        task = progress.add_task("draw", total=len(SETTINGS))
        found = []
        for point in measure_steps(model, prompts):
            found.append(point)
            progress.advance(task)
    machine = describe_machine()
    if plot is not None:
        plot_steps(found, plot)
    if as_json:
        typer.echo(json.dumps({"machine": machine, "prompts": prompts, "points": [asdict(p) for p in found]}))
        return
    print_machine(machine)
    table = Table("sampler", "steps", "expert rows", "1 shape", "2 shapes", "PSNR", title=f"{prompts} prompts each")
    for point in found:
        shares = (f"{share:.1%}" for share in point.right)
        table.add_row(point.sampler, str(point.steps), str(point.rows), *shares, f"{point.psnr_db:.1f} dB")
    stdout.print(table)


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
    print_comparison(compare_reports(before, after))


def print_comparison(comparisons: list[Comparison]) -> None:
    """A line for each measurement; ends the command with 1 if one is slower."""
    colours = {"slower": "red", "faster": "green", "same": "default"}
    table = Table("measured", "old", "new", "new / old time", "noise", "")
    for found in comparisons:
        verdict = f"[{colours[found.verdict]}]{found.verdict}[/]"
        numbers = (f"{found.old:.4g}", f"{found.new:.4g}", f"{found.slower_by:.2f}", f"{found.noise:.1%}")
        table.add_row(found.name, *numbers, verdict)
    stdout.print(table)
    if any(found.verdict == "slower" for found in comparisons):
        raise typer.Exit(1)


@app.command(no_args_is_help=False)
def memory(
    size: Annotated[
        Size, typer.Option(help="paper: 4 billion random parameters, 16 GB of disk while it runs.")
    ] = "shapes",
    provider: Annotated[str, typer.Option(help=f"One of {', '.join(PROVIDERS)}.")] = "cpu",
    draw: Annotated[bool, typer.Option(help="Also load the bundle and draw, all engines and one at a time.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Memory of an export; memory and time to the first image with all engines and with one at a time.

    \b
    Examples:
      latte-flow bench memory
      latte-flow bench memory --size paper --no-draw
    """
    with tempfile.TemporaryDirectory() as temporary, staged() as on_stage:
        checkpoint = resolve_checkpoint("shapes")
        if size == "paper":
            checkpoint = Path(temporary) / "checkpoint"
            on_stage("write a random checkpoint")
            write_random_checkpoint(checkpoint)
        bundle = Path(temporary) / "bundle"
        on_stage("export")
        export_footprint = measure_export(checkpoint, bundle, "fp16" if size == "paper" else "fp32")
        on_stage("draw")
        footprints = measure_memory(bundle, provider) if draw else []
    machine = describe_machine()
    if as_json:
        drawn = [asdict(footprint) for footprint in footprints]
        typer.echo(json.dumps({"machine": machine, "export": asdict(export_footprint), "draw": drawn}))
        return
    print_machine(machine)
    above = export_footprint.peak_mb - export_footprint.interpreter_mb
    stdout.print(
        f"export of {export_footprint.checkpoint_mb / 1000:.2f} GB: {export_footprint.seconds:.0f} s, at most "
        f"{above:.0f} MB above the {export_footprint.interpreter_mb:.0f} MB of the interpreter with its libraries"
    )
    if footprints:
        table = Table("engines in memory", "first image", "second image", "peak MB above the interpreter")
        for found in footprints:
            kept = "one at a time" if found.low_memory else "all"
            memory_mb = f"{found.peak_mb - found.interpreter_mb:.0f}"
            table.add_row(kept, f"{found.first_image_seconds:.2f} s", f"{found.second_image_seconds:.2f} s", memory_mb)
        stdout.print(table)


@app.command(no_args_is_help=False)
def precision(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """What half precision costs each part of an expert that the exporter keeps in fp32.

    \b
    Example:
      latte-flow bench precision
    """
    expert = one_group(PAPER, PAPER.layers_per_group)
    models = {
        "shapes": lambda: load_checkpoint("shapes").flow,
        "hidden 1536, random": lambda: random_flow(expert),
        "hidden 1536, massive channel": lambda: random_flow(expert, massive=True),
    }
    errors: list[Error] = []
    with progress_bar() as progress:
        task = progress.add_task("", total=2 * (len(PARTS) + 2) * len(models))
        for name, make in models.items():
            progress.update(task, description=name)
            for error in study(name, make()):
                errors.append(error)
                progress.advance(task)
    machine = describe_machine()
    if as_json:
        typer.echo(json.dumps({"machine": machine, "errors": [asdict(error) for error in errors]}))
        return
    print_machine(machine)
    columns = [(model, half) for model in models for half in ("fp16", "bf16")]
    found = {(error.model, error.precision, error.part): error.error for error in errors}
    table = Table("in half precision too", *(f"{model}, {half}" for model, half in columns), title="relative error")
    for part in dict.fromkeys(error.part for error in errors):
        values = (found[(*column, part)] for column in columns)
        table.add_row(part, *("not finite" if value is None else f"{value:.1e}" for value in values))
    stdout.print(table)


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
    with bundle_for_the_run(bundle) as bundle:
        loads = _in_process_loads(bundle, requests)
        if triton:
            loads += _triton_loads(bundle, requests)
    machine = describe_machine()
    if as_json:
        typer.echo(json.dumps({"machine": machine, "requests": requests, "loads": [asdict(load) for load in loads]}))
        return
    print_machine(machine)
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
