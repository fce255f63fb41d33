"""A gateway on a real port, over the tiny bundle."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

from runtime.gateway.app import Gateway, GatewaySettings, make_app
from runtime.gateway.server import GatewayServer, make_server
from runtime.pipeline import LatteFlowPipeline
from runtime.serving.requests import Limits
from runtime.serving.service import LocalService, Service


@dataclass(frozen=True)
class Running:
    """A gateway that runs in a thread."""

    url: str
    gateway: Gateway
    server: GatewayServer
    clients: ExitStack

    def client(self, key: str = "none") -> openai.OpenAI:
        """A client that is closed with the gateway."""
        return self.clients.enter_context(openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0))


@contextmanager
def running(service: Service, settings: GatewaySettings | None = None) -> Iterator[Running]:
    gateway = Gateway(service, settings)
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener, ExitStack() as clients:
        server = make_server(make_app(gateway), gateway, 10)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        port = listener.getsockname()[1]
        try:
            yield Running(f"http://127.0.0.1:{port}", gateway, server, clients)
        finally:
            clients.close()
            server.should_exit = True
            thread.join(20)


@contextmanager
def gateway_process(*arguments: object) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Runs `latte-flow gateway` on a free port; yields its URL, and the process, which may have ended."""
    command = [sys.executable, "-m", "runtime.cli", "gateway", *arguments, "--port", "0"]
    with subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            said = process.stderr.readline()
            found = re.match(r"(http://127\.0\.0\.1:\d+)/v1 serves latte-flow", said)
            assert found, said
            yield found[1], process
        finally:
            process.terminate()


def local(bundle: Path, limits: Limits | None = None) -> LocalService:
    return LocalService(LatteFlowPipeline.from_pretrained(bundle), limits)


@pytest.fixture(scope="module")
def service(bundle: Path) -> Iterator[LocalService]:
    with local(bundle) as opened:
        yield opened


@pytest.fixture(scope="module")
def door(service: LocalService) -> Iterator[Running]:
    """A gateway that everybody may use."""
    with running(service, GatewaySettings(result_cache_bytes=1 << 20)) as started:
        yield started
