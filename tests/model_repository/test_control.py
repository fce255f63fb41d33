"""Who may control a server: nobody without its key, over HTTP and gRPC, on every server that we start."""

from __future__ import annotations

import base64
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path

import pytest
import tritonclient.grpc as grpc
import yaml
from tritonclient.utils import InferenceServerException

from model_repository.client import Client
from model_repository.control import CONTROL_HEADER, GRPC_CONTROL_HEADER, Control, read_key, write_key
from model_repository.server import TritonServer, free_port
from runtime.errors import InputError, ServiceError
from tests.model_repository.containers import container, make_certificate, tls_proxy
from tests.model_repository.test_service import wait_for

RunCommand = Callable[..., tuple[int, str, str]]
KEY_OF_ANOTHER = "0123456789abcdef" * 2


def load_of_posted_code(mark: Path) -> bytes:
    """The body of a request that loads a model of the sender's own, whose code makes a file."""
    code = f"open({str(mark)!r}, 'w').close()\n"
    tensors = {"input": [{"name": "a", "data_type": "TYPE_INT32", "dims": [1]}]}
    tensors["output"] = [dict(tensors["input"][0], name="b")]
    config = {"name": "posted", "backend": "python", "max_batch_size": 0, **tensors}
    content = base64.b64encode(code.encode()).decode()
    return json.dumps({"parameters": {"config": json.dumps(config), "file:1/model.py": content}}).encode()


def http(url: str, method: str, path: str, body: bytes = b"{}", headers: dict[str, str] | None = None) -> int:
    """The status of a request."""
    connection = HTTPConnection(url, timeout=30)
    connection.request(method, path, body, headers or {})
    status = connection.getresponse().status
    connection.close()
    return status


def load_over_http(url: str, mark: Path, headers: dict[str, str] | None = None) -> int:
    return http(url, "POST", "/v2/repository/models/posted/load", load_of_posted_code(mark), headers)


RESTRICTED_PATHS = (
    ("POST", "/v2/repository/index"),
    ("POST", "/v2/repository/models/latte_flow/load"),
    ("POST", "/v2/repository/models/latte_flow/unload"),
    ("POST", "/v2/repository/index?ready=true"),
    ("GET", "/v2/models/latte_flow/config"),
    ("GET", "/v2/models/latte_flow/stats"),
    ("GET", "/v2/logging"),
    ("GET", "/v2/trace/setting"),
    ("GET", "/v2/models/latte_flow/trace/setting"),
    ("GET", "/v2/systemsharedmemory/status"),
    ("GET", "/v2/cudasharedmemory/status"),
    ("POST", "/v2/systemsharedmemory/region/a/register"),
)


def test_posted_code_does_not_run(server: TritonServer, tmp_path: Path) -> None:
    """Before the key, this request ran its code in the server, as plain text and from a foreign page too."""
    foreign = {"Content-Type": "text/plain", "Origin": "http://elsewhere.example"}
    for headers in ({}, foreign, {CONTROL_HEADER: KEY_OF_ANOTHER}, {CONTROL_HEADER: ""}):
        assert load_over_http(server.http_url, tmp_path / "ran", headers) == 403
    files = {"file:1/model.py": f"open({str(tmp_path / 'ran')!r}, 'w').close()".encode()}
    client = grpc.InferenceServerClient(server.grpc_url)
    for headers in (None, {GRPC_CONTROL_HEADER: KEY_OF_ANOTHER}, {CONTROL_HEADER: read_key(server.control_key)}):
        with pytest.raises(InferenceServerException, match="restricted"):
            client.load_model("posted", headers, config='{"backend": "python"}', files=files)
    client.close()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("method", "path"), RESTRICTED_PATHS)
def test_control_over_http_asks_for_the_key(method: str, path: str, server: TritonServer) -> None:
    assert http(server.http_url, method, path) == 403
    assert http(server.http_url, method, path, headers={CONTROL_HEADER: KEY_OF_ANOTHER}) == 403


