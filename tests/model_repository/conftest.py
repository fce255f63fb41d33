"""A real Triton server with the tiny bundle."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from model_repository.layout import write_repository
from model_repository.server import TritonServer
from runtime.serving.requests import Limits

LIMITS = Limits(max_queued_images=64, max_images_per_client=64)


@pytest.fixture(scope="session")
def repository(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle as a model repository."""
    out = tmp_path_factory.mktemp("models") / "models"
    write_repository(bundle, out, limits=LIMITS, execution_environment=Path(sys.prefix))
    return out


@pytest.fixture(scope="session")
def server(repository: Path) -> Iterator[TritonServer]:
    """A server for tests that leave it as they found it."""
    with TritonServer(repository) as running:
        yield running
    for _ in range(50):  # what was killed is gone once its parent has looked
        try:
            os.killpg(running.process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("a process of the server outlived it")
