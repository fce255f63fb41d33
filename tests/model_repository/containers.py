"""The container's start, with the bundled server in the place of NVIDIA's, and a proxy in front of it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from model_repository.client import Client
from model_repository.schema import DRAIN_SECONDS
from model_repository.server import TritonServer, free_port


def listens(port: int) -> bool:
    """Whether anybody takes connections there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def container(
    repository: Path, server: TritonServer, folder: Path, options: Sequence[str] = (), **connection: Any
) -> Iterator[tuple[str, str]]:
    """A running container; yields its HTTP and gRPC addresses.

    Args:
        server: any server of ours, which has prepared the bundled one.
        folder: has the control key, in "key".
        options: further options of `tritonserver`.
        connection: of the client that waits until the model draws.
    """
    executable, ports = Path(server._command[0]), (free_port(), free_port())
    own = [option for option in server._command if option.startswith("--backend-directory")]
    own += [f"--{name}-address=127.0.0.1" for name in ("http", "grpc", "metrics")]
    own += [f"--http-port={ports[0]}", f"--grpc-port={ports[1]}", f"--metrics-port={free_port()}"]
    variables = {"LATTE_FLOW_CONTROL_KEY": str(folder / "key"), "LATTE_FLOW_MODELS": str(repository)}
    process = subprocess.Popen(
        [sys.executable, "-m", "model_repository.container", *own, *options],
        env=server._environment | variables | {"PATH": f"{executable.parent}:{os.environ['PATH']}"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        client = Client(f"127.0.0.1:{ports[1]}", retries=0, **connection)
        give_up = time.monotonic() + 60
        while not client.is_alive(5):
            assert process.poll() is None
            assert time.monotonic() < give_up
            time.sleep(0.1)
        while not listens(ports[0]):  # HTTP begins after gRPC
            assert time.monotonic() < give_up
            time.sleep(0.1)
        yield f"127.0.0.1:{ports[0]}", client.url
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(DRAIN_SECONDS + 30)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate of this machine that nobody vouches for, and its private key."""
    certificate, private = folder / "server.crt", folder / "server.key"
    subject = ("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")
    make = ("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", *subject)
    subprocess.run([*make, "-keyout", private, "-out", certificate], check=True, capture_output=True)
    return certificate, private


@contextmanager
def tls_proxy(target: str, certificate: Path, private: Path) -> Iterator[str]:
    """A proxy that speaks TLS and passes requests on to a server's HTTP address; yields its own."""

    class Forward(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            connection = HTTPConnection(target, timeout=60)
            connection.request("POST", self.path, body, dict(self.headers))
            response = connection.getresponse()
            content = response.read()
            connection.close()
            self.send_response(response.status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, private)
    with ThreadingHTTPServer(("127.0.0.1", 0), Forward) as proxy:
        proxy.socket = context.wrap_socket(proxy.socket, server_side=True)
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{proxy.server_port}"
        proxy.shutdown()
