"""INT8 engines: what is quantised, what it costs, that ONNX Runtime computes it, and that batches change nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from export.bundle import export_bundle
from export.engines import save_engine
from export.integer_products import IntegerForm
from export.parity import relative_error
from export.products import replace_products
from export.quantization import (
    GUIDANCE_SCALES,
    TO_CHOOSE,
    TO_REPORT,
    QuantizationSettings,
    quantize_bundle,
    record_runs,
    rewrite_engine,
    what_counts,
)
from export.weight_check import is_quantized
from runtime.backends import open_backend
from runtime.errors import InputError
from runtime.flow_time import ExpertSchedule
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


def fused_operators(bundle: Path, engine: str, folder: Path) -> list[str]:
    """The operators of an engine as ONNX Runtime runs it."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / f"{engine}.onnx")
    ort.InferenceSession(str(bundle / engine / "model.onnx"), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(folder / f"{engine}.onnx", load_external_data=False).graph
    return [node.op_type for node in graph.node]


def draw(bundle: Path) -> np.ndarray:
    with LatteFlowPipeline.from_pretrained(bundle) as pipe:
        return np.asarray(pipe("a small red circle", seed=0, output_type="latent").images)


def test_an_int8_bundle_is_computed_in_integer_products_and_verifies(
    exported: Path, bundle: Path, tmp_path: Path
) -> None:
    manifest = load_manifest(exported)
    assert manifest.precision == "int8"
    for engine in manifest.engines:
        is_quantized = engine.role in ("vision_encoder", "vlm", "expert")
        assert engine.precision == ("int8" if is_quantized else "fp32")
        assert (engine.quantization is not None) == is_quantized
        if engine.quantization is not None:
            chosen = engine.quantization
            operators = fused_operators(exported, engine.name, tmp_path)
            assert operators.count("MatMulIntegerToFloat") == len(chosen.quantized) > 0
            assert "DequantizeLinear" not in operators
            assert 0 < chosen.error < 2 * QuantizationSettings().max_error
    assert len(manifest.parity or ()) > 20
    assert 1e-6 < relative_error(draw(exported), draw(bundle)) < 0.1


@pytest.fixture(scope="module", params=["fp32", "fp16", "fp8", "int8", "int8 in 7 bits"])
def in_every_precision(
    request: pytest.FixtureRequest, checkpoint: Path, bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A bundle in each precision that ONNX Runtime runs on the CPU, which bf16 is not; every product in INT8."""
    folder = tmp_path_factory.mktemp("precision") / "bundle"
    if request.param == "fp32":
        return bundle
    if request.param in ("fp16", "fp8"):
        export_bundle(checkpoint, folder, precision=request.param, verify=False)
        return folder
    shutil.copytree(bundle, folder)
    manifest = load_manifest(folder)
    bits = 7 if "7" in request.param else 8
    engines = [
        rewrite_engine(folder, engine, folder, bits=bits)
        if engine.role in ("vision_encoder", "vlm", "expert")
        else engine
        for engine in manifest.engines
    ]
    save_manifest(manifest.model_copy(update={"precision": "int8", "engines": tuple(engines)}), folder)
    return folder


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_an_image_is_the_same_alone_and_in_a_batch_with_longer_prompts(in_every_precision: Path, scale: float) -> None:
    """With one range for all rows of a tensor, images of INT8 differed by 4 levels. Where rows are apart, but padding
    changes the order of a sum, a difference of 1e-7 moves activations to the next level, and the images part.
    """
    prompt, long = "a small red circle", "a large green star above a small blue square on a white background"
    with LatteFlowPipeline.from_pretrained(in_every_precision) as pipe:

        def draw(prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
            seeds = list(range(len(prompts)))
            options = {"num_inference_steps": 8, "guidance_scale": scale, "seed": seeds, "output_type": "latent"}
            latents = np.asarray(pipe(prompts, **options).images)  # type: ignore[arg-type]
            return latents[0], pipe.decode(latents[:1])[0].astype(int)

        alone, image = draw([prompt])
        for batch in ([prompt] * 3, [prompt, "a"], [prompt, long], [prompt, long, "a", long, long]):
            latents, again = draw(batch)
            assert relative_error(latents, alone) < 1e-5
            assert np.abs(again - image).max() <= 1


def test_a_product_with_a_bias_is_what_numpy_says(tmp_path: Path) -> None:
    """ONNX Runtime 1.32 multiplies a bias by the rows' scales if the graph lets it fuse all three."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((24, 16), np.float32)
    bias = 100 * rng.standard_normal(24, np.float32)
    x = rng.standard_normal((2, 5, 16), np.float32) * 10.0 ** rng.uniform(-3, 3, (2, 5, 1)).astype(np.float32)
    x[1, 4] = 0
    graph = helper.make_graph(
        [
            helper.make_node("Transpose", ["w"], ["wt"], perm=[1, 0]),
            helper.make_node("MatMul", ["x", "wt"], ["xw"]),
            helper.make_node("Add", ["xw", "b"], ["y"]),
        ],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", "tokens", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", "tokens", 24])],
        [onnx.numpy_helper.from_array(weight, "w"), onnx.numpy_helper.from_array(bias, "b")],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))
    replace_products(model, {"w"}, IntegerForm(bits=7))
    save_engine(model, tmp_path)
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    magnitude = np.abs(x).max(axis=-1, keepdims=True)
    scale = np.abs(weight).max(axis=1, keepdims=True) / 63
    levels = np.rint(x / np.where(magnitude == 0, 1, magnitude) * 127)
    expected = magnitude / 127 * (levels @ np.rint(weight / scale).T) * scale[:, 0] + bias
    np.testing.assert_allclose(session.run(None, {"x": x})[0], expected, rtol=1e-4, atol=1e-3)


