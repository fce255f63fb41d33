"""Fixtures that cost seconds are made once for all tests, those in other processes of the session included."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from export.bundle import export_bundle
from export.reference import Reference
from latte.checkpoint import load_checkpoint, load_image_processor
from latte.model import LatteFlow
from runtime.pipeline import LatteFlowPipeline
from tests.doubles import GpuDouble, install
from tests.doubles.cuda import CudaDouble
from tests.plan_files import add_plans
from tests.tiny import save_tiny


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder of all processes of the session."""
    own = tmp_path_factory.getbasetemp()
    folder = (own if worker_id == "master" else own.parent) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


def made_once(path: Path, make: Callable[[Path], object]) -> Path:
    """What one process of the session makes at a path, which appears there complete or not at all."""
    path.parent.mkdir(exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            make(path)
    return path


@pytest.fixture(scope="session", autouse=True)
def graph_cache(shared: Path) -> Iterator[None]:
    """Traced graphs are shared by all tests of a session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATTE_FLOW_CACHE", str(shared / "cache"))
        yield


@pytest.fixture(scope="session", autouse=True)
def no_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test asks a hub, and copies that `datasets` makes do not land in the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="session")
def checkpoint(shared: Path) -> Path:
    """The tiny checkpoint, `couple`."""
    return made_once(shared / "checkpoint" / "tiny", save_tiny)


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> LatteFlow:
    """The tiny checkpoint in PyTorch."""
    return load_checkpoint(checkpoint)


@pytest.fixture(scope="session")
def reference(model: LatteFlow, checkpoint: Path) -> Reference:
    """What a bundle of the tiny checkpoint must compute."""
    return Reference(model, load_image_processor(checkpoint), checkpoint)


@pytest.fixture(scope="session")
def bundle(checkpoint: Path, shared: Path) -> Path:
    """The tiny checkpoint exported in fp32 and verified. Tests that change it take `bundle_copy`."""

    def make(path: Path) -> None:
        _, failed = export_bundle(checkpoint, path)
        assert not failed

    return made_once(shared / "bundle" / "tiny", make)


@pytest.fixture
def bundle_copy(bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle to break."""
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> GpuDouble:
    """Doubles of CUDA and TensorRT instead of the real ones: what runs on them has seen no GPU."""
    return install(monkeypatch, CudaDouble())


@pytest.fixture
def plan_bundle(bundle_copy: Path, gpu: GpuDouble) -> Path:
    """A copy of the bundle with plans that the doubles can run."""
    add_plans(bundle_copy, "tensorrt")
    gpu.trt.show(bundle_copy)
    return bundle_copy


@pytest.fixture(scope="session")
def pipe(bundle: Path) -> LatteFlowPipeline:
    """The tiny bundle, opened on ONNX Runtime."""
    return LatteFlowPipeline.from_pretrained(bundle)


@pytest.fixture(scope="session")
def demo(shared: Path) -> tuple[Path, str]:
    """`latte-flow demo` as a user runs it: its folder, which no test changes, and what it printed."""
    folder = shared / "demo" / "out"

    def make(printed: Path) -> None:
        command = [sys.executable, "-m", "runtime.cli", "demo", "--out", str(folder)]
        finished = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        assert finished.returncode == 0, finished.stderr
        printed.write_text(finished.stdout)

    return folder, made_once(shared / "demo" / "printed.txt", make).read_text()


@pytest.fixture
def run_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Runs `latte-flow` in this process: arguments to (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        from runtime.cli import main

        monkeypatch.setattr("sys.argv", ["latte-flow", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
