"""The commands of the runtime: `generate`, `ask`, `inspect` and `doctor`."""

from __future__ import annotations

import io
import json
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from runtime.answers import DEFAULT_MAX_NEW_TOKENS
from runtime.backends import PROVIDERS, open_backend
from runtime.console import parse_pairs, progress_bar, renamed_option, stdout
from runtime.doctor import examine
from runtime.errors import InputError
from runtime.files import make_writable_folder
from runtime.flow_time import ExpertSchedule
from runtime.images import contact_sheet, drawing_metadata, save_png
from runtime.manifest import Manifest, TensorSpec, load_manifest
from runtime.pipeline import LatteFlowPipeline
from runtime.tracing import Tracer

GROUP_COLOURS = ("cyan", "green", "yellow", "magenta", "blue", "red")

Bundle = Annotated[Path, typer.Argument(help="Folder that `latte-flow export` wrote.")]
Provider = Annotated[str, typer.Option(help=f"Runs the engines; one of {', '.join(PROVIDERS)}.")]
ProviderOption = Annotated[
    list[str] | None, typer.Option(metavar="NAME=VALUE", help="Option of the provider, such as device_id=1.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
NegativePrompt = Annotated[str, typer.Option(help="What the image should not show.")]
Steps = Annotated[int | None, typer.Option(help="Number of sampling steps.")]
GuidanceScale = Annotated[float | None, typer.Option(help="Guidance scale; 1 disables guidance and halves the cost.")]
Shift = Annotated[float | None, typer.Option(help="Time-grid shift; try 2 with few steps.")]
GuidanceInterval = Annotated[
    tuple[float, float] | None,
    typer.Option(metavar="START END", help="Flow times with guidance; 0 0.75 leaves out the last quarter."),
]
MaxNewTokens = Annotated[int, typer.Option(help="Largest number of tokens of the answer.")]


def generate(
    bundle: Bundle,
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What to draw; one or more prompts.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the PNGs.")] = Path("."),
    negative_prompt: NegativePrompt = "",
    num_inference_steps: Steps = None,
    guidance_scale: GuidanceScale = None,
    shift: Shift = None,
    guidance_interval: GuidanceInterval = None,
    num_images_per_prompt: Annotated[int, typer.Option(help="Number of images for each prompt.")] = 1,
    seed: Annotated[int | None, typer.Option(help="Seed of the first image; the others count up.")] = None,
    provider: Provider = "cpu",
    provider_option: ProviderOption = None,
    low_memory: Annotated[
        bool, typer.Option("--low-memory", help="Keep one engine with weights in memory at a time; slower.")
    ] = False,
    trace: Annotated[Path | None, typer.Option(help="Write a Chrome trace to this file, one lane per engine.")] = None,
    profile: Annotated[Path | None, typer.Option(hidden=True)] = None,
    grid: Annotated[bool, typer.Option("--grid", help="Also write one image that shows all of them.")] = False,
    as_json: AsJson = False,
) -> None:
    """Generate images from prompts.

    \b
    Examples:
      latte-flow generate bundle "a small red circle" -o images
      latte-flow generate bundle "a blue star" "a green ring" --seed 7 --num-images-per-prompt 4 --grid
      latte-flow generate bundle "a pink cross" --num-inference-steps 40 --guidance-scale 5 --json
      latte-flow generate bundle "a green cross" --num-inference-steps 4 --shift 2
      latte-flow generate bundle "a green ring" --guidance-interval 0 0.75
      latte-flow generate bundle "a red star" --trace trace.json
    """
    trace = renamed_option("--profile", profile, "--trace", trace)
    tracer = Tracer(open_backend(provider, parse_pairs(provider_option, "--provider-option")))
    with LatteFlowPipeline(bundle, load_manifest(bundle), tracer, low_memory=low_memory) as pipe:
        sampling = pipe.manifest.sampling.choose(num_inference_steps, guidance_scale, shift, negative_prompt)
        make_writable_folder(out)
        if trace is not None:
            make_writable_folder(trace.absolute().parent)
        with progress_bar(transient=True) as progress:
            task = progress.add_task("sample", total=max(sampling.num_inference_steps, 0))
            output = pipe(
                prompts,
                negative_prompt=negative_prompt,
                **sampling._asdict(),
                guidance_interval=guidance_interval,
                num_images_per_prompt=num_images_per_prompt,
                seed=seed,
                callback_on_step_end=lambda *_: progress.advance(task),
            )
        bundle_hash = pipe.manifest.bundle_hash()
    if trace is not None:
        tracer.save_trace(trace)
    of_image = [prompt for prompt in prompts for _ in range(num_images_per_prompt)]
    files = []
    for index, (image, prompt, image_seed) in enumerate(zip(output.images, of_image, output.seeds, strict=True)):
        metadata = drawing_metadata(
            prompt,
            negative_prompt=negative_prompt,
            seed=image_seed,
            **sampling._asdict(),
            guidance_interval=guidance_interval,
            bundle_hash=bundle_hash,
        )
        path = out / f"{index:03d}-{_slug(prompt)}-{image_seed}.png"
        save_png(image, path, metadata)
        files.append(path)
    if grid:
        path = out / "grid.png"
        save_png(
            contact_sheet(output.images, [f"{p} (seed {s})" for p, s in zip(of_image, output.seeds, strict=True)]), path
        )
        files.append(path)
    if as_json:
        report = {
            "files": [str(path) for path in files],
            "seeds": output.seeds,
            "seconds": {name: round(seconds, 4) for name, seconds in output.seconds.items()},
            "steps_per_group": output.steps_per_group,
            "bundle": bundle_hash,
        }
        typer.echo(json.dumps(report))
    else:
        for path in files:
            typer.echo(str(path))


def ask(
    bundle: Bundle,
    images_and_question: Annotated[
        list[str], typer.Argument(metavar="[IMAGE]... QUESTION", help="Image files, if any, then the question.")
    ],
    max_new_tokens: MaxNewTokens = DEFAULT_MAX_NEW_TOKENS,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 takes the most likely token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the most likely tokens with this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer; may be repeated.")] = None,
    provider: Provider = "cpu",
    provider_option: ProviderOption = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer while it is written.")] = False,
    as_json: AsJson = False,
) -> None:
    """Ask a question about images.

    \b
    Examples:
      latte-flow ask bundle image.png "what colour is the circle?"
      latte-flow ask bundle a.png b.png "describe the images" --stream
      latte-flow ask bundle "what can you see?" --temperature 0.7 --top-p 0.9 --seed 3 --json
    """
    *images, question = images_and_question
    if stream and as_json:
        raise InputError("--stream and --json exclude each other; give one")
    options = parse_pairs(provider_option, "--provider-option")
    with LatteFlowPipeline.from_pretrained(bundle, provider, options) as pipe:
        started = time.perf_counter()
        pieces = []
        for piece in pipe.ask_stream(
            images,
            question,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=stop or (),
        ):
            pieces.append(piece)
            if stream:
                typer.echo(piece, nl=False)
        seconds = time.perf_counter() - started
        bundle_hash = pipe.manifest.bundle_hash()
    answer = "".join(pieces)
    if as_json:
        report = {"question": question, "images": images, "answer": answer, "seconds": round(seconds, 4)}
        typer.echo(json.dumps(report | {"bundle": bundle_hash}))
    else:
        typer.echo("" if stream else answer)


def inspect(bundle: Bundle) -> None:
    """Show what a bundle contains: engines, shapes, precision, sizes, and the flow time of each expert.

    \b
    Example:
      latte-flow inspect bundle
    """
    for part in parts_of_report(load_manifest(bundle)):
        stdout.print(part)


def parts_of_report(manifest: Manifest) -> list[RenderableType]:
    """Returns what a bundle contains, in lines and tables."""
    geometry = manifest.geometry
    height, width = (side * geometry.vae_scale_factor for side in geometry.latent_size)
    return [
        f"bundle {manifest.bundle_hash()}, {manifest.precision}, variant {geometry.variant}",
        f"{height}x{width} pixels, "
        f"latents {geometry.latent_channels}x{geometry.latent_size[0]}x{geometry.latent_size[1]}, "
        f"{geometry.num_hidden_layers} layers in {manifest.schedule.num_groups} expert groups, "
        f"hidden {geometry.hidden_size}",
        _engine_table(manifest),
        _tensor_table(manifest),
        _timeline(manifest.schedule),
        _parity_line(manifest),
        "written by " + ", ".join(f"{name} {version}" for name, version in manifest.producer.items()),
    ]


def report_as_text(manifest: Manifest, width: int = 100) -> str:
    """Returns the same as plain text."""
    console = Console(file=io.StringIO(), width=width, no_color=True)
    console.print(*parts_of_report(manifest), sep="\n")
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def _engine_table(manifest: Manifest) -> Table:
    table = Table("engine", "flow time", "precision", "graph", "weights")
    for engine in manifest.engines:
        graph, *weights = (f"{file.size / 1e6:.2f} MB" for file in engine.files)
        interval = ""
        if engine.group is not None:
            interval = "{:g} to {:g}".format(*manifest.schedule.interval(engine.group))
        precision = engine.precision + (", fused" if engine.fused else "")
        if (q := engine.quantization) is not None:
            precision += f", {len(q.quantized)} of {len(q.quantized) + len(q.kept)} products"
        table.add_row(engine.name, interval, precision, graph, *weights)
    return table


def _tensor_table(manifest: Manifest) -> Table:
    """Lists inputs and outputs. Engines of the same form share a line, and so do tensors that differ in a number."""
    table = Table("engine", "", "tensor", "dtype", "shape")
    forms: dict[tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]], list[str]] = {}
    for engine in manifest.engines:
        forms.setdefault((engine.inputs, engine.outputs), []).append(engine.name)
    for (inputs, outputs), engines in forms.items():
        label = _numbered(engines)
        for direction, specs in (("in", inputs), ("out", outputs)):
            alike: dict[tuple[str, str, tuple[int | str, ...]], list[str]] = {}
            for spec in specs:
                alike.setdefault((spec.name.rstrip("0123456789"), spec.dtype, spec.shape), []).append(spec.name)
            for (_, dtype, shape), names in alike.items():
                table.add_row(label, direction, _numbered(names), dtype, f"\\[{', '.join(map(str, shape))}]")
                label = ""
        table.add_section()
    return table