def test_every_expert_is_calibrated_however_short_its_interval_is(bundle_copy: Path) -> None:
    """A grid of equal steps had none in such an interval, and the export ended in a KeyError."""
    manifest = load_manifest(bundle_copy)
    schedule = ExpertSchedule(boundaries=(0.0, 1 - 1e-9, 1.0))
    save_manifest(manifest.model_copy(update={"schedule": schedule}), bundle_copy)
    for calibration in (TO_CHOOSE, TO_REPORT):
        feeds = record_runs(bundle_copy, calibration)
        assert {engine.name for engine in manifest.engines if engine.role == "expert"} < set(feeds)
    quantized = quantize_bundle(bundle_copy, QuantizationSettings(max_error=1.0))
    assert all(engine.quantization for engine in quantized.engines if engine.role == "expert")


def test_the_error_is_that_of_runs_which_the_choice_did_not_see(bundle: Path, exported: Path) -> None:
    assert not set(TO_CHOOSE.prompts) & set(TO_REPORT.prompts)
    assert abs(TO_CHOOSE.first_seed - TO_REPORT.first_seed) > len(TO_CHOOSE.prompts)
    schedule = load_manifest(bundle).schedule
    assert set(TO_CHOOSE.times(schedule)) & set(TO_REPORT.times(schedule)) == {0.0, 1.0}
    feeds = record_runs(bundle, TO_REPORT)
    backend = open_backend("cpu")
    for name in ("vision_encoder", "vlm", "expert_0", "expert_1"):
        reference, entry = (load_manifest(path).engine(name) for path in (bundle, exported))
        with backend.load(bundle, reference) as fp32, backend.load(exported, entry) as int8:
            errors = [
                relative_error(value, expected)
                for feed in feeds[name]
                for value, expected in zip(
                    *(
                        what_counts(entry.role, feed, {k: v.numpy() for k, v in session.run(feed).items()})
                        for session in (int8, fp32)
                    ),
                    strict=True,
                )
            ]
        assert entry.quantization is not None
        assert max(errors) == pytest.approx(entry.quantization.error, rel=0.05)


def test_an_experts_error_is_that_of_the_guided_velocity() -> None:
    """A velocity 1 % off in one row is 5 % off when it is guided with a scale of 5 and both rows are alike."""
    velocity = np.ones((2, 1, 2, 2), np.float32)
    off = velocity * np.array([1.01, 1.0], np.float32).reshape(2, 1, 1, 1)
    guided, expected = (list(what_counts("expert", {}, {"velocity": rows})) for rows in (off, velocity))
    errors = [relative_error(value, reference) for value, reference in zip(guided, expected, strict=True)]
    assert errors == pytest.approx([0.01 * scale for scale in GUIDANCE_SCALES], rel=1e-3)


def test_padding_and_past_do_not_count_in_a_language_models_error() -> None:
    feed = {"input_ids": np.zeros((1, 2), np.int64), "attention_mask": np.array([[True, True, False]])}
    kv = np.arange(2 * 2 * 1 * 1 * 3 * 4, dtype=np.float32).reshape(2, 2, 1, 1, 3, 4)  # a past of 1, and 2 new tokens
    _, keys, values = what_counts("vlm", feed, {"logits": np.zeros((1, 3), np.float32), "kv_0": kv})
    assert np.array_equal(keys.ravel(), kv[:, 0, 0, 0, 1].ravel())
    assert np.array_equal(values.ravel(), kv[:, 1, 0, 0, 1].ravel())


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


def test_levels_are_compared_in_parts_as_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((7, 5)).astype(np.float32)
    scales = np.abs(weight).max(axis=1) / 127
    levels = np.rint(weight / scales[:, None]).astype(np.int8).T
    for block in (1, 2 * 4 * 5, 1 << 20):  # one output at a time, two, and all of them
        monkeypatch.setattr("export.weight_check.BLOCK_BYTES", block)
        assert is_quantized(weight, levels, scales, 127)
        for place in (0, 3, 6):
            off = levels.copy()
            off[2, place] += 1 if off[2, place] < 0 else -1
            assert not is_quantized(weight, off, scales, 127)
        assert not is_quantized(weight, levels, scales, 63)


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
    monkeypatch.setattr("export.benchmarks.int8.MAX_ERRORS", (float("inf"),))
    monkeypatch.setattr("export.benchmarks.int8.PSNR_IMAGES", 4)
    options = ("--bundle", demo[0] / "bundle", "--prompts", 10, "--questions", 10, "--rounds", 1, "--json")
    code, out, error = run_command("bench", "int8", *options)
    assert code == 0, error
    fp32, int8 = json.loads(out)["rows"]
    assert int8["megabytes"] < fp32["megabytes"] / 3
    assert fp32["psnr_db"] == 100 > int8["psnr_db"] > 35
    assert set(fp32["velocity_error"].values()) == {0.0}
    assert 0 < int8["velocity_error"]["1"] < int8["velocity_error"]["5"] < 1
    assert abs(int8["right"]["1_shape"] - fp32["right"]["1_shape"]) <= 0.2
