"""The commands of `latte-flow client`: requests to a running service."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from model_repository.client import TIMEOUT_SECONDS, Client, Response
from model_repository.connection import TOKEN_VARIABLE
from model_repository.control_commands import Ca, Tls
from runtime.answers import DEFAULT_MAX_NEW_TOKENS
from runtime.commands import AsJson, GuidanceScale, MaxNewTokens, NegativePrompt, Shift, Steps
from runtime.console import command_group, parse_pairs, progress_bar
from runtime.errors import ServiceError
from runtime.files import make_writable_folder
from runtime.images import save_png

app = command_group(
    f"Send requests to a running service. A bearer token comes from the environment variable {TOKEN_VARIABLE}.\n\n"
    '\b\nExample:\n  latte-flow client generate "a red star" --seed 7'
)
Url = Annotated[str, typer.Option(help="Address of Triton's gRPC endpoint.")]
Header = Annotated[
    list[str] | None, typer.Option(metavar="NAME=VALUE", help="Header of every request; may be repeated.")
]
Timeout = Annotated[float, typer.Option(help="Seconds that the request may take, with its retries.")]
LOCAL = "127.0.0.1:8001"


def _client(url: str, tls: bool, ca: Path | None, header: list[str] | None, timeout: float) -> Client:
    return Client(url, tls=tls, ca=ca, headers=parse_pairs(header, "--header"), timeout=timeout)


@app.command(name="generate", no_args_is_help=True)
def client_generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    url: Url = LOCAL,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the PNGs.")] = Path("."),
    negative_prompt: NegativePrompt = "",
    num_inference_steps: Steps = None,
    guidance_scale: GuidanceScale = None,
    shift: Shift = None,
    num_images: Annotated[int, typer.Option(help="Number of images.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the first image; the others count up.")] = 0,
    priority: Annotated[int, typer.Option(help="-2 to 2; requests with a higher priority are served first.")] = 0,
    deadline: Annotated[float | None, typer.Option(help="Seconds after which the request fails.")] = None,
    tls: Tls = False,
    ca: Ca = None,
    header: Header = None,
    timeout: Timeout = TIMEOUT_SECONDS,
    as_json: AsJson = False,
) -> None:
    """Generate images through a service. Ctrl-C cancels the request there too.

    \b
    Examples:
      latte-flow client generate "a small red circle" --seed 7 -o images
      latte-flow client generate "a red star" --url images.example.com:443 --tls
    """
    client = _client(url, tls, ca, header, timeout)
    make_writable_folder(out)
    given = {
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "shift": shift,
        "deadline": deadline,
    }
    options = {name: value for name, value in given.items() if value is not None}
    with progress_bar(transient=True) as progress:
        task = progress.add_task("draw", total=num_inference_steps and num_inference_steps * num_images)

        def on_response(response: Response) -> None:
            if response.event == "progress":
                progress.advance(task)

        images = client.generate(
            prompt,
            on_response=on_response,
            negative_prompt=negative_prompt,
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
    tls: Tls = False,
    ca: Ca = None,
    header: Header = None,
    timeout: Timeout = TIMEOUT_SECONDS,
) -> None:
    """Ask a question about images through a service.

    \b
    Example:
      latte-flow client ask image.png "what colour is the circle?"
    """
    *images, question = images_and_question
    client = _client(url, tls, ca, header, timeout)
    typer.echo(client.ask(images, question, max_new_tokens=max_new_tokens))


@app.command(name="health", no_args_is_help=False)
def client_health(
    url: Url = LOCAL,
    tls: Tls = False,
    ca: Ca = None,
    header: Header = None,
    timeout: Annotated[float, typer.Option(help="Seconds within which an image must be drawn.")] = 10.0,
) -> None:
    """Check that the service draws an image in time. Exits with 1 if it does not.

    \b
    Example:
      latte-flow client health --url localhost:8001
    """
    if not _client(url, tls, ca, header, timeout).is_alive(timeout):
        raise ServiceError(f"{url} does not draw; look at the server's log, or load the model again")
    typer.echo(f"{url} draws")
