"""A model repository is made by protobuf, whole, and says what the service accepts."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

import model_repository.layout
from model_repository.layout import write_repository
from model_repository.schema import ENGINE_FILE, INPUTS, OUTPUTS
from runtime.backends import Backend, open_backend
from runtime.errors import BundleError, InputError
from runtime.manifest import EngineEntry, check_file, load_manifest
from runtime.plans import usable_plan
from tests.plan_files import PLAN_VERSION, add_plans

RunCommand = Callable[..., tuple[int, str, str]]


def test_the_config_is_one_that_triton_reads(repository: Path) -> None:
    text = (repository / "latte_flow" / "config.pbtxt").read_text()
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    assert (config.name, config.backend, config.max_batch_size) == ("latte_flow", "python", 0)
    assert config.model_transaction_policy.decoupled
    assert [(i.name, i.optional) for i in config.input] == [(field.name, True) for field in INPUTS]
    assert [o.name for o in config.output] == [field.name for field in OUTPUTS]
    assert config.parameters["max_steps"].string_value == "200"
    assert config.parameters["max_queued_images"].string_value == "64"


def test_the_repository_in_the_source_tree_is_what_is_written(bundle: Path, tmp_path: Path) -> None:
    write_repository(bundle, tmp_path / "models")
    source = Path(model_repository.layout.__file__).parent
    for file in ("latte_flow/config.pbtxt", "latte_flow/1/model.py"):
        lines = [line for line in (source / file).read_text().splitlines() if not line.startswith("#")]
        assert (tmp_path / "models" / file).read_text().splitlines() == lines


def test_it_holds_the_bundle_and_names_nothing_outside(bundle: Path, tmp_path: Path, run_command: RunCommand) -> None:
    code, out, error = run_command("repository", bundle, tmp_path / "models")
    assert (code, error) == (0, "")
    assert out == f"{tmp_path / 'models'}\n"
    copied = tmp_path / "models" / "latte_flow" / "1" / "bundle"
    assert load_manifest(copied) == load_manifest(bundle)
    config = (tmp_path / "models" / "latte_flow" / "config.pbtxt").read_text()
    assert str(tmp_path) not in config
    assert "EXECUTION_ENV_PATH" not in config


@pytest.mark.parametrize("platform", ["python", "onnxruntime"])
def test_each_engine_can_be_a_model_of_its_own(
    platform: str, bundle: Path, tmp_path: Path, run_command: RunCommand
) -> None:
    options = ("--layout", "per-engine", "--platform", platform, "--provider", "cuda", "--gpu", "expert_1=3")
    code, _, error = run_command("repository", bundle, tmp_path / "models", *options)
    assert code == 0, error
    for engine in load_manifest(bundle).engines:
        folder = tmp_path / "models" / f"latte_flow_{engine.name}"
        config = text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
        assert config.name == folder.name
        assert config.platform == ("onnxruntime_onnx" if platform == "onnxruntime" else "")
        assert [tensor.name for tensor in config.input] == [spec.name for spec in engine.inputs]
        assert [list(tensor.dims) for tensor in config.output] == [
            [-1 if isinstance(axis, str) else axis for axis in spec.shape] for spec in engine.outputs
        ]
        group = config.instance_group[0]
        assert list(group.gpus) == ([3] if engine.name == "expert_1" else [])
        assert (folder / "1" / "model.onnx").is_file()
        assert (folder / "1" / "model.py").is_file() == (platform == "python")
    service = (tmp_path / "models" / "latte_flow" / "config.pbtxt").read_text()
    assert "per-engine" in service


def test_an_engine_in_python_whose_provider_runs_plans_gets_its_plan(bundle_copy: Path, tmp_path: Path) -> None:
    add_plans(bundle_copy, "tensorrt")
    options = {"layout": "per-engine", "provider": "tensorrt", "placement": {"expert_1": 3}}
    write_repository(bundle_copy, tmp_path / "models", **options)  # type: ignore[arg-type]
    for engine in load_manifest(bundle_copy).engines:
        version = tmp_path / "models" / f"latte_flow_{engine.name}" / "1"
        entry = EngineEntry.model_validate_json((version / ENGINE_FILE).read_text())
        plan = usable_plan(version, entry, "tensorrt", PLAN_VERSION, "sm_90")
        assert check_file(version, plan.file).read_bytes() == (bundle_copy / engine.name / "model.plan").read_bytes()


def test_an_engine_in_python_runs_on_the_gpu_that_it_was_given(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_repository(bundle, tmp_path / "models", layout="per-engine")
    opened: list[tuple[str, dict[str, str]]] = []

    def open_and_record(provider: str, options: dict[str, str]) -> Backend:
        opened.append((provider, options))
        return open_backend("cpu")

    monkeypatch.setattr("runtime.backends.open_backend", open_and_record)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", ModuleType("triton_python_backend_utils"))
    folder = tmp_path / "models" / "latte_flow_expert_1"
    model = runpy.run_path(str(folder / "1" / "model.py"))["TritonPythonModel"]()
    text = (folder / "config.pbtxt").read_text()
    parameters = text_format.Parse(text, model_config_pb2.ModelConfig()).parameters
    config = {"parameters": {name: {"string_value": value.string_value} for name, value in parameters.items()}}
    place = {"model_instance_kind": "GPU", "model_instance_device_id": "3"}
    model.initialize(
        {"model_config": json.dumps(config), "model_repository": str(folder), "model_version": "1"} | place
    )
    model.finalize()
    assert opened == [("cpu", {"device_id": "3"})]


BAD_OPTIONS = {
    "a platform in process": (("--platform", "onnxruntime"), "the layout in-process runs its engines in Python"),
    "no plan": (
        ("--layout", "per-engine", "--platform", "tensorrt"),
        "no TensorRT plan of vision_encoder; run `latte",
    ),
    "no such engine": (
        ("--layout", "per-engine", "--provider", "cuda", "--gpu", "expert_9=0"),
        "no engine 'expert_9'",
    ),
    "a GPU for the CPU": (
        ("--layout", "per-engine", "--gpu", "expert_0=0"),
        "the provider cpu runs no engine on a GPU",
    ),
    "no such limit": (("--limit", "max_stepz=3"), "unknown limit 'max_stepz'; known are max_steps"),
    "no number of a limit": (("--limit", "max_steps=many"), "the limit max_steps must be a whole number, got 'many'"),
    "a limit of nothing": (("--limit", "max_steps=0"), "the limit max_steps must be at least 1, got 0"),
    "no option": (("--provider-option", "threads"), "expected --provider-option NAME=VALUE"),
    "no number": (("--layout", "per-engine", "--gpu", "expert_0"), "expected --gpu NAME=VALUE"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_options_that_do_not_fit_are_one_clear_line(
    name: str, bundle: Path, tmp_path: Path, run_command: RunCommand
) -> None:
    options, message = BAD_OPTIONS[name]
    code, out, error = run_command("repository", bundle, tmp_path / "models", *options)
    assert (code, out) == (2, "")
    (line,) = error.strip().splitlines()
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_what_is_in_the_way_stays(bundle: Path, tmp_path: Path, run_command: RunCommand) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="name another folder"):
        write_repository(bundle, tmp_path, force=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    write_repository(bundle, tmp_path / "models")
    code, _, error = run_command("repository", bundle, tmp_path / "models")
    assert code == 2
    assert "--force" in error
    assert run_command("repository", bundle, tmp_path / "models", "--force")[0] == 0
    with pytest.raises(BundleError):
        write_repository(tmp_path, tmp_path / "others")
    assert not (tmp_path / "others").exists()


def test_a_bundle_of_symbolic_links_is_copied_whole(bundle: Path, tmp_path: Path) -> None:
    """The Hugging Face cache is made so: snapshots of relative links into blobs. A link to a link once was copied."""
    snapshot, blobs = tmp_path / "models--a" / "snapshots" / "1", tmp_path / "models--a" / "blobs"
    blobs.mkdir(parents=True)
    for number, file in enumerate(sorted(path for path in bundle.rglob("*") if path.is_file())):
        link = snapshot / file.relative_to(bundle)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blobs / str(number))
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    for layout in ("in-process", "per-engine"):
        write_repository(snapshot, tmp_path / layout, layout=layout)
    shutil.rmtree(tmp_path / "models--a")
    assert not [path for path in tmp_path.rglob("*") if path.is_symlink()]
    for entry in load_manifest(bundle).files():
        check_file(tmp_path / "in-process" / "latte_flow" / "1" / "bundle", entry)
    assert (tmp_path / "per-engine" / "latte_flow_expert_0" / "1" / "model.onnx").stat().st_size > 0


def test_limits_and_options_are_in_the_configuration(bundle: Path, tmp_path: Path, run_command: RunCommand) -> None:
    options = ("--limit", "max_steps=7", "--limit", "max_queued_images=9", "--provider", "cuda", "--device", "1")
    further = ("--provider-option", "io_binding=0", "--log-format", "json", "--environment", tmp_path / "env")
    code, _, error = run_command("repository", bundle, tmp_path / "models", *options, *further)
    assert code == 0, error
    text = (tmp_path / "models" / "latte_flow" / "config.pbtxt").read_text()
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    parameters = {name: value.string_value for name, value in config.parameters.items()}
    assert (parameters["max_steps"], parameters["max_queued_images"]) == ("7", "9")
    code, _, error = run_command("repository", bundle, tmp_path / "models", "--force", "--limit", "max_steps=7")
    said = " ".join(error.split())
    assert code == 0
    assert "max_queued_images 9 -> 1024" in said
    assert "provider cuda -> cpu" in said
    assert "max_steps" not in said
    assert (parameters["provider"], parameters["log_format"]) == ("cuda", "json")
    assert json.loads(parameters["provider_options"]) == {"device_id": "1", "io_binding": "0"}
    assert parameters["EXECUTION_ENV_PATH"] == str(tmp_path / "env")