def _numbered(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1].rpartition('_')[2]}"


def _timeline(schedule: ExpertSchedule, width: int = 64) -> Text:
    """Shows the expert schedule as a bar from noise to data."""
    text = Text("noise ")
    for group in range(schedule.num_groups):
        start, end = schedule.interval(group)
        label = f" {group}: {start:g} to {end:g} "
        text.append(label.center(max(len(label), round(width * (end - start)))), f"black on {_colour(group)}")
    return text.append(" data")


def _colour(group: int) -> str:
    return GROUP_COLOURS[group % len(GROUP_COLOURS)]


def _parity_line(manifest: Manifest) -> str:
    if manifest.parity is None:
        return "not verified; run: latte-flow verify BUNDLE CHECKPOINT"
    failed = [row for row in manifest.parity if not row.passed]
    if failed:
        return f"verification FAILED in {len(failed)} of {len(manifest.parity)} rows, first: {failed[0].what}"
    worst = max(row.value or 0.0 for row in manifest.parity if row.metric == "relative_error")
    psnr = min(row.value or 0.0 for row in manifest.parity if row.metric == "psnr_db")
    return f"verified: {len(manifest.parity)} rows, largest relative error {worst:.1e}, smallest PSNR {psnr:.1f} dB"


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40] or "image"


def doctor(
    bundle: Annotated[Path | None, typer.Argument(help="Also check the engines of this bundle.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what this machine has, and how to fix each problem. Exits with 1 if there is a problem.

    \b
    Examples:
      latte-flow doctor
      latte-flow doctor bundle --json
    """
    findings = examine(bundle)
    if as_json:
        typer.echo(json.dumps({"findings": [asdict(finding) for finding in findings]}))
    else:
        colours = {"ok": "green", "missing": "yellow", "problem": "red"}
        table = Table("what", "", "found", "what to do")
        for finding in findings:
            state = f"[{colours[finding.state]}]{finding.state}[/]"
            table.add_row(finding.what, state, Text(finding.found), Text(finding.fix))
        stdout.print(table)
    if any(finding.state == "problem" for finding in findings):
        raise typer.Exit(1)
