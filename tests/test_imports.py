"""Who may import whom, and that the runtime needs neither torch nor the reference."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
RUNTIME_PARTS_OF_LATTE = {
    "runtime.arguments",
    "runtime.console",
    "runtime.errors",
    "runtime.files",
    "runtime.flow_time",
    "runtime.images",
}
"""What is the same for every backend, PyTorch included: written once, free of numpy-or-torch questions."""
FORBIDDEN = {
    "runtime": {"torch", "transformers", "diffusers", "latte", "export", "model_repository", "onnx", "onnxscript"},
    "latte": {"export", "model_repository", "onnx", "onnxruntime", "onnxscript"},
    "model_repository": {"torch", "transformers", "diffusers", "latte", "export", "onnx", "onnxscript"},
    "export": {"model_repository"},
}


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return names


@pytest.mark.parametrize("package", FORBIDDEN)
def test_packages_import_only_what_the_design_allows(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        found = imports_of(path)
        # The benchmark of the service measures the service.
        allowed = {"model_repository"} if "benchmarks" in path.parts else set()
        assert not {name.partition(".")[0] for name in found} & (FORBIDDEN[package] - allowed), path
        if package == "latte":
            assert {name for name in found if name.startswith("runtime")} <= RUNTIME_PARTS_OF_LATTE, path


LAYERS_OF_RUNTIME = (
    {"errors"},
    {"files", "console", "machine", "flow_time", "stopwatch", "arguments"},
    {"manifest", "images"},
    {"plans", "image_processor", "backends", "doctor"},
    {"rows", "engines", "language", "chat", "tracing"},
    {"sampler", "answers", "prefixes"},
    {"pipeline"},
    {"serving", "commands"},
    {"gateway", "playground"},
    {"batch"},
    {"cli"},
)
"""A module imports only from layers before its own, or from its own."""


def test_the_rooms_of_the_runtime_are_stacked() -> None:
    rank = {name: rank for rank, names in enumerate(LAYERS_OF_RUNTIME) for name in names}
    for path in (ROOT / "runtime").rglob("*.py"):
        room = path.relative_to(ROOT / "runtime").parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        found = {name.split(".")[1] for name in imports_of(path) if name.startswith("runtime.")}
        assert {name for name in found if rank[name] > rank[room]} == set(), path


def test_the_shapes_world_and_the_benchmarks_are_leaves() -> None:
    """The model knows nothing of `shapes`, and nothing of the product knows its benchmarks."""
    worlds = ("latte.shapes", "latte.emoji")
    named = ("commands.py", "arguments.py")  # where a user names a world
    for path in (ROOT / "latte").rglob("*.py"):
        if path.relative_to(ROOT / "latte").parts[0] not in ("shapes", "emoji") and path.name not in named:
            assert not {name for name in imports_of(path) if name.startswith(worlds)}, path
    for package in ("export", "model_repository", "runtime"):
        for path in (ROOT / package).rglob("*.py"):
            if "benchmarks" not in path.parts:
                assert not {name for name in imports_of(path) if name.startswith("export.benchmarks")}, path


def test_the_tests_of_the_runtime_do_not_import_the_exporter() -> None:
    for path in (ROOT / "tests" / "runtime").rglob("*.py"):
        assert not {name for name in imports_of(path) if name.partition(".")[0] == "export"}, path


def test_vendor_libraries_are_imported_by_their_backend_alone() -> None:
    for path in (ROOT / "runtime").rglob("*.py"):
        if path.name != "onnxruntime.py":
            assert not {name.partition(".")[0] for name in imports_of(path)} & {"onnxruntime", "tensorrt"}, path


WITHOUT_MODULES = """
import sys

from importlib.machinery import PathFinder

blocked = set(sys.argv.pop(1).split(","))
find_spec = PathFinder.find_spec
# As if they were not installed, for those who ask politely (`importlib.util.find_spec`) too.
PathFinder.find_spec = staticmethod(
    lambda name, *rest: None if name.partition(".")[0] in blocked else find_spec(name, *rest)
)
sys.meta_path[:] = [finder for finder in sys.meta_path if not finder.__module__.startswith("__editable__")]
from runtime.cli import main
sys.argv = ["latte-flow", *sys.argv[1:]]
main()
"""


IMPORT_BESIDE_TRITON = """
import runpy
from types import ModuleType

