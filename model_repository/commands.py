"""The commands of the service: `repository`, `serve` and `client`."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from model_repository.client import Client, Response
from model_repository.layout import write_repository
from model_repository.schema import Layout, Platform
from model_repository.server import TritonServer
from runtime.answers import DEFAULT_MAX_NEW_TOKENS
from runtime.backends import PROVIDERS
from runtime.commands import AsJson, GuidanceScale, MaxNewTokens, NegativePrompt, Shift, Steps
from runtime.console import command_group, parse_pairs, progress_bar, stderr
from runtime.errors import InputError, ServiceError
from runtime.files import make_writable_folder
from runtime.flow_time import DEFAULT_GUIDANCE_SCALE, DEFAULT_SHIFT, DEFAULT_STEPS
from runtime.images import save_png

app = command_group(
    'Send requests to a running service.\n\n\b\nExample:\n  latte-flow client generate "a red star" --seed 7'
)
Bundle = Annotated[Path, typer.Argument(help="Folder that `latte-flow export` wrote.")]
Provider = Annotated[str, typer.Option(help=f"Runs the engines in Python; one of {', '.join(PROVIDERS)}.")]
Url = Annotated[str, typer.Option(help="Address of Triton's gRPC endpoint.")]
LayoutOption = Annotated[Layout, typer.Option(help="All engines in one process, or each as a Triton model.")]
LOCAL = "127.0.0.1:8001"


def repository(
    bundle: Bundle,
    out: Annotated[Path, typer.Argument(help="Folder for the model repository.")],
    layout: LayoutOption = "in-process",
    platform: Annotated[Platform, typer.Option(help="Runs the engines in the layout per-engine.")] = "python",
    provider: Provider = "cpu",
    gpu: Annotated[
        list[str] | None, typer.Option(metavar="ENGINE=NUMBER", help="GPU of an engine; may be repeated.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing repository.")] = False,
) -> None:
    """Write a Triton model repository, which contains the bundle.

    \b
    Examples:
      latte-flow repository bundle models
      latte-flow repository bundle models --layout per-engine --platform onnxruntime --gpu expert_0=0 --gpu expert_1=1
    """
    placement = {}
    for engine, number in parse_pairs(gpu, "--gpu").items():
        if not number.isdecimal():
            raise InputError(f"expected --gpu ENGINE=NUMBER, got {engine}={number}")
        placement[engine] = int(number)
    write_repository(bundle, out, layout=layout, platform=platform, provider=provider, placement=placement, force=force)
    typer.echo(str(out))


def serve(
    bundle: Bundle,
    http_port: Annotated[int, typer.Option(help="Port for HTTP; 0 takes a free one.")] = 8000,
    grpc_port: Annotated[int, typer.Option(help="Port for gRPC; 0 takes a free one.")] = 8001,
    metrics_port: Annotated[int, typer.Option(help="Port for Prometheus metrics; 0 takes a free one.")] = 8002,
    layout: LayoutOption = "in-process",
    provider: Provider = "cpu",
    control_key: Annotated[
        Path | None, typer.Option(help="File with the control key; a new key is made if there is none.")
    ] = None,
) -> None:
    """Serve a bundle on this machine with the bundled Triton server. On Ctrl-C, requests in flight finish.

    \b
    Examples:
      latte-flow serve bundle
      latte-flow serve bundle --http-port 0 --grpc-port 0 --metrics-port 0
    """
    with tempfile.TemporaryDirectory(prefix="latte-flow-models-") as folder:
        models = Path(folder) / "models"
        write_repository(bundle, models, layout=layout, provider=provider, execution_environment=Path(sys.prefix))
        server = TritonServer(models, http_port, grpc_port, metrics_port, control_key=control_key)
        try:
            with stderr.status("start the server"):
                server.wait_until_ready()
            typer.echo(f"http    http://{server.http_url}/v2/models/latte_flow/generate")
            typer.echo(f"grpc    {server.grpc_url}")
            typer.echo(f"metrics {server.metrics_url}")
            typer.echo(f"models  {models}")
            typer.echo(f"log     {server.log_file}")
            typer.echo(f"key     {server.control_key}")
            code = server.process.wait()
            raise ServiceError(f"the Triton server ended by itself with code {code}")
        except KeyboardInterrupt:
            stderr.print("waiting for requests in flight …")
        finally:
            server.drain()


@app.command(name="generate", no_args_is_help=True)
def client_generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    url: Url = LOCAL,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the PNGs.")] = Path("."),
    negative_prompt: NegativePrompt = "",
    num_inference_steps: Steps = DEFAULT_STEPS,
    guidance_scale: GuidanceScale = DEFAULT_GUIDANCE_SCALE,
    shift: Shift = DEFAULT_SHIFT,
    num_images: Annotated[int, typer.Option(help="Number of images.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the first image; the others count up.")] = 0,
    priority: Annotated[int, typer.Option(help="-2 to 2; requests with a higher priority are served first.")] = 0,
    deadline: Annotated[float | None, typer.Option(help="Seconds after which the request fails.")] = None,
    as_json: AsJson = False,
) -> None:
    """Generate images through a service. Ctrl-C cancels the request there too.

    \b
    Example:
      latte-flow client generate "a small red circle" --seed 7 -o images
    """
    make_writable_folder(out)
    options = {"deadline": deadline} if deadline is not None else {}
    with progress_bar(transient=True) as progress:
        task = progress.add_task("draw", total=num_inference_steps * num_images)

        def on_response(response: Response) -> None:
            if response.event == "progress":
                progress.advance(task)

        images = Client(url).generate(
            prompt,
            on_response=on_response,
            negative_prompt=negative_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            shift=shift,
            num_images=num_images,
            seed=seed,
            priority=priority,
            progress=True,
            **options,
        )
    files = []
    for index, image in enumerate(images):
        path = out / f"{index:03d}-{seed + index}.png"
        save_png(image, path, {"prompt": prompt, "seed": str(seed + index), "Software": "latte-flow"})
        files.append(str(path))
    typer.echo(json.dumps({"files": files}) if as_json else "\n".join(files))


@app.command(name="ask", no_args_is_help=True)
def client_ask(
    images_and_question: Annotated[
        list[str], typer.Argument(metavar="[IMAGE]... QUESTION", help="Image files, if any, then the question.")
    ],
    url: Url = LOCAL,
    max_new_tokens: MaxNewTokens = DEFAULT_MAX_NEW_TOKENS,
) -> None:
    """Ask a question about images through a service.

    \b
    Example:
      latte-flow client ask image.png "what colour is the circle?"
    """
    *images, question = images_and_question
    typer.echo(Client(url).ask(images, question, max_new_tokens=max_new_tokens))


@app.command(name="health", no_args_is_help=False)
def client_health(url: Url = LOCAL) -> None:
    """Check that the service draws an image in time. Exits with 1 if it does not.

    \b
    Example:
      latte-flow client health --url localhost:8001
    """
    if not Client(url).is_alive():
        raise ServiceError(f"{url} does not draw; look at the server's log, or load the model again")
    typer.echo(f"{url} draws")
