"""`latte-flow serve` as it is operated: revived, drained, interrupted twice, given a new bundle."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from model_repository.client import Client
from model_repository.layout import write_repository
from model_repository.server import TritonServer
from model_repository.supervisor import Supervisor
from runtime.errors import InputError, ServiceError
from runtime.flow_time import SamplingDefaults
from runtime.manifest import load_manifest, save_manifest
from runtime.pipeline import LatteFlowPipeline
from runtime.serving.requests import Limits
from tests.model_repository.test_service import difference, interruptible, metrics, stubs_of, wait_for
from tests.tiny import scale_weight

RunCommand = Callable[..., tuple[int, str, str]]
MODEL_ENDED = "the process of the model latte_flow ended"
TRITON_ENDED = r"the Triton server ended with code -\d+"  # it aborts, now and then, when its model's process is killed
LONG = {"prompt": "a", "num_inference_steps": 200, "num_images": 4, "progress": True}
ENDLESS = {"prompt": "a", "num_inference_steps": 200, "num_images": 16, "progress": True}


@contextmanager
def served(
    bundle: Path, *options: str, prefix: Sequence[str] = ()
) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """A running `latte-flow serve` and the names and addresses that it printed."""
    command: list[str | Path] = [*prefix, sys.executable, "-m", "runtime.cli", "serve", bundle, *options]
    command += [word for name in ("http", "grpc", "metrics") for word in (f"--{name}-port", "0")]
    process = interruptible(command)
    assert process.stdout is not None
    try:
        lines = [process.stdout.readline().split() for _ in range(6)]
        assert [] not in lines, process.communicate()[1]
        yield process, {line[0]: line[1] for line in lines}
    finally:
        for _ in range(2):  # the second signal ends what still drains
            if process.poll() is None:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.communicate(timeout=15)
        process.kill()
        process.communicate()


def left_behind(process: subprocess.Popen[str], printed: dict[str, str]) -> list[str]:
    """What a service that ended has left."""
    files = [str(path) for path in Path("/dev/shm").glob(f"latte-flow-{process.pid}-*")]
    files += [printed[name] for name in ("models", "log", "key") if Path(printed[name]).exists()]
    servers = subprocess.run(["pgrep", "-f", printed["models"]], capture_output=True, text=True, check=False).stdout
    return files + servers.split()


def address_of_this_machine() -> str:
    """An address that others may reach, where there is one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            return "0.0.0.0"
        return str(probe.getsockname()[0])


