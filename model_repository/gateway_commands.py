"""The command `gateway`: OpenAI's HTTP API over a bundle in this process, or over a Triton server."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from fastapi import FastAPI

from model_repository.client import Client
from model_repository.commands import (
    Device,
    Limit,
    LogFormatOption,
    Provider,
    ProviderOption,
    limits_of,
    provider_options_of,
    warn,
)
from model_repository.remote import TritonService
from model_repository.schema import DRAIN_SECONDS
from model_repository.transport import is_loopback
from runtime.commands import report_as_text
from runtime.console import stderr
from runtime.errors import InputError, MissingExtraError, one_line
from runtime.gateway.app import Gateway, GatewaySettings, make_app
from runtime.gateway.keys import KeyRing
from runtime.gateway.metrics import Families
from runtime.gateway.server import make_server
from runtime.images import MAX_FILE_BYTES
from runtime.manifest import load_manifest
from runtime.pipeline import LatteFlowPipeline
from runtime.serving.log import log_request, set_up_logging
from runtime.serving.metrics import Metrics
from runtime.serving.replicas import ReplicatedService
from runtime.serving.requests import Limits
from runtime.serving.service import LocalService, Service, warm_up

LOOPBACK = "127.0.0.1"
LAST_WORDS_SECONDS = 2.0
"""Time for the errors of open requests to leave, when the process must end."""
BROKEN = 70
"""Exit code of a process whose scheduler cannot go on."""


def gateway(
    bundle: Annotated[Path | None, typer.Argument(help="Folder that `latte-flow export` wrote.")] = None,
    triton: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Instead of a bundle: a Triton server's gRPC endpoint.")
    ] = None,
    triton_tls: Annotated[bool, typer.Option("--triton-tls", help="Connect to Triton over TLS.")] = False,
    triton_ca: Annotated[
        Path | None, typer.Option(help="Certificates of the authorities to trust, PEM; implies --triton-tls.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; by default this machine only.")] = LOOPBACK,
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8080,
    model_name: Annotated[str, typer.Option(help="Name of the model in the API.")] = "latte-flow",
    api_key_file: Annotated[
        Path | None, typer.Option(help="JSON list of keys, each with name and key; without it everybody may ask.")
    ] = None,
    allow_image_host: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST", help="Host from which images in messages may be fetched; may be repeated."),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL", help="Origin of pages that may ask from a browser, such as https://x.org; may be repeated."
        ),
    ] = None,
    result_cache: Annotated[
        int, typer.Option(metavar="MB", help="Memory for answers to equal requests with a seed; 0: none.", min=0)
    ] = 0,
    with_page: Annotated[
        bool, typer.Option("--playground", help="Show the playground at /, for everybody who can connect.")
    ] = False,
    access_log: Annotated[bool, typer.Option("--access-log", help="Log every HTTP request.")] = False,
    log_format: LogFormatOption = "text",
    provider: Provider = "cpu",
    provider_option: ProviderOption = None,
    device: Device = None,
    devices: Annotated[
        str | None, typer.Option(metavar="NUMBER,…", help="GPUs, each with all engines; requests are shared out.")
    ] = None,
    limit: Limit = None,
) -> None:
    """Serve OpenAI's HTTP API over a bundle in this process, or over a Triton server.

    The token for the Triton server is in the environment variable LATTE_FLOW_TOKEN.

    \b
    Examples:
      latte-flow gateway demo/bundle
      latte-flow gateway demo/bundle --host 0.0.0.0 --api-key-file keys.json --access-log --log-format json
      latte-flow gateway bundle --provider tensorrt --devices 0,1,2,3
      latte-flow gateway --triton localhost:8001
      curl http://127.0.0.1:8080/v1/images/generations -H 'Content-Type: application/json' \\
        -d '{"prompt": "a small red circle", "seed": 7}'
    """
    set_up_logging(log_format)
    keys = KeyRing([]) if api_key_file is None else KeyRing.from_file(api_key_file)
    if with_page and not keys.is_empty:
        raise InputError("the page asks for no key; leave out --playground or --api-key-file")
    if keys.is_empty and not is_loopback(host):
        warn(f"everybody who can reach {host}:{port} may ask; give --api-key-file")
    settings = GatewaySettings(
        keys,
        frozenset(allow_image_host or ()),
        frozenset(allow_origin or ()),
        access_log,
        result_cache_bytes=result_cache << 20,
    )
    if (bundle is None) == (triton is None):
        raise InputError("give either a bundle or --triton HOST:PORT")
    options = _options_of_replicas(provider, provider_options_of(provider_option, device), devices)
    listener = _listen(host, port)
    if triton is not None:
        service: Service = TritonService(Client(triton, tls=triton_tls, ca=triton_ca), model_name)
        door = Gateway(service, settings)
    else:
        assert bundle is not None
        service, door = _local_door(bundle, provider, options, limits_of(limit), settings, model_name)
    page = _page(service, bundle) if with_page else None
    told = f"http://{_shown(listener)}/v1 serves {model_name}; /docs describes the API"
    _run(listener, door, [service], f"{told}, / is the playground" if with_page else told, page)


def playground(
    bundle: Annotated[Path, typer.Argument(help="Folder that `latte-flow export` wrote.")],
    compare: Annotated[
        Path | None, typer.Option(metavar="BUNDLE", help="Another bundle, to draw the same with both.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; by default this machine only.")] = LOOPBACK,
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 7860,
    provider: Provider = "cpu",
    provider_option: ProviderOption = None,
    device: Device = None,
) -> None:
    """Draw, ask and compare on a page in the browser. The gateway's API is there too.

    \b
    Examples:
      latte-flow playground demo/bundle
      latte-flow playground demo/bundle --compare int8 --port 0
    """
    set_up_logging("text")
    if not is_loopback(host):
        warn(f"everybody who can reach {host}:{port} may use the page")
    listener = _listen(host, port)
    options = provider_options_of(provider_option, device)
    service, door = _local_door(bundle, provider, [options], Limits(), GatewaySettings(), "latte-flow")
    other = None
    if compare is not None:
        other = LocalService(LatteFlowPipeline.from_pretrained(compare, provider, options), on_death=_end_process)
    page = _page(service, bundle, other, compare)
    services = [service] if other is None else [service, other]
    _run(listener, door, services, f"the playground is at http://{_shown(listener)}", page)


def _options_of_replicas(provider: str, options: dict[str, str], devices: str | None) -> list[dict[str, str]]:
    """Returns the provider's options of each replica.

    Raises:
        InputError: the devices are no numbers, or a replica on each makes no sense.
    """
    if devices is None:
        return [options]
    numbers = devices.split(",")
    if len(set(numbers)) < len(numbers) or not all(number.isascii() and number.isdigit() for number in numbers):
        raise InputError(f"expected --devices like 0,1, each once, got {devices!r}")
    if provider == "cpu" or "device_id" in options:
        raise InputError("--devices needs a provider on GPUs, and takes the place of --device and device_id")
    return [options | {"device_id": number} for number in numbers]


def _local_door(
    bundle: Path,
    provider: str,
    options: Sequence[dict[str, str]],
    limits: Limits,
    settings: GatewaySettings,
    name: str,
) -> tuple[Service, Gateway]:
    """Returns the service of a bundle in this process, and the gateway to it with its metrics.

    Args:
        options: the provider's, of each replica.
    """
    replicas = []
    for of_one in options:
        pipeline = LatteFlowPipeline.from_pretrained(bundle, provider, of_one)
        warm_up(pipeline)
        replicas.append(LocalService(pipeline, limits, name=name, on_end=log_request, on_death=_end_process))
    service = replicas[0] if len(replicas) == 1 else ReplicatedService(replicas)
    door = Gateway(service, settings)
    metrics = Metrics(Families(door.gauges.registry), service.model.groups)
    schedulers, workers = [each.scheduler for each in replicas], [each.worker for each in replicas]
    door.report = lambda: metrics.update(schedulers, workers, sum(scheduler.open_requests for scheduler in schedulers))
    return service, door


def _page(
    service: Service, bundle: Path | None, other: Service | None = None, other_bundle: Path | None = None
) -> Callable[[FastAPI], FastAPI]:
    """Returns what adds the playground to an application."""
    # Imported here, because only the playground needs it.
    try:
        from runtime.playground.page import Shown, make_page, mount
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f'the playground needs {error.name}, which is not installed; run: pip install "latte-flow[playground]"'
        ) from error
    shown = Shown(
        "BUNDLE" if bundle is None else str(bundle),
        "" if bundle is None else report_as_text(load_manifest(bundle)),
        other,
        "" if other_bundle is None else str(other_bundle),
    )
    page = make_page(service, shown)
    return lambda app: mount(app, page, MAX_FILE_BYTES)


def _run(
    listener: socket.socket,
    door: Gateway,
    services: Sequence[Service],
    told: str,
    page: Callable[[FastAPI], FastAPI] | None,
) -> None:
    """Serves until a signal; then requests in flight finish."""

    def finish() -> None:
        for service in services:
            service.drain(DRAIN_SECONDS)
            service.close()

    app = make_app(door, finish) if page is None else make_app(door, finish, page)
    server = make_server(app, door, DRAIN_SECONDS)
    stderr.print(told, markup=False)
    with _ended_by_signals():
        server.run(sockets=[listener])


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Lets the command end with code 0 after the server has drained: it raises the signal again that ended it."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _listen(host: str, port: int) -> socket.socket:
    """Takes the port before anything is loaded.

    Raises:
        InputError: it is taken, or the address is not this machine's.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise InputError(f"cannot listen on {host}:{port}: {error.strerror or one_line(error)}") from error
    # asyncio sends small answers at once only on sockets that name their protocol; others wait 40 ms for more.
    return socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, fileno=listener.detach())


def _shown(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _end_process(error: BaseException) -> None:
    """Ends this process after the errors have left, so that requests fail visibly instead of waiting for ever."""
    stderr.print(f"the service ends with code {BROKEN}: {one_line(error)}", style="red", markup=False)
    threading.Timer(LAST_WORDS_SECONDS, os._exit, (BROKEN,)).start()
