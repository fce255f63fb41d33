"""The commands of `latte-flow control`: reload, drain and check a running service."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from model_repository.control import ANSWER_SECONDS, Control, read_key
from model_repository.schema import DRAIN_SECONDS
from runtime.console import command_group
from runtime.errors import ServiceError

app = command_group(
    "Operate a running service with its control key.\n\n\b\nExample:\n  latte-flow control reload --key control.key"
)
Url = Annotated[str, typer.Option(help="Address of Triton's HTTP endpoint, HOST:PORT or https://HOST:PORT.")]
Tls = Annotated[bool, typer.Option("--tls", help="Connect over TLS.")]
Ca = Annotated[Path | None, typer.Option(help="PEM file of the authorities to trust; implies --tls.")]
Key = Annotated[Path, typer.Option("--key", help="File with the control key; `latte-flow serve` prints its path.")]
LOCAL = "127.0.0.1:8000"


@app.command(no_args_is_help=True)
def reload(key: Key, url: Url = LOCAL, tls: Tls = False, ca: Ca = None) -> None:
    """Load what the repository contains now. The old model serves until the new one is warm, and stays if that fails.

    In the layout per-engine the requests in flight finish first, and new ones wait until all engines are loaded.

    \b
    Examples:
      latte-flow repository new-bundle models --force && latte-flow control reload --key control.key
      latte-flow control reload --key control.key --url https://control.example.com
    """
    Control(url, read_key(key), tls=tls, ca=ca).reload()
    typer.echo(f"{url} has loaded the model")


@app.command(no_args_is_help=True)
def drain(
    key: Key,
    url: Url = LOCAL,
    tls: Tls = False,
    ca: Ca = None,
    seconds: Annotated[float, typer.Option(help="How long requests in flight may take.")] = DRAIN_SECONDS,
) -> None:
    """Refuse new requests and wait for those in flight. Exits with 1 if some are not finished in time.

    \b
    Example:
      latte-flow control drain --key control.key
    """
    if not Control(url, read_key(key), tls=tls, ca=ca).drain(seconds):
        raise ServiceError(f"{url} still has requests in flight, or clients keep streams open, after {seconds:g} s")
    typer.echo(f"{url} has finished its requests")


@app.command(no_args_is_help=True)
def alive(
    key: Key,
    url: Url = LOCAL,
    tls: Tls = False,
    ca: Ca = None,
    seconds: Annotated[float, typer.Option(help="How long each answer may take.")] = ANSWER_SECONDS,
) -> None:
    """Check that the model answers a heartbeat, or drains, or is being replaced. Exits with 1 if it must be restarted.

    \b
    Example:
      latte-flow control alive --key control.key
    """
    Control(url, read_key(key), tls=tls, ca=ca).check_alive(seconds)
    typer.echo(f"{url} is alive")