sys.modules["triton_python_backend_utils"] = ModuleType("triton_python_backend_utils")  # Triton brings it
runpy.run_path(sys.argv[1], run_name="imported")
"""


def run_without(blocked: set[str], *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_MODULES, ",".join(blocked), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)


HEAVY = {"torch", "transformers", "diffusers", "onnx", "onnxscript", "scipy"}


def test_the_runtime_draws_with_torch_transformers_and_latte_made_unimportable(bundle: Path, tmp_path: Path) -> None:
    blocked = HEAVY | {"latte", "export"}
    options = ("-o", tmp_path, "--seed", 1, "--num-inference-steps", 3)
    result = run_without(blocked, "generate", bundle, "a red circle", *options)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "000-a-red-circle-1.png").is_file()
    assert run_without(blocked, "inspect", bundle).returncode == 0
    assert "generate" in run_without(blocked, "--help").stdout


def test_the_runtime_answers_with_torch_transformers_and_latte_made_unimportable(bundle: Path, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "image.png")
    arguments = ("ask", bundle, tmp_path / "image.png", "describe the image", "--max-new-tokens", 3)
    result = run_without(HEAVY | {"latte", "export"}, *arguments)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    assert result.stderr == ""


@pytest.mark.parametrize("arguments", [("export", "shapes", "bundle"), ("train", "run"), ("score",), ("demo",)])
def test_a_command_whose_extra_is_missing_names_it_in_one_line(arguments: tuple[str, ...]) -> None:
    result = run_without(HEAVY, *arguments)
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert 'pip install "latte-flow[export' in result.stderr


@pytest.mark.parametrize("arguments", [("serve", "bundle"), ("repository", "bundle", "out"), ("client", "health")])
def test_a_service_without_tritonclient_names_its_extra(arguments: tuple[str, ...]) -> None:
    result = run_without({"tritonclient"}, *arguments)
    assert result.returncode == 2
    assert 'pip install "latte-flow[triton' in result.stderr


def test_benchmarks_run_without_the_extras_of_others() -> None:
    """After `make demo` all of them asked for tritonclient, and named extras that were there."""
    listed = run_without({"tritonclient", "fastapi", "ray"}, "bench", "--help")
    assert listed.returncode == 0, listed.stderr
    assert "scale-out" in listed.stdout
    result = run_without({"tritonclient"}, "bench", "gateway", "bundle", "--requests", 8)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: `latte-flow bench gateway` needs tritonclient, which is not installed")
    assert result.stderr.strip().endswith('run: pip install "latte-flow[export,cpu,gateway]"')
    result = run_without({"tritonclient"}, "bench", "soak")
    assert result.stderr.strip().endswith('run: pip install "latte-flow[export,cpu,triton]"')


def test_the_container_needs_no_client_library(tmp_path: Path) -> None:
    """It has `latte-flow[cpu]` only: for the drain before its end, its start, and the models that it serves."""
    blocked = HEAVY | {"tritonclient", "google", "latte", "export", "pytriton"}
    result = run_without(blocked, "control", "drain", "--key", tmp_path / "none")
    assert result.returncode == 2
    assert "cannot read the control key" in result.stderr
    for module in ("container.py", "latte_flow/1/model.py", "engine/1/model.py", "bls.py"):
        code = WITHOUT_MODULES.partition("from runtime.cli")[0] + IMPORT_BESIDE_TRITON
        path = ROOT / "model_repository" / module
        command = [sys.executable, "-c", code, ",".join(blocked), str(path)]
        found = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, check=False)
        assert (found.returncode, found.stderr) == (0, ""), module


def test_drawing_without_onnx_runtime_names_its_extra(bundle: Path, tmp_path: Path) -> None:
    result = run_without({"onnxruntime"}, "generate", bundle, "a red circle", "-o", tmp_path)
    assert result.returncode == 2
    assert 'pip install "latte-flow[cpu]"' in result.stderr
