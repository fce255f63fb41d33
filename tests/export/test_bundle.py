"""A bundle holds what it says, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from export.bundle import export_bundle
from export.components import expert_weight_source
from export.engines import load_engine
from latte.config import LatteFlowConfig
from latte.model import LatteFlow
from runtime.errors import BundleError, InputError
from runtime.manifest import load_manifest
from runtime.pipeline import LatteFlowPipeline
from tests.tiny import save_tiny


def test_there_is_an_engine_for_every_role_and_group(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    assert [engine.name for engine in manifest.engines] == [
        "vision_encoder",
        "vlm",
        "expert_0",
        "expert_1",
        "solver_step",
        "vae_decoder",
    ]
    assert [engine.role for engine in manifest.engines] == [
        "vision_encoder",
        "vlm",
        "expert",
        "expert",
        "solver_step",
        "vae_decoder",
    ]
    assert [engine.group for engine in manifest.engines] == [None, None, 0, 1, None, None]
    assert {engine.opset for engine in manifest.engines} == {18}


def test_graphs_declare_the_manifests_names_types_and_axes(bundle: Path) -> None:
    for engine in load_manifest(bundle).engines:
        graph = onnx.load(bundle / engine.files[0].path, load_external_data=False).graph
        for values, specs in ((graph.input, engine.inputs), (graph.output, engine.outputs)):
            assert [value.name for value in values] == [spec.name for spec in specs]
            for value, spec in zip(values, specs, strict=True):
                shape = tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)
                assert shape == spec.shape
                dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
                assert np.dtype(dtype) == np.dtype(spec.dtype)


def test_no_file_holds_a_path_of_the_machine_that_wrote_it(bundle: Path, checkpoint: Path) -> None:
    places = {
        str(bundle.parent),
        str(checkpoint.parent),
        str(Path.home()),
        str(Path(__file__).parents[2]),
        "site-packages",
    }
    for path in bundle.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not [place for place in places if place.encode() in content], path


def test_external_data_is_a_safetensors_file_beside_the_graph(bundle: Path) -> None:
    for engine in load_manifest(bundle).engines:
        model = onnx.load(bundle / engine.files[0].path, load_external_data=False)
        locations = {
            entry.value
            for tensor in model.graph.initializer
            for entry in tensor.external_data
            if entry.key == "location"
        }
        assert locations <= {"weights.safetensors"}
        assert [file.path for file in engine.files[1:]] == [f"{engine.name}/{name}" for name in locations]


@pytest.mark.parametrize("engine", ["expert_0", "vlm"])
def test_onnxruntime_makes_one_operator_of_a_norm(bundle: Path, tmp_path: Path, engine: str) -> None:
    """As PyTorch exports them they stay seven, a fifth of the nodes of an expert."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3  # it warns that such a file is for this machine only
    ort.InferenceSession(bundle / engine / "model.onnx", options, providers=["CPUExecutionProvider"])
    operators = [
        node.op_type for node in onnx.load(options.optimized_model_filepath, load_external_data=False).graph.node
    ]
    assert "SimplifiedLayerNormalization" in operators
    assert not {"Sqrt", "Reciprocal"} & set(operators)


def test_weights_elsewhere_are_refused(bundle_copy: Path) -> None:
    file = bundle_copy / "expert_1" / "model.onnx"
    graph = onnx.load(file, load_external_data=False)
    outside = next(tensor for tensor in graph.graph.initializer if tensor.external_data)
    outside.external_data[0].value = "../expert_0/weights.safetensors"
    file.write_bytes(graph.SerializeToString())
    with pytest.raises(BundleError, match=r"must be in weights\.safetensors beside it, got '\.\./expert_0"):
        load_engine(file.parent)


def test_one_expert_graph_serves_all_groups(bundle: Path) -> None:
    """Experts differ in weights alone: same nodes, other data."""
    graphs = [onnx.load(bundle / f"expert_{k}" / "model.onnx", load_external_data=False).graph for k in range(2)]
    assert [node.SerializeToString() for node in graphs[0].node] == [
        node.SerializeToString() for node in graphs[1].node
    ]
    weights = [(bundle / f"expert_{k}" / "weights.safetensors").read_bytes() for k in range(2)]
    assert weights[0] != weights[1]


def test_weights_of_the_traced_expert_are_found_for_every_group_and_variant(model: LatteFlow) -> None:
    config = model.config
    assert expert_weight_source(config, 1, "flow.layers.0.q_proj.weight") == ("flow", "layers.2.q_proj.weight")
    assert expert_weight_source(config, 1, "flow.heads.0.proj.bias") == ("flow", "heads.1.proj.bias")
    assert expert_weight_source(config, 1, "flow.latent_embed.bias") == ("flow", "latent_embed.bias")
    blend = LatteFlowConfig.model_validate(config.model_dump() | {"variant": "blend"})
    shared = expert_weight_source(blend, 1, "flow.layers.1.up_proj.weight")
    assert shared == ("language_model", "layers.3.mlp.up_proj.weight")
    assert expert_weight_source(blend, 1, "flow.layers.1.attention_gate.weight")[0] == "flow"


