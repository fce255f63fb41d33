"""A gateway for benchmarks, in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import ServiceError

START_SECONDS = 300.0
END_SECONDS = 60.0


@dataclass(frozen=True)
class GatewayProcess:
    """A gateway that is ready."""

    pid: int
    host: str
    port: int

    def metric(self, name: str) -> float:
        """Returns one of its metrics, which has no labels."""
        with urllib.request.urlopen(f"http://{self.host}:{self.port}/metrics", timeout=60) as answer:
            found = re.search(rf"^{name} (\S+)$", answer.read().decode(), re.MULTILINE)
        if found is None:
            raise ServiceError(f"the gateway has no metric {name}")
        return float(found[1])


@contextmanager
def gateway_process(bundle: Path, **limits: int) -> Iterator[GatewayProcess]:
    """Serves a bundle by `latte-flow gateway` on a free port while the block runs.

    Raises:
        ServiceError: it does not start.
    """
    command = [sys.executable, "-m", "runtime.cli", "gateway", str(bundle), "--port", "0"]
    for name, value in limits.items():
        command += ["--limit", f"{name}={value}"]
    with tempfile.TemporaryFile() as log, subprocess.Popen(command, stderr=log) as process:
        try:
            host, port = _address(process, log.fileno())
            yield GatewayProcess(process.pid, host, port)
        finally:
            process.terminate()
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def _address(process: subprocess.Popen[bytes], log: int) -> tuple[str, int]:
    """Waits until the process says where it listens."""
    give_up = time.monotonic() + START_SECONDS
    while time.monotonic() < give_up:
        said = os.pread(log, 1 << 16, 0).decode(errors="replace")
        if found := re.search(r"http://([\d.]+):(\d+)/v1 serves", said):
            return found[1], int(found[2])
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise ServiceError(f"the gateway did not start: {said.strip() or 'it said nothing'}")
