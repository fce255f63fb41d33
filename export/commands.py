"""The commands of the exporter: `export`, `verify`, `roundtrip` and `demo`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from export.bundle import export_bundle
from export.demo import run_demo
from export.graph_store import GraphStore, default_store
from export.graphs import OPSETS
from export.quantization import QuantizationSettings
from export.reference import Reference
from export.roundtrip import count_agreements, run_roundtrip, sheet_of
from export.verify import runs_on, verify_bundle
from runtime.backends import PROVIDERS
from runtime.console import progress_bar, stderr, stdout
from runtime.errors import VerificationError
from runtime.images import save_png
from runtime.manifest import ParityRow, Precision, load_manifest
from runtime.pipeline import LatteFlowPipeline

FORMATS = {"relative_error": "{:.1e}", "psnr_db": "{:.1f} dB", "bias_levels": "{:.3f} levels", "differences": "{:.0f}"}
"""How the values of each metric are shown."""
MAX_SHOWN = 48
"""Largest number of images on a sheet of disagreements."""
Bundle = Annotated[Path, typer.Argument(help="Folder that `latte-flow export` wrote.")]
Provider = Annotated[str, typer.Option(help=f"Runs the engines; one of {', '.join(PROVIDERS)}.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def export(
    checkpoint: Annotated[str, typer.Argument(help="The name of a shipped checkpoint, or a folder.")],
    bundle: Annotated[Path, typer.Argument(help="Folder for the bundle.")],
    precision: Annotated[Precision, typer.Option(help="Precision of weights and matrix products.")] = "fp32",
    opset: Annotated[int, typer.Option(help="ONNX operator set.", min=OPSETS[0], max=OPSETS[-1])] = 18,
    fuse: Annotated[bool, typer.Option(help="Rewrite the graphs so that only ONNX Runtime can run them.")] = False,
    max_error: Annotated[
        float, typer.Option(help="int8, fp8: largest relative error of an engine.", min=0)
    ] = QuantizationSettings().max_error,
    reduce_range: Annotated[
        bool | None,
        typer.Option(help="int8: weights of 7 bits, for CPUs without VNNI. Default: if this CPU needs it."),
    ] = None,
    verify: Annotated[bool, typer.Option(help="Compare the engines with PyTorch.")] = True,
    cache: Annotated[bool, typer.Option(help="Reuse graphs that were traced before on this machine.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
) -> None:
    """Turn a checkpoint into a bundle: one engine per expert group, and those of VLM, solver and autoencoder.

    \b
    Examples:
      latte-flow export shapes bundle
      latte-flow export my-checkpoint bundle --precision fp16 --force
      latte-flow export shapes small --precision int8
      latte-flow export my-checkpoint fast --precision fp8
    """
    with staged() as on_stage:
        manifest, failed = export_bundle(
            checkpoint,
            bundle,
            precision=precision,
            opset=opset,
            fuse=fuse,
            quantization=QuantizationSettings(max_error=max_error, reduce_range=reduce_range),
            verify=verify,
            force=force,
            store=default_store() if cache else GraphStore(None),
            on_stage=on_stage,
        )
    typer.echo(f"{bundle} ({manifest.bundle_hash()})")
    if verify and not runs_on(precision, "cpu"):
        say_not_run(precision, "cpu")
    raise_if_failed(failed)


def verify(
    bundle: Bundle,
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint that the bundle was exported from.")],
    provider: Provider = "cpu",
    as_json: AsJson = False,
) -> None:
    """Compare a bundle with PyTorch: inputs, engines, steps, trajectory, images, answers. Exits with 1 if a row fails.

    \b
    Examples:
      latte-flow verify bundle shapes
      latte-flow verify bundle my-checkpoint --json
    """
    with staged() as on_stage:
        on_stage("load the checkpoint")
        reference = Reference.from_pretrained(checkpoint)
        on_stage("verify against PyTorch")
        rows = verify_bundle(bundle, reference, provider)
    precision = load_manifest(bundle).precision
    if not runs_on(precision, provider):
        say_not_run(precision, provider)
    if as_json:
        passed = all(row.passed for row in rows)
        typer.echo(json.dumps({"passed": passed, "rows": [row.model_dump() for row in rows]}))
    else:
        stdout.print(parity_table(rows))
    raise_if_failed([row for row in rows if not row.passed])


def roundtrip(
    bundle: Annotated[Path, typer.Argument(help="Bundle of `shapes`, or of a checkpoint trained like it.")],
    prompts: Annotated[int, typer.Option(help="Number of held-out prompts.", min=1)] = 100,
    shapes: Annotated[int, typer.Option(help="Number of shapes in each prompt.", min=1, max=2)] = 1,
    seed: Annotated[int, typer.Option(help="Seed of prompts and noise.")] = 0,
    provider: Provider = "cpu",
    sheet: Annotated[Path | None, typer.Option(help="Write the images that do not agree to this PNG.")] = None,
    as_json: AsJson = False,
) -> None:
    """Generate images, ask the same bundle to describe them, and compare both with the pixels.

    \b
    Examples:
      latte-flow roundtrip bundle
      latte-flow roundtrip bundle --shapes 2 --prompts 500 --sheet disagreements.png
    """
    with LatteFlowPipeline.from_pretrained(bundle, provider=provider) as pipe, progress_bar() as p:
        task = p.add_task("draw and ask", total=prompts)
        round_trips = run_roundtrip(pipe, prompts, shapes, seed, lambda n: p.advance(task, n))
    counts = count_agreements(round_trips)
    apart = [trip for trip in round_trips if trip.agreement != "all three"]
    if sheet is not None and apart:
        save_png(sheet_of(apart[:MAX_SHOWN]), sheet)
    if as_json:
        typer.echo(json.dumps({"prompts": prompts, "shapes": shapes, "seed": seed, "agreements": counts}))
        return
    table = Table("agree", "images", "share", title=f"{prompts} held-out prompts of {shapes} shape{'s' * (shapes > 1)}")
    for agreement, count in counts.items():
        table.add_row(agreement, str(count), f"{count / prompts:.1%}", end_section=agreement == "all three")
    stdout.print(table)
    if sheet is not None and apart:
        typer.echo(str(sheet))


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the bundle and the images.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Seed of the first image.")] = 0,
) -> None:
    """Export, verify, generate and ask with the shipped checkpoints, and show how long each stage takes.

    \b
    Example:
      latte-flow demo --out demo
    """
    with staged() as on_stage:
        result = run_demo(out, seed, on_stage)
    table = Table("stage", "seconds")
    for name, seconds in result.seconds.items():
        table.add_row(name, f"{seconds:.1f}")
    stdout.print(table)
    for path in result.files:
        typer.echo(str(path))
    for question, answer in result.answers:
        typer.echo(f"{question} {answer}")
    raise_if_failed(result.failed)


def parity_table(rows: list[ParityRow]) -> Table:
    """Returns the rows of a verification as a table."""
    table = Table("rung", "what", "group", "step", "measured", "tolerance", "")
    for row in rows:
        form = FORMATS[row.metric]
        shown = "not finite" if row.value is None else form.format(row.value)
        limit = form.format(row.tolerance)
        group, step = ("" if number is None else str(number) for number in (row.group, row.step))
        verdict = "[green]ok[/]" if row.passed else "[red]FAILED[/]"
        table.add_row(row.rung, row.what, group, step, shown, limit, verdict)
    return table


def say_not_run(precision: Precision, provider: str) -> None:
    """Says what a verification left out."""
    stderr.print(
        f"the engines were not run, because {provider} does not run {precision}: only inputs, weights and graphs were "
        "verified; run latte-flow verify with a provider of a GPU for the rest",
        soft_wrap=True,
    )


def raise_if_failed(failed: list[ParityRow]) -> None:
    """Raises `VerificationError` with the first rung, step and group that failed, if any did."""
    if not failed:
        return
    first = failed[0]
    where = "".join(
        f", {name} {number}" for name, number in (("group", first.group), ("step", first.step)) if number is not None
    )
    value = "not finite, or the reference is constant" if first.value is None else f"{first.value:.3g}"
    value = first.note or value
    raise VerificationError(
        f"verification failed in {len(failed)} rows; first at rung {first.rung}: {first.what}{where}: "
        f"{first.metric}: {value}, tolerance {first.tolerance:g}"
    )


@contextmanager
def staged() -> Iterator[Callable[[str], None]]:
    """Shows a spinner with the current stage, and prints the time of each finished stage."""
    started = time.perf_counter()
    current: list[str] = []

    def finish() -> None:
        if current:
            stderr.print(f"  {current.pop()}: {time.perf_counter() - started:.1f} s")

    with stderr.status("") as status:

        def on_stage(name: str) -> None:
            nonlocal started
            finish()
            started = time.perf_counter()
            current.append(name)
            status.update(name)

        yield on_stage
        finish()
