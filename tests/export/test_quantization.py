"""INT8 engines: what is quantised, what it costs, and that ONNX Runtime computes it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from export.bundle import export_bundle
from export.quantization import QuantizationSettings, quantize_bundle
from export.verify import relative_error
from runtime.errors import InputError
from runtime.machine import products_saturate
from runtime.manifest import Manifest, load_manifest, save_manifest
from runtime.pipeline import LatteFlowPipeline

RunCommand = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = tmp_path_factory.mktemp("int8") / "bundle"
    _, failed = export_bundle(checkpoint, bundle, precision="int8")
    assert not failed
    return bundle


def operators(bundle: Path, engine: str) -> list[str]:
    return [node.op_type for node in onnx.load(bundle / engine / "model.onnx", load_external_data=False).graph.node]


def draw(bundle: Path) -> np.ndarray:
    with LatteFlowPipeline.from_pretrained(bundle) as pipe:
        return np.asarray(pipe("a small red circle", seed=0, output_type="latent").images)


def test_an_int8_bundle_holds_integer_products_and_verifies(exported: Path, bundle: Path) -> None:
    manifest = load_manifest(exported)
    assert manifest.precision == "int8"
    for engine in manifest.engines:
        is_quantized = engine.role in ("vision_encoder", "vlm", "expert")
        assert engine.precision == ("int8" if is_quantized else "fp32")
        assert (engine.quantization is not None) == is_quantized
        if engine.quantization is not None:
            chosen = engine.quantization
            assert operators(exported, engine.name).count("MatMulInteger") == len(chosen.quantized) > 0
            assert 0 < chosen.error <= QuantizationSettings().max_error
    assert len(manifest.parity or ()) > 20
    assert 1e-6 < (relative_error(draw(exported), draw(bundle)) or 0) < 0.1


def test_the_limit_decides_how_much_is_quantized(bundle: Path, tmp_path: Path) -> None:
    def quantized(limit: float) -> Manifest:
        copy = shutil.copytree(bundle, tmp_path / str(limit))
        return quantize_bundle(copy, QuantizationSettings(max_error=limit))

    def products(manifest: Manifest) -> int:
        return sum(len(engine.quantization.quantized) for engine in manifest.engines if engine.quantization)

    nothing, some, everything = (quantized(limit) for limit in (0.0, 0.01, 10.0))
    assert products(nothing) == 0 < products(some) < products(everything)
    assert not any(engine.quantization.kept for engine in everything.engines if engine.quantization)
    assert np.array_equal(draw(tmp_path / "0.0"), draw(bundle))
    sizes = [sum(file.size for file in manifest.files()) for manifest in (nothing, some, everything)]
    assert sizes[0] > sizes[1] > sizes[2]


def test_seven_bits_are_seven_bits(bundle_copy: Path) -> None:
    manifest = quantize_bundle(bundle_copy, QuantizationSettings(max_error=10, reduce_range=True))
    graph = onnx.load(bundle_copy / "expert_0" / "model.onnx").graph
    levels = [onnx.numpy_helper.to_array(value) for value in graph.initializer if value.name.endswith(".levels")]
    assert levels
    assert max(int(np.abs(value.astype(int)).max()) for value in levels) == 63
    quantization = manifest.engine("expert_0").quantization
    assert quantization is not None
    assert quantization.reduced_range


def test_where_nothing_is_said_to_saturate_nothing_does() -> None:
    """The largest products of 8 bits, added up: exact on this CPU, unless `products_saturate` says that it is not."""
    size = 64
    node = helper.make_node("MatMulInteger", ["a", "b"], ["y"])
    graph = helper.make_graph(
        [node],
        "products",
        [helper.make_tensor_value_info("a", TensorProto.UINT8, [size, size])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [size, size])],
        [onnx.numpy_helper.from_array(np.full((size, size), 127, np.int8), "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (product,) = session.run(None, {"a": np.full((size, size), 255, np.uint8)})
    assert products_saturate() or (product == size * 255 * 127).all()


@pytest.mark.parametrize(
    ("saturates", "reduced_range", "warns"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_a_doctor_warns_of_full_range_on_a_cpu_without_vnni(
    saturates: bool,
    reduced_range: bool,
    warns: bool,
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_command: RunCommand,
) -> None:
    """Whatever this CPU has: the bundle says what it needs, and the CPU what it can."""
    bundle = Path(shutil.copytree(exported, tmp_path / "bundle"))
    manifest = load_manifest(bundle)
    engines = [
        engine
        if engine.quantization is None
        else engine.model_copy(
            update={"quantization": engine.quantization.model_copy(update={"reduced_range": reduced_range})}
        )
        for engine in manifest.engines
    ]
    save_manifest(manifest.model_copy(update={"engines": tuple(engines)}), bundle)
    monkeypatch.setattr("runtime.doctor.products_saturate", lambda: saturates)
    _, out, _ = run_command("doctor", bundle, "--json")
    assert ("--reduce-range" in out) == warns


def test_inspect_says_how_many_products_are_quantized(exported: Path, run_command: RunCommand) -> None:
    code, out, _ = run_command("inspect", exported)
    assert code == 0
    assert "products" in out


def test_int8_is_not_for_tensorrt_nor_fused(
    exported: Path, checkpoint: Path, tmp_path: Path, run_command: RunCommand
) -> None:
    code, _, error = run_command("build", exported)
    assert code == 2
    assert "int8 is for ONNX Runtime on the CPU" in error
    with pytest.raises(InputError, match="leave it out"):
        export_bundle(checkpoint, tmp_path / "b", precision="int8", fuse=True)


def test_int8_is_measured_beside_fp32(
    demo: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, run_command: RunCommand
) -> None:
    monkeypatch.setattr("export.benchmarks.int8.MAX_ERRORS", (1.0,))
    monkeypatch.setattr("export.benchmarks.int8.PSNR_IMAGES", 4)
    options = ("--bundle", demo[0] / "bundle", "--prompts", 10, "--questions", 10, "--rounds", 1, "--json")
    code, out, error = run_command("bench", "int8", *options)
    assert code == 0, error
    fp32, int8 = json.loads(out)["rows"]
    assert int8["megabytes"] < fp32["megabytes"] / 3
    assert fp32["psnr_db"] == 100 > int8["psnr_db"] > 35
    assert abs(int8["right"]["1_shape"] - fp32["right"]["1_shape"]) <= 0.2
