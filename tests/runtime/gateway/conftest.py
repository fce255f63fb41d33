"""A gateway on a real port, over the tiny bundle."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

from runtime.gateway.app import Gateway, GatewaySettings, make_app
from runtime.gateway.server import GatewayServer, make_server
from runtime.pipeline import LatteFlowPipeline
from runtime.serving.requests import Limits
from runtime.serving.service import LocalService


@dataclass(frozen=True)
class Running:
    """A gateway that runs in a thread."""

    url: str
    gateway: Gateway
    service: LocalService
    server: GatewayServer

    def client(self, key: str = "none", **options: object) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, **options)  # type: ignore[arg-type]


Start = Callable[..., "Running"]


@contextmanager
def running(bundle: Path, settings: GatewaySettings | None = None, limits: Limits | None = None) -> Iterator[Running]:
    service = LocalService(LatteFlowPipeline.from_pretrained(bundle), limits)
    gateway = Gateway(service, settings)
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener, service:
        server = make_server(make_app(gateway), gateway, 10)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        port = listener.getsockname()[1]
        try:
            yield Running(f"http://127.0.0.1:{port}", gateway, service, server)
        finally:
            server.should_exit = True
            thread.join(20)


@pytest.fixture(scope="module")
def door(bundle: Path) -> Iterator[Running]:
    """A gateway that everybody may use."""
    with running(bundle, GatewaySettings(result_cache_bytes=1 << 20)) as started:
        yield started