def test_control_over_grpc_asks_for_the_key(server: TritonServer) -> None:
    client = grpc.InferenceServerClient(server.grpc_url)
    calls: tuple[Callable[..., object], ...] = (
        client.get_model_repository_index,
        client.get_inference_statistics,
        client.get_trace_settings,
        client.get_log_settings,
        client.get_system_shared_memory_status,
        client.get_cuda_shared_memory_status,
        lambda headers=None: client.get_model_config("latte_flow", headers=headers),
        lambda headers=None: client.unload_model("latte_flow", headers=headers),
    )
    for call in calls:
        with pytest.raises(InferenceServerException, match="restricted"):
            call()
    config = client.get_model_config("latte_flow", headers={GRPC_CONTROL_HEADER: read_key(server.control_key)})
    assert "EXECUTION_ENV_PATH" in config.config.parameters  # a path of the server's machine, for its operator only
    # Requests, health and metadata stay open; metadata names no path.
    assert client.is_server_ready()
    assert client.is_model_ready("latte_flow")
    assert sys.prefix not in str(client.get_model_metadata("latte_flow"))
    client.close()


def test_only_its_owner_reads_a_key(server: TritonServer, tmp_path: Path) -> None:
    assert stat.S_IMODE(server.control_key.stat().st_mode) == 0o600
    assert stat.S_IMODE(server.control_key.parent.stat().st_mode) == 0o700
    assert len(write_key(tmp_path / "a")) == 64
    assert read_key(tmp_path / "a") != write_key(tmp_path / "b")
    with pytest.raises(InputError, match="File exists"):
        write_key(tmp_path / "a")


@pytest.mark.parametrize("content", ["", "short", "a key with spaces, which is long", "0123456789abcdef,k=v", None])
def test_a_file_without_a_key_is_one_clear_line(content: str | None, tmp_path: Path, run_command: RunCommand) -> None:
    file = tmp_path / "key"
    if content is not None:
        file.touch(0o600)
        file.write_text(content)
    with pytest.raises(InputError, match="control key"):
        read_key(file)
    code, _, error = run_command("control", "drain", "--key", file)
    assert code == 2
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("mode", [0o644, 0o666, 0o604, 0o602, 0o444])
def test_a_key_that_every_user_can_reach_is_refused(mode: int, tmp_path: Path, run_command: RunCommand) -> None:
    file = tmp_path / "key"
    write_key(file)
    file.chmod(mode)
    code, out, error = run_command("control", "drain", "--key", file, "--url", f"127.0.0.1:{free_port()}")
    assert (code, out) == (2, "")
    (line,) = error.strip().splitlines()
    assert f"(mode {mode:04o}); run: chmod 600 {file}" in line


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o440, 0o640])
def test_a_key_that_its_owner_or_a_pods_group_reads_is_taken(mode: int, tmp_path: Path) -> None:
    key = write_key(tmp_path / "key")
    (tmp_path / "key").chmod(mode)
    assert read_key(tmp_path / "key") == key


REMOTE = ("http://images.example.com", "images.example.com:8000", "http://192.0.2.1:8000", "127.0.0.1.example.com:80")


@pytest.mark.parametrize("url", [*REMOTE, "http://127.0.0.1@192.0.2.1:8000", "[2001:db8::1]:8000", "0.0.0.0:8000"])
def test_the_key_does_not_leave_the_machine_in_the_clear(url: str, tmp_path: Path, run_command: RunCommand) -> None:
    write_key(tmp_path / "key")
    for command in ("reload", "drain"):
        code, out, error = run_command("control", command, "--key", tmp_path / "key", "--url", url)
        assert (code, out) == (2, "")
        (line,) = error.strip().splitlines()
        assert "over TLS only" in line or "expected an address" in line


@pytest.mark.parametrize("url", ["ftp://localhost", "http://", "localhost:port", "http://localhost:1/a", "[::1:80", ""])
def test_an_address_that_is_none_is_one_clear_line(url: str, tmp_path: Path, run_command: RunCommand) -> None:
    write_key(tmp_path / "key")
    code, _, error = run_command("control", "drain", "--key", tmp_path / "key", "--url", url)
    assert code == 2
    assert error.startswith("error: expected an address HOST:PORT or https://HOST:PORT")


