"""The commands of the service: `repository` and `serve`."""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

from model_repository.connection import TOKEN_VARIABLE
from model_repository.layout import LogFormat, settings_of, write_repository
from model_repository.schema import Layout, Platform
from model_repository.server import LOOPBACK, TritonServer
from model_repository.signals import ends_by_interrupt, ignore_endings
from model_repository.supervisor import Supervisor
from model_repository.transport import is_loopback
from runtime.backends import PROVIDERS
from runtime.console import parse_pairs, stderr
from runtime.errors import InputError, ServiceError
from runtime.serving.requests import Limits

Bundle = Annotated[Path, typer.Argument(help="Folder that `latte-flow export` wrote.")]
Provider = Annotated[str, typer.Option(help=f"Runs the engines in Python; one of {', '.join(PROVIDERS)}.")]
ProviderOption = Annotated[
    list[str] | None, typer.Option(metavar="NAME=VALUE", help="Option of the provider; may be repeated.")
]
Device = Annotated[int | None, typer.Option(help="Number of the GPU; the provider's option device_id.")]
Limit = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE",
        help=f"What the service accepts; may be repeated: {', '.join(field.name for field in fields(Limits))}.",
    ),
]
LogFormatOption = Annotated[LogFormat, typer.Option(help="Format of the service's lines in the server's log.")]
LayoutOption = Annotated[Layout, typer.Option(help="All engines in one process, or each as a Triton model.")]


def limits_of(pairs: list[str] | None) -> Limits:
    limits = parse_pairs(pairs, "--limit")
    if unknown := sorted(set(limits) - {field.name for field in fields(Limits)}):
        raise InputError(f"unknown limit {unknown[0]!r}; known are {', '.join(field.name for field in fields(Limits))}")
    return Limits.from_parameters(limits)


def provider_options_of(pairs: list[str] | None, device: int | None) -> dict[str, str]:
    options = parse_pairs(pairs, "--provider-option")
    return options if device is None else {"device_id": str(device)} | options


def warn(message: str) -> None:
    stderr.print(f"warning: {message}", style="yellow", markup=False)


def repository(
    bundle: Bundle,
    out: Annotated[Path, typer.Argument(help="Folder for the model repository.")],
    layout: LayoutOption = "in-process",
    platform: Annotated[Platform, typer.Option(help="Runs the engines in the layout per-engine.")] = "python",
    provider: Provider = "cpu",
    provider_option: ProviderOption = None,
    device: Device = None,
    limit: Limit = None,
    log_format: LogFormatOption = "text",
    environment: Annotated[
        Path | None, typer.Option(help="Virtual environment of the Python models, if it is not the server's own.")
    ] = None,
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
    before = settings_of(out)
    write_repository(
        bundle,
        out,
        layout=layout,
        platform=platform,
        provider=provider,
        provider_options=provider_options_of(provider_option, device),
        limits=limits_of(limit),
        log_format=log_format,
        placement=placement,
        execution_environment=environment,
        force=force,
    )
    now = settings_of(out)
    changed = [
        f"{name} {before.get(name, 'unset')} -> {now.get(name, 'unset')}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if before and changed:
        warn(f"settings of {out} that changed: {', '.join(changed)}; give their options again to keep them")
    typer.echo(str(out))


def serve(
    bundle: Bundle,
    http_port: Annotated[int, typer.Option(help="Port for HTTP; 0 takes a free one.")] = 8000,
    grpc_port: Annotated[int, typer.Option(help="Port for gRPC; 0 takes a free one.")] = 8001,
    metrics_port: Annotated[int, typer.Option(help="Port for Prometheus metrics; 0 takes a free one.")] = 8002,
    layout: LayoutOption = "in-process",
    provider: Provider = "cpu",
    provider_option: ProviderOption = None,
    device: Device = None,
    limit: Limit = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; any other than a loopback one is exposed.")
    ] = LOOPBACK,
    log_file: Annotated[Path | None, typer.Option(help="The server's log; a temporary file if not given.")] = None,
    log_format: LogFormatOption = "text",
    control_key: Annotated[
        Path | None, typer.Option(help="File with the control key; a new key is made if there is none.")
    ] = None,
) -> None:
    """Serve a bundle on this machine with the bundled Triton server.

    A server that dies is started again. On Ctrl-C or SIGTERM, requests in flight finish; a second one stops at once.

    \b
    Examples:
      latte-flow serve bundle
      latte-flow serve bundle --limit max_queued_images=64 --limit max_steps=50 --log-file serve.log
      latte-flow serve bundle --http-port 0 --grpc-port 0 --metrics-port 0
    """
    with ends_by_interrupt(), tempfile.TemporaryDirectory(prefix="latte-flow-models-") as folder:
        models = Path(folder) / "models"
        write_repository(
            bundle,
            models,
            layout=layout,
            provider=provider,
            provider_options=provider_options_of(provider_option, device),
            limits=limits_of(limit),
            log_format=log_format,
            execution_environment=Path(sys.prefix),
        )
        if not is_loopback(host):
            warn(
                f"whoever reaches {host} can send requests, unencrypted, and a malformed one can end the bundled "
                "server; put a proxy in front of it (docs/serving.md)"
            )
            if os.environ.get(TOKEN_VARIABLE):
                warn(
                    f"{TOKEN_VARIABLE} is set, but this server asks for no token and has no TLS; let the proxy do both"
                )
        server = TritonServer(
            models, http_port, grpc_port, metrics_port, host=host, log_file=log_file, control_key=control_key
        )
        try:
            try:
                with stderr.status("start the server"):
                    server.wait_until_ready()
                typer.echo(f"http    http://{server.http_url}/v2/models/latte_flow/generate")
                typer.echo(f"grpc    {server.grpc_url}")
                typer.echo(f"metrics {server.metrics_url}")
                typer.echo(f"models  {models}")
                typer.echo(f"log     {server.log_file}")
                typer.echo(f"key     {server.control_key}")
                Supervisor(server, lambda line: stderr.print(line, markup=False)).run()
            except KeyboardInterrupt:
                stderr.print("waiting for requests in flight; interrupt again to stop at once")
                if not server.drain():
                    raise ServiceError("some requests in flight were not finished") from None
        finally:
            ignore_endings()  # what follows is short, and leaves nothing behind
            server.close(0)
