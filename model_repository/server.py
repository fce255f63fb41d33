"""The Triton server in the `nvidia-pytriton` wheel, for one machine and for tests.

It listens on the loopback interface only. Production uses NVIDIA's container; see docs/serving.md.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from model_repository.client import Client
from model_repository.control import Control, read_key, server_options, write_key
from model_repository.schema import DRAIN_SECONDS
from runtime.errors import InputError, MissingExtraError, ServiceError

LOOPBACK = "127.0.0.1"
START_SECONDS = 120.0
PROBE_SECONDS = 5.0
EXIT_SECONDS = 10.0
"""How long a server without requests may take to end."""
SHARED_MEMORY = Path("/dev/shm")
STUB = b"triton_python_backend_stub"


@dataclass(frozen=True)
class Stub:
    """The process of a Python model."""

    pid: int
    model: str
    region: Path
    """Its shared memory. The server removes it with the process, unless that died with requests in flight."""

    @property
    def lives(self) -> bool:
        try:  # empty for one that ended and is not collected yet
            return bool(Path(f"/proc/{self.pid}/cmdline").read_bytes())
        except OSError:
            return False


class TritonServer:
    """A running `tritonserver` with one model repository. Its control protocols ask for a key.

    Example:
        >>> with TritonServer(Path("repository")) as server:
        ...     print(server.grpc_url)
    """

    def __init__(
        self,
        repository: Path,
        http_port: int = 0,
        grpc_port: int = 0,
        metrics_port: int = 0,
        *,
        host: str = LOOPBACK,
        log_file: Path | None = None,
        control_key: Path | None = None,
    ) -> None:
        """Starts the server; `wait_until_ready` waits for it.

        Args:
            http_port, grpc_port, metrics_port: 0 takes a free one.
            host: address to listen on.
            log_file: the server's log; None for a temporary one.
            control_key: file with the control key, or for a new one if there is none; None for a temporary file.

        Raises:
            InputError: the key or the log file cannot be used, `host` is no address, or the server does not fit this
                environment.
            MissingExtraError: the bundled server is not installed.
        """
        if ":" in host:
            raise InputError(f"the bundled Triton server listens on IPv4 only, got {host!r}; use 127.0.0.1 or 0.0.0.0")
        self.repository = repository
        self._reachable = LOOPBACK if host == "0.0.0.0" else host
        asked = (http_port, grpc_port, metrics_port)
        self._ports = [port or free for port, free in zip(asked, free_ports(len(asked)), strict=True)]
        self._folder = tempfile.TemporaryDirectory(prefix="latte-flow-triton-")
        folder = Path(self._folder.name)
        self.log_file = folder / "log.txt" if log_file is None else log_file
        self._shared_memory = f"latte-flow-{os.getpid()}-{uuid.uuid4().hex[:8]}-"
        ports = dict(zip(("http", "grpc", "metrics"), self._ports, strict=True))
        try:
            executable, libraries = _prepare(folder)
            self.control_key = folder / "control.key" if control_key is None else control_key
            key = read_key(self.control_key) if self.control_key.exists() else write_key(self.control_key)
            self.control = Control(self.http_url, key, own=True)
            self._command = [
                str(executable),
                *server_options(repository.absolute(), key),
                f"--backend-directory={folder / 'backends'}",
                f"--backend-config=python,shm-region-prefix-name={self._shared_memory}",
                *(f"--{name}-address={host}" for name in ports),
                *(f"--{name}-port={port}" for name, port in ports.items()),
            ]
            self._environment = os.environ | {"LD_LIBRARY_PATH": str(libraries)}
            self.process = self._start()
        except BaseException:
            self._folder.cleanup()
            raise

    def _start(self) -> subprocess.Popen[bytes]:
        try:
            log = self.log_file.open("ab")
        except OSError as error:
            raise InputError(f"cannot write the log {self.log_file}: {error.strerror}; choose another file") from error
        with log:
            return subprocess.Popen(
                self._command, stdout=log, stderr=subprocess.STDOUT, env=self._environment, start_new_session=True
            )

    @property
    def http_url(self) -> str:
        return f"{self._reachable}:{self._ports[0]}"

    @property
    def grpc_url(self) -> str:
        return f"{self._reachable}:{self._ports[1]}"

    @property
    def metrics_url(self) -> str:
        return f"http://{self._reachable}:{self._ports[2]}/metrics"

    def wait_until_ready(self) -> None:
        """Waits until the model has drawn an image.

        Raises:
            ServiceError: the server ended or did not answer in time; the message has its last lines.
        """
        give_up = time.monotonic() + START_SECONDS
        while time.monotonic() < give_up:
            if self.process.poll() is not None:
                raise ServiceError(f"the Triton server ended with code {self.process.returncode}: {self._last_lines()}")
            # Triton opens its HTTP port last, and dies now and then of a stream that comes before.
            if self.control.is_ready() and Client(self.grpc_url, retries=0, token="", own=True).is_alive(PROBE_SECONDS):
                return
            time.sleep(0.1)
        raise ServiceError(f"the Triton server did not answer within {START_SECONDS:g} s: {self._last_lines()}")

    def stubs(self) -> set[Stub]:
        """Returns the processes of Python models that live; it takes some milliseconds."""
        found = set()
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, IndexError):  # a process may begin or end while it is looked at
                command = (entry / "cmdline").read_bytes().split(b"\0")
                if command[0].endswith(STUB) and os.getpgid(int(entry.name)) == self.process.pid:
                    model, region = Path(command[1].decode()).parents[1].name, SHARED_MEMORY / command[2].decode()
                    found.add(Stub(int(entry.name), model, region))
        return found

    def restart(self) -> None:
        """Ends the server at once, so that requests in flight fail, and starts it again on the same ports.

        A model whose process died needs this: Triton never answers that process's requests, and waits for them before
        it unloads or ends.
        """
        self._kill()
        self.process = self._start()

    def drain(self, seconds: float = DRAIN_SECONDS) -> bool:
        """Refuses new requests, lets those in flight finish, and ends the server; returns whether they finished."""
        finished = True
        if self.process.poll() is None:
            try:
                finished = self.control.drain(seconds)
            except ServiceError:  # a server that does not answer cannot be drained
                finished = False
        self.close(EXIT_SECONDS if finished else 0)
        return finished

    def close(self, seconds: float = DRAIN_SECONDS) -> None:
        """Ends the server and its stubs, and removes its temporary files.

        Args:
            seconds: how long requests in flight may take; 0 ends the server at once.
        """
        if seconds and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=seconds)
        self._kill()
        self._folder.cleanup()

    def _kill(self) -> None:
        # The server may not end in time, and a stub can outlive its server.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        # Only its parent can wait for a stub, which takes a moment to end after its signal.
        give_up = time.monotonic() + EXIT_SECONDS
        while self.stubs() and time.monotonic() < give_up:
            time.sleep(0.01)
        # A stub that was killed leaves its region behind.
        for region in self.regions():
            region.unlink(missing_ok=True)

    def regions(self) -> list[Path]:
        """Returns this server's regions of shared memory."""
        return list(SHARED_MEMORY.glob(f"{self._shared_memory}*"))

    def _last_lines(self) -> str:
        lines = self.log_file.read_text(encoding="utf-8", errors="replace").splitlines()
        telling = [line for line in lines if line.startswith("E") or "rror" in line] or lines
        return " | ".join(telling[-2:])

    def __enter__(self) -> Self:
        try:
            self.wait_until_ready()
        except BaseException:
            self.close(0)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def free_port() -> int:
    """Returns a port that is not in use."""
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """Returns different ports that are not in use."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((LOOPBACK, 0))
        return [probe.getsockname()[1] for probe in probes]


def _prepare(folder: Path) -> tuple[Path, Path]:
    """Makes a backend folder with the stub of this Python; returns the server and its libraries' folder."""
    spec = find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise MissingExtraError('the bundled Triton server is not installed; run: pip install "latte-flow[triton]"')
    if int(np.__version__.partition(".")[0]) >= 2:
        raise InputError(
            f"the bundled Triton server returns wrong tensors with numpy {np.__version__}; run: pip install 'numpy<2'"
        )
    site = Path(spec.origin).parents[1]
    server = site / "pytriton" / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        raise InputError(f"the bundled Triton server has no stub for Python {version}; use 3.8 to 3.13")
    backend = folder / "backends" / "python"
    backend.mkdir(parents=True)
    for file in ("libtriton_python.so", "triton_python_backend_utils.py"):
        os.symlink(server / "backends" / "python" / file, backend / file)
    shutil.copy2(stub, backend / stub.name)
    return server / "bin" / "tritonserver", site / "nvidia_pytriton.libs"
