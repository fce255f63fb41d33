"""The client against servers that die, stop, hide behind TLS, or want a token."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from tritonclient.utils import InferenceServerException

from model_repository.client import Client
from model_repository.connection import Connection
from model_repository.control import write_key
from model_repository.server import TritonServer, free_port
from model_repository.supervisor import Supervisor
from runtime.errors import DRAINING, TRY_AGAIN, DrainingError, InputError, QueueFullError, ServiceError
from tests.model_repository.containers import container, make_certificate
from tests.model_repository.test_service import stubs_of

RunCommand = Callable[..., tuple[int, str, str]]
ENDLESS = {"prompt": "a", "num_inference_steps": 200, "num_images": 16, "progress": True}


@pytest.fixture
def own_server(repository: Path) -> Iterator[TritonServer]:
    """A server to kill."""
    server = TritonServer(repository)
    try:
        server.wait_until_ready()
        yield server
    finally:
        os.killpg(server.process.pid, signal.SIGKILL)
        server.close()


def test_a_dead_model_is_noticed_by_who_waits_for_it(own_server: TritonServer) -> None:
    """A stub that was killed never answers its requests; a client once waited for ever."""
    client = Client(own_server.grpc_url, retries=0)
    stream = client.stream(**ENDLESS)
    next(stream)
    (stub,) = stubs_of(own_server)
    os.kill(stub, signal.SIGKILL)
    begin = time.monotonic()
    with pytest.raises(ServiceError):  # "does not answer any more", or the server dies with its stub
        list(stream)
    assert time.monotonic() - begin < 20
    assert not client.is_alive(2)


def test_every_wait_for_a_server_that_stands_still_ends(own_server: TritonServer) -> None:
    client = Client(own_server.grpc_url, retries=0)
    assert client.is_alive()
    os.killpg(own_server.process.pid, signal.SIGSTOP)
    for seconds in (0.5, 2.0):
        begin = time.monotonic()
        assert not client.is_alive(seconds)
        assert time.monotonic() - begin < seconds + 0.5
    begin = time.monotonic()
    with pytest.raises(ServiceError, match="in time"):
        Client(own_server.grpc_url, timeout=1.5).generate("a")
    assert time.monotonic() - begin < 2.5
    os.killpg(own_server.process.pid, signal.SIGCONT)
    assert client.is_alive(20)


def test_requests_wait_while_the_model_is_away(own_server: TritonServer) -> None:
    """Between unload and load the server knows no such model; a new request is sent again, not failed."""
    client = Client(own_server.grpc_url)
    assert own_server.control.drain()
    with pytest.raises(ServiceError, match="no available versions"):
        Client(own_server.grpc_url, retries=0).generate("a")
    with ThreadPoolExecutor(4) as pool:
        drawn = [pool.submit(client.generate, "a", num_inference_steps=2) for _ in range(4)]
        time.sleep(0.5)
        own_server.control.load()
        assert all(len(images.result()) == 1 for images in drawn)


def test_an_address_without_a_server_is_one_clear_line_at_once(tmp_path: Path, run_command: RunCommand) -> None:
    begin = time.monotonic()
    url = f"127.0.0.1:{free_port()}"
    code, _, error = run_command("client", "generate", "a", "--url", url, "-o", tmp_path)
    assert code == 1
    assert "failed to connect" in error
    assert len(error.strip().splitlines()) == 1
    assert time.monotonic() - begin < 3


def test_tls_with_an_authority_of_ones_own(
    repository: Path, server: TritonServer, tmp_path: Path, run_command: RunCommand
) -> None:
    certificate, private = make_certificate(tmp_path)
    write_key(tmp_path / "key")
    options = ("--grpc-use-ssl=true", f"--grpc-server-cert={certificate}", f"--grpc-server-key={private}")
    with container(repository, server, tmp_path, options, ca=certificate) as (_, url):
        assert run_command("client", "health", "--url", url, "--ca", certificate)[0] == 0
        images = Client(url, ca=certificate, token="a secret").generate("a", num_inference_steps=2)
        assert len(images) == 1
        for distrustful in (Client(url, retries=0, tls=True), Client(url, retries=0)):
            assert not distrustful.is_alive(2)


class Gate(grpc.GenericRpcHandler):
    """A proxy that wants a token, and remembers what came."""

    def __init__(self) -> None:
        self.seen: list[dict[str, str]] = []

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        self.seen.append(dict(handler_call_details.invocation_metadata))

        def refuse(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token is not valid")
            yield b""

        return grpc.stream_stream_rpc_method_handler(refuse)


@pytest.fixture
def gate() -> Iterator[tuple[Gate, str]]:
    """The proxy and its address."""
    handler = Gate()
    proxy = grpc.server(ThreadPoolExecutor(2), handlers=[handler])
    port = proxy.add_insecure_port("127.0.0.1:0")
    proxy.start()
    yield handler, f"127.0.0.1:{port}"
    proxy.stop(None).wait(5)


def test_headers_and_a_token_are_sent_and_a_refusal_is_said(
    gate: tuple[Gate, str], run_command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler, url = gate
    with pytest.raises(ServiceError, match="UNAUTHENTICATED: the token is not valid"):
        Client(url, headers={"X-Team": "red"}, token="secret").generate("a")
    assert (handler.seen[0]["x-team"], handler.seen[0]["authorization"]) == ("red", "Bearer secret")
    monkeypatch.setenv("LATTE_FLOW_TOKEN", "from-the-environment")
    code, _, error = run_command("client", "ask", "why?", "--url", url, "--header", "x-team=blue")
    assert code == 1
    assert "the token is not valid" in error
    assert "from-the-environment" not in error
    assert handler.seen[1]["x-team"] == "blue"
    assert handler.seen[1]["authorization"] == "Bearer from-the-environment"


def test_a_token_does_not_leave_the_machine_in_the_clear() -> None:
    for host in ("images.example.com", "localhost.example.com", "127.example.com", "192.0.2.1", "[2001:db8::1]"):
        with pytest.raises(InputError, match="over TLS only"):
            Client(f"{host}:8001", token="secret")
    for host in ("localhost", "127.0.0.2", "[::1]"):
        Client(f"{host}:8001", token="secret")
    assert Client("images.example.com:443", token="secret", tls=True).url == "images.example.com:443"
    assert "secret" not in repr(Client("localhost:8001", token="secret")._connection)


@pytest.mark.parametrize("name", ["a b", "", "x\ny", "ä"])
def test_a_header_that_cannot_be_sent_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="a header must have"):
        Client("localhost:8001", headers={name: "a"})
    with pytest.raises(InputError, match="a header must have"):
        Client("localhost:8001", headers={"a": "line\nbreak"})


def test_certificates_that_are_not_there_are_one_clear_line(tmp_path: Path, run_command: RunCommand) -> None:
    (tmp_path / "empty.pem").touch()
    for name in ("none.pem", "empty.pem"):
        code, _, error = run_command("client", "ask", "why?", "--ca", tmp_path / name)
        assert code == 2
        assert "cannot read the certificates" in error
        assert len(error.strip().splitlines()) == 1


def test_a_proxy_does_not_stand_before_this_machine(server: TritonServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """gRPC obeys `http_proxy` for loopback addresses too: a token went to the proxy, and `serve` was never ready."""
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert Client(server.grpc_url, retries=0, token="a secret").is_alive()
    assert Connection("192.0.2.1:1")._may_use_proxy
    assert not Connection("192.0.2.1:1", own=True)._may_use_proxy


@pytest.mark.parametrize("message", [f"{DRAINING} and takes no new requests", f"the queue is full; {TRY_AGAIN} 1 s"])
def test_only_a_request_that_has_not_begun_is_sent_again(message: str) -> None:
    """A stream that a drain cut off was sent again, and its reader got the first pieces twice."""
    client = Client("127.0.0.1:9")
    error = InferenceServerException(f"UNAVAILABLE: {message}")
    assert isinstance(client._as_error(error, begun=False), (DrainingError, QueueFullError))
    assert type(client._as_error(error, begun=True)) is ServiceError


def test_a_drain_does_not_lose_a_request_from_which_nothing_is_heard(
    own_server: TritonServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client once took the refusal of its own question, whether the model lives, for a loss."""
    monkeypatch.setattr("model_repository.client.QUIET_SECONDS", 0.1)
    client = Client(own_server.grpc_url, retries=0)
    supervisor = Supervisor(own_server, print)
    with ThreadPoolExecutor(1) as pool:
        images = pool.submit(client.generate, "a", num_inference_steps=200, num_images=16)
        time.sleep(0.3)
        assert not images.done()
        assert own_server.control.drain()
        assert len(images.result(30)) == 16
    supervisor._pinged = 0.0
    assert supervisor.fault() is None  # who drained a server did not want it started again