def test_blend_and_half_precision_export_and_verify(tmp_path: Path) -> None:
    """Both at once, since an export costs a minute: shared weights come from the VLM, and fp16 holds its tolerances."""
    save_tiny(tmp_path / "checkpoint", "blend")
    manifest, failed = export_bundle(tmp_path / "checkpoint", tmp_path / "bundle", precision="fp16")
    assert not failed
    assert {e.name: e.precision for e in manifest.engines}["expert_0"] == "fp16"
    assert manifest.geometry.variant == "blend"
    assert not any(engine.fused for engine in manifest.engines)
    with LatteFlowPipeline.from_pretrained(tmp_path / "bundle") as pipe:
        assert pipe.kv_dtype == np.float16
        assert pipe("a red star", num_inference_steps=2, output_type="np").images.shape == (1, 24, 32, 3)


def test_an_interrupted_export_leaves_no_bundle(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("export.bundle.make_graphs", stop)
    with pytest.raises(KeyboardInterrupt):
        export_bundle(checkpoint, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_export_over_a_bundle_leaves_the_old_one(
    checkpoint: Path, bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = (bundle_copy / "manifest.json").read_bytes()
    monkeypatch.setattr("export.bundle.make_graphs", stop)
    with pytest.raises(KeyboardInterrupt):
        export_bundle(checkpoint, bundle_copy, force=True)
    assert (bundle_copy / "manifest.json").read_bytes() == before
    load_manifest(bundle_copy)


def test_exporting_over_something_asks_first(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--force"):
        export_bundle(checkpoint, bundle)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="contains no bundle"):
        export_bundle(checkpoint, tmp_path, force=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_place_that_cannot_be_written_is_said_before_any_work(
    checkpoint: Path, tmp_path: Path, run_command: Callable[..., tuple[int, str, str]]
) -> None:
    (tmp_path / "file").write_text("in the way")
    blocked = tmp_path / "file" / "folder"
    for command in (("export", checkpoint, blocked), ("train", checkpoint, "--data", "shapes", "--out", blocked)):
        code, out, error = run_command(*command)
        assert (code, out) == (2, "")
        assert error.strip().splitlines()[-1].startswith("error: cannot write to")


def test_export_of_nothing_is_one_clear_line(tmp_path: Path, run_command: Callable[..., tuple[int, str, str]]) -> None:
    code, out, error = run_command("export", tmp_path / "nowhere", tmp_path / "bundle")
    assert code == 2
    assert out == ""
    assert error.strip().splitlines()[-1].startswith("error: no checkpoint at")
    assert not (tmp_path / "bundle").exists()


def test_bf16_is_verified_but_for_its_rounding(
    checkpoint: Path, tmp_path: Path, run_command: Callable[..., tuple[int, str, str]]
) -> None:
    """ONNX Runtime's CPU does not run bf16, so the engines themselves are not run."""
    code, _, error = run_command("export", checkpoint, tmp_path / "bundle", "--precision", "bf16")
    assert code == 0, error
    assert "not run" in error
    manifest = load_manifest(tmp_path / "bundle")
    assert {row.rung for row in manifest.parity or ()} == {"input", "weights", "graph"}
    assert manifest.engine("expert_1").input("prefix_kv").dtype == "bfloat16"
    graph = onnx.load(tmp_path / "bundle" / "expert_1" / "model.onnx", load_external_data=False).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert types["flow.layers.0.q_proj.weight"] == onnx.TensorProto.BFLOAT16
    assert types["flow.rotary_frequencies"] == onnx.TensorProto.FLOAT


def test_the_manifest_is_the_documented_format(bundle: Path) -> None:
    """Pins the top level of manifest.json, which is described in docs/bundle.md."""
    content = json.loads((bundle / "manifest.json").read_text())
    assert list(content) == [
        "schema_version",
        "producer",
        "checkpoint_sha256",
        "precision",
        "geometry",
        "schedule",
        "sampling",
        "prompt",
        "understanding",
        "engines",
        "tokenizer_files",
        "parity",
    ]
    assert content["schema_version"] == 7
    assert list(content["engines"][1]) == [
        "name",
        "role",
        "group",
        "precision",
        "opset",
        "fused",
        "files",
        "inputs",
        "outputs",
        "quantization",
        "plans",
    ]


def test_an_opset_that_the_exporter_cannot_write_is_one_line(
    checkpoint: Path, tmp_path: Path, run_command: Callable[..., tuple[int, str, str]]
) -> None:
    code, _, error = run_command("export", checkpoint, tmp_path / "bundle", "--opset", 99)
    assert code == 2
    assert "less than or equal to 25" in error
    assert not (tmp_path / "bundle").exists()
