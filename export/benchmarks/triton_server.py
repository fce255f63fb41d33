"""A Triton server for benchmarks, and the service's own figures."""

from __future__ import annotations

import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from model_repository.layout import write_repository
from model_repository.server import TritonServer
from runtime.errors import ServiceError
from runtime.serving.requests import Limits

PREFIX = "latte_flow_"
SETTLED_SECONDS = 30.0


@contextmanager
def triton_server(bundle: Path, limits: Limits) -> Iterator[TritonServer]:
    """Serves a bundle with the bundled server while the block runs; the server is ready."""
    with tempfile.TemporaryDirectory(prefix="latte-flow-models-") as folder:
        models = Path(folder) / "models"
        write_repository(bundle, models, limits=limits, execution_environment=Path(sys.prefix))
        with TritonServer(models) as server:
            yield server


def figures(server: TritonServer) -> dict[str, float]:
    """Returns the service's metrics by name and labels, without the prefix `latte_flow_`.

    Raises:
        ServiceError: the server does not answer.
    """
    try:
        text = urllib.request.urlopen(server.metrics_url, timeout=10).read().decode()
    except OSError as error:
        raise ServiceError(f"{server.metrics_url} does not answer: {error}") from error
    lines = [line.rpartition(" ") for line in text.splitlines() if line.startswith(PREFIX)]
    return {name.removeprefix(PREFIX): float(value) for name, _, value in lines}


def settled_figures(server: TritonServer) -> dict[str, float]:
    """Returns the service's metrics once it has nothing to do; they are written late, and one by one.

    Raises:
        ServiceError: some request stays open.
    """
    began, give_up = time.time(), time.monotonic() + SETTLED_SECONDS
    written: set[float] = set()
    while len(written) < 2:
        now = figures(server)
        moment = now["heartbeat_timestamp_seconds"]
        if now["open_requests"] or now["pending_images"] or now["pending_questions"]:
            written.clear()
        elif moment > began:
            written.add(moment)
        if time.monotonic() > give_up:
            raise ServiceError(
                f"after {SETTLED_SECONDS:g} s without clients the service has {now['open_requests']:g} open requests"
            )
        time.sleep(0.05)
    return now