def test_a_terminated_service_drains_and_leaves_nothing(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a token in the environment, `serve` did not reach its own server on an address of this machine.

    It also ended with its terminal, although `nohup` had it ignore that.
    """
    monkeypatch.setenv("LATTE_FLOW_TOKEN", "a secret")
    host = address_of_this_machine()
    options = ("--limit", "max_steps=200", "--limit", "max_images_per_request=4", "--host", host)
    options += ("--log-file", str(tmp_path / "serve.log"), "--control-key", str(tmp_path / "new.key"))
    with served(bundle, *options, prefix=["nohup"]) as (process, printed):
        process.send_signal(signal.SIGHUP)
        assert printed["log"] == str(tmp_path / "serve.log")
        with pytest.raises(InputError, match="num_images must be from 1 to 4"):
            Client(printed["grpc"], token="").generate("a", num_images=5)
        assert sorted(printed) == ["grpc", "http", "key", "log", "metrics", "models"]
        assert (Path(printed["models"]) / "latte_flow" / "config.pbtxt").is_file()
        assert "Started GRPCInferenceService" in Path(printed["log"]).read_text()
        assert Path(printed["key"]).stat().st_mode & 0o777 == 0o600
        stream = Client(printed["grpc"], token="").stream(**LONG)
        next(stream)
        process.send_signal(signal.SIGTERM)
        assert [response.event for response in stream][-1] == "done"
        assert process.wait(30) == 0
        assert process.stderr is not None
        told = " ".join(process.stderr.read().split())
        assert f"warning: whoever reaches {host} can send requests, unencrypted" in told
        assert "warning: LATTE_FLOW_TOKEN is set, but this server asks for no token and has no TLS" in told
    for name in ("serve.log", "new.key"):
        (tmp_path / name).unlink()  # they stay, since they were asked for
    assert left_behind(process, printed) == []


def test_an_address_that_the_server_cannot_listen_on_is_one_clear_line(bundle: Path, run_command: RunCommand) -> None:
    code, out, error = run_command("serve", bundle, "--host", "::1")
    assert (code, out) == (2, "")
    assert error.strip() == "error: the bundled Triton server listens on IPv4 only, got '::1'; use 127.0.0.1 or 0.0.0.0"


def test_a_distilled_service_is_alive_and_takes_its_own_guidance_scale(bundle_copy: Path) -> None:
    """It was asked for one step without guidance, which it cannot do; and 2.2 is another number in fp32."""
    sampling = SamplingDefaults(num_inference_steps=4, guidance_scale=2.2, guidance_distilled=True, allowed_steps=(4,))
    save_manifest(load_manifest(bundle_copy).model_copy(update={"sampling": sampling}), bundle_copy)
    with served(bundle_copy) as (_, printed):
        client = Client(printed["grpc"])
        assert client.is_alive()
        assert len(client.generate("a red star", guidance_scale=2.2)) == 1


def test_a_killed_model_is_revived_and_a_second_signal_cleans_up_at_once(bundle: Path) -> None:
    with served(bundle) as (process, printed):
        client = Client(printed["grpc"])
        drawn = client.generate("a red star", num_inference_steps=3)
        stream = client.stream(**ENDLESS)
        next(stream)
        (stub,) = subprocess.run(
            ["pgrep", "-f", f"stub {printed['models']}"], capture_output=True, text=True, check=True
        ).stdout.split()
        begin = time.monotonic()
        os.kill(int(stub), signal.SIGKILL)
        with pytest.raises(ServiceError):
            list(stream)
        assert time.monotonic() - begin < 5
        wait_for(lambda: client.is_alive(5), 30)
        assert client.generate("a red star", num_inference_steps=3)[0].tobytes() == drawn[0].tobytes()

        stream = client.stream(**ENDLESS)
        next(stream)
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        told = ""
        while "interrupt again to stop at once" not in told:
            told += process.stderr.readline()
            assert process.poll() is None, told
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 130
        with pytest.raises(ServiceError):
            list(stream)
        told += process.stderr.read()
        assert re.search(rf"({MODEL_ENDED}|{TRITON_ENDED}); starting the server again", told)
        assert "Traceback" not in told
    assert left_behind(process, printed) == []


def test_requests_of_a_server_that_stands_still_are_not_called_finished(repository: Path) -> None:
    """`serve` ended with 0 as if nothing was lost."""
    with TritonServer(repository) as server:
        os.killpg(server.process.pid, signal.SIGSTOP)
        assert not server.drain(1)


@pytest.mark.parametrize("option", ["--log-file", "--control-key"])
def test_a_file_that_cannot_be_written_is_one_clear_line(
    bundle: Path, tmp_path: Path, run_command: RunCommand, option: str
) -> None:
    code, out, error = run_command("serve", bundle, option, tmp_path / "missing" / "file")
    assert (code, out) == (2, "")
    (line,) = error.strip().splitlines()
    assert "cannot write the" in line
    assert line.endswith("No such file or directory; choose another file")


def test_a_server_that_dies_again_and_again_is_given_up(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model_repository.supervisor.MAX_RESTARTS", 1)
    told: list[str] = []
    with TritonServer(repository) as server:
        supervisor = Supervisor(server, told.append)
        supervisor._restarts = type(supervisor._restarts)(maxlen=2)
        assert supervisor.fault() is None
        (stub,) = server.stubs()
        os.kill(stub.pid, signal.SIGKILL)
        wait_for(lambda: not stub.lives)
        assert re.fullmatch(f"{MODEL_ENDED}|{TRITON_ENDED}", str(supervisor.fault()))
        supervisor._restart("a fault")
        assert supervisor.fault() is None
        with pytest.raises(ServiceError, match="a fault; given up after 1 restarts in 300 s"):
            supervisor._restart("a fault")
        # A model that was unloaded on purpose, or replaced, has not died.
        server.control.load()
        assert supervisor.fault() is None
        server.control.drain()
        wait_for(lambda: not stubs_of(server))
        assert supervisor.fault() is None
    assert told == ["a fault; starting the server again"]


def test_a_server_that_does_not_become_ready_leaves_nothing(bundle: Path, tmp_path: Path) -> None:
    """Its models' processes outlived it, and their shared memory and its folder stayed."""
    models = tmp_path / "models"
    write_repository(bundle, models, layout="per-engine", execution_environment=Path(sys.prefix))
    manifest = models / "latte_flow" / "1" / "bundle" / "manifest.json"
    manifest.unlink()
    manifest.write_bytes(b"{")
    server = TritonServer(models)
    with pytest.raises(ServiceError, match="ended with code"), server:
        pytest.fail("it is not ready")
    assert server.stubs() == set()
    assert server.regions() == []
    assert not server.log_file.exists()


def test_a_process_that_dies_while_it_is_replaced_loses_no_request_silently(repository: Path) -> None:
    """The new process answered in its place, so nobody noticed, and its clients waited until their own deadline."""
    told: list[str] = []
    with TritonServer(repository) as server:
        supervisor = Supervisor(server, told.append)
        client = Client(server.grpc_url)
        (old,) = server.stubs()
        stream = client.stream(**ENDLESS)
        next(stream)
        os.utime(repository / "latte_flow" / "1" / "model.py")
        server.control.load()
        assert len(server.stubs()) == 2
        os.kill(old.pid, signal.SIGKILL)
        with ThreadPoolExecutor(1) as pool:
            failed = pool.submit(list, stream)
            wait_for(supervisor.look)
            with pytest.raises(ServiceError):
                failed.result(10)
        assert client.is_alive()
        # One that ends in order while it is replaced is no fault.
        os.utime(repository / "latte_flow" / "1" / "model.py")
        server.control.load()
        wait_for(lambda: len(server.stubs()) == 1)
        for _ in range(6):
            assert not supervisor.look()
            time.sleep(0.5)
    (line,) = told
    lost = "a process of the model latte_flow ended with requests in flight while it was replaced"
    assert re.match(f"{lost}|{TRITON_ENDED}", line)


def test_a_new_repository_reaches_a_server_that_has_the_folder_mounted(
    bundle: Path, tmp_path: Path, run_command: RunCommand
) -> None:
    """A mount follows the folder, not its name; so does the path of an open folder, by which this server reads it."""
    models = tmp_path / "models"
    write_repository(bundle, models, execution_environment=Path(sys.prefix))
    mount = os.open(models, os.O_RDONLY)
    try:
        with TritonServer(Path(f"/proc/{os.getpid()}/fd/{mount}")) as server:
            client = Client(server.grpc_url)
            write_repository(
                bundle, models, limits=Limits(max_steps=7), execution_environment=Path(sys.prefix), force=True
            )
            stream = client.stream(**LONG)
            next(stream)
            code, _, error = run_command("control", "reload", "--key", server.control_key, "--url", server.http_url)
            assert code == 0, error
            with pytest.raises(InputError, match="num_inference_steps must be from 1 to 7"):
                client.generate("a", num_inference_steps=8)
            assert [response.event for response in stream][-1] == "done"
    finally:
        os.close(mount)
    assert [path.name for path in models.iterdir()] == ["latte_flow"]


def test_a_reload_replaces_the_engines_that_are_models_of_their_own(
    bundle: Path, bundle_copy: Path, pipe: LatteFlowPipeline, tmp_path: Path, run_command: RunCommand
) -> None:
    """Only the service was loaded again, and went on with the old engines without a word."""
    models = tmp_path / "models"
    environment = Path(sys.prefix)
    write_repository(bundle, models, layout="per-engine", execution_environment=environment)
    scale_weight(bundle_copy, "expert_1", "heads", 2.0)
    options = {"num_inference_steps": 100, "num_images": 4, "seed": 3}
    call = {"num_inference_steps": 100, "num_images_per_prompt": 4, "seed": 3, "output_type": "np"}
    before = pipe("a red star", **call).images
    with LatteFlowPipeline.from_pretrained(bundle_copy) as changed:
        after = changed("a red star", **call).images
    assert np.abs(before.astype(int) - after).max() > 20
    write_repository(bundle_copy, tmp_path / "new", layout="per-engine", execution_environment=environment)
    with TritonServer(models) as server, ThreadPoolExecutor(2) as pool:
        client = Client(server.grpc_url)
        reload = ("control", "reload", "--key", server.control_key, "--url", server.http_url)
        for model in (tmp_path / "new").iterdir():
            shutil.rmtree(models / model.name)
            model.rename(models / model.name)
        in_flight = pool.submit(Client(server.grpc_url, retries=0).generate, "a red star", **options)
        # Not any number: the image of the readiness check may still be reported.
        wait_for(lambda: metrics(server)["latte_flow_pending_images"] == options["num_images"])
        reloaded = pool.submit(server.control.reload)
        wait_for(lambda: not server.control.is_ready())
        assert difference(client.generate("a red star", **options), after) <= 1  # waited for the new engines
        assert difference(in_flight.result(60), before) <= 1  # finished with the old ones
        reloaded.result(60)

        # An engine that cannot be loaded is said; a second reload, of a whole repository, works.
        broken = models / "latte_flow_expert_0" / "1" / "model.onnx"
        whole = broken.read_bytes()
        broken.unlink()
        broken.write_bytes(whole[:100])
        code, out, error = run_command(*reload)
        assert (code, out) == (1, "")
        (line,) = error.strip().splitlines()
        assert "latte_flow_expert_0" in line
        broken.write_bytes(whole)
        assert run_command(*reload) == (0, f"{server.http_url} has loaded the model\n", "")
        assert difference(client.generate("a red star", **options), after) <= 1


def test_models_that_the_new_repository_lacks_are_gone(bundle: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    write_repository(bundle, models, layout="per-engine")
    (models / "notes.txt").write_text("mine")
    folder = models.stat().st_ino
    assert len(list(models.glob("*/config.pbtxt"))) > 5
    write_repository(bundle, models, force=True)
    assert models.stat().st_ino == folder
    assert sorted(path.name for path in models.iterdir()) == ["latte_flow", "notes.txt"]