def test_a_server_behind_tls_is_controlled(server: TritonServer, tmp_path: Path, run_command: RunCommand) -> None:
    certificate, private = make_certificate(tmp_path)
    with tls_proxy(server.http_url, certificate, private) as url:

        def reload(url: str, *options: object) -> tuple[int, str, str]:
            return run_command("control", "reload", "--key", server.control_key, "--url", url, *options)

        assert reload(f"https://{url}", "--ca", certificate)[0] == 0
        assert reload(url, "--ca", certificate) == (0, f"{url} has loaded the model\n", "")
        for distrustful in ((f"https://{url}",), (url, "--tls")):
            code, _, error = reload(*distrustful)
            assert code == 1
            assert "CERTIFICATE_VERIFY_FAILED" in error
        code, _, error = reload(f"https://{url}", "--ca", tmp_path / "none.pem")
        assert code == 2
        assert "cannot read the certificates" in error


def test_a_wrong_key_and_a_server_that_is_not_there_are_one_clear_line(
    server: TritonServer, tmp_path: Path, run_command: RunCommand
) -> None:
    write_key(tmp_path / "key")
    for url, message in ((server.http_url, "refuses the control key"), (f"127.0.0.1:{free_port()}", "does not answer")):
        code, out, error = run_command("control", "reload", "--key", tmp_path / "key", "--url", url)
        assert (code, out) == (1, "")
        assert message in error
    with pytest.raises(ServiceError, match="failed to load"):
        server.control.load("nothing")


def test_the_model_is_loaded_again_with_the_key(server: TritonServer, run_command: RunCommand) -> None:
    code, out, error = run_command("control", "reload", "--key", server.control_key, "--url", server.http_url)
    assert (code, error) == (0, "")
    assert out == f"{server.http_url} has loaded the model\n"
    assert not server.control.is_unloaded()
    assert Client(server.grpc_url).is_alive()


def test_the_container_has_its_control_behind_the_key(repository: Path, server: TritonServer, tmp_path: Path) -> None:
    key = write_key(tmp_path / "key")
    with container(repository, server, tmp_path) as (url, grpc_url):
        assert load_over_http(url, tmp_path / "ran") == 403
        assert not (tmp_path / "ran").exists()
        # With the key it runs: what is refused above is a request that works.
        assert load_over_http(url, tmp_path / "ran", {CONTROL_HEADER: key}) == 400  # the code defines no model
        assert (tmp_path / "ran").exists()
        stream = Client(grpc_url).stream(prompt="a", num_inference_steps=100, num_images=4, progress=True)
        next(stream)
        assert not Control(url, key).drain(0.01)
        assert [response.event for response in stream][-1] == "done"
        assert Control(url, key).drain()


def test_the_container_does_not_start_without_a_key(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "model_repository.container"]
    environment = os.environ | {"LATTE_FLOW_CONTROL_KEY": str(tmp_path / "none")}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert finished.returncode == 1
    (line,) = finished.stderr.splitlines()
    assert "cannot read the control key" in line


def test_the_commands_of_the_manifest_work(repository: Path, server: TritonServer, tmp_path: Path) -> None:
    """The probe and the end of a pod, as Kubernetes runs them in its container, but for addresses and paths."""
    deployment = yaml.safe_load_all(
        (Path(__file__).parents[2] / "deploy/kubernetes/service.yaml").read_text(encoding="utf-8")
    )
    (pod,) = next(deployment)["spec"]["template"]["spec"]["containers"]
    ready, alive, end = (
        hook["exec"]["command"] for hook in (pod["readinessProbe"], pod["livenessProbe"], pod["lifecycle"]["preStop"])
    )
    write_key(tmp_path / "key")

    def succeeds(command: list[str]) -> bool:
        return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0

    with container(repository, server, tmp_path) as (url, grpc_url):
        heartbeat = [word.replace("localhost:8000", url) for word in ready]
        alive, end = (
            [sys.executable, "-m", "runtime.cli", *command[1:-1], f"--key={tmp_path / 'key'}", f"--url={url}"]
            for command in (alive, end)
        )
        assert succeeds(heartbeat)
        assert succeeds(alive)
        stream = Client(grpc_url).stream(prompt="a", num_inference_steps=200, num_images=16, progress=True)
        next(stream)
        with ThreadPoolExecutor(1) as pool:
            ended = pool.submit(succeeds, end)  # returns when the request in flight has finished, not before
            wait_for(lambda: not succeeds(heartbeat))
            assert succeeds(alive)
            assert [response.event for response in stream][-1] == "done"
            assert ended.result()
        assert not succeeds(heartbeat)
        assert succeeds(alive)
