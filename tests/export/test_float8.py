"""FP8 engines: what is quantised, what it costs, that TensorRT takes every product, and that batches change nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from export.bundle import export_bundle
from export.engines import load_engine, save_engine
from export.float8_products import FLOAT8, LARGEST, SCALES, float8_of, scales_of
from export.parity import relative_error
from export.plans.build import BuildOptions, build_plans
from export.reference import Reference
from export.verify import verify_bundle
from export.weight_check import is_float8
from runtime.errors import EngineError, InputError
from runtime.manifest import load_manifest, save_manifest
from runtime.pipeline import LatteFlowPipeline
from tests.export.mutations import sign

PROMPTS = ("a small red circle", "a", "a large green star above a small blue square on a white background")


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = tmp_path_factory.mktemp("fp8") / "bundle"
    _, failed = export_bundle(checkpoint, bundle, precision="fp8")
    assert not failed
    return bundle


@pytest.fixture
def altered(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


def test_an_fp8_bundle_verifies_and_says_what_it_quantised(exported: Path, bundle: Path) -> None:
    manifest = load_manifest(exported)
    assert manifest.precision == "fp8"
    for engine in manifest.engines:
        is_quantized = engine.role in ("vision_encoder", "vlm", "expert")
        assert engine.precision == ("fp8" if is_quantized else "fp32")
        if engine.quantization is None:
            continue
        assert 0 < engine.quantization.error < 0.1
        graph = onnx.load(exported / engine.name / "model.onnx", load_external_data=False)
        assert {opset.version for opset in graph.opset_import if not opset.domain} == {19}
        found = [i.name.removesuffix(FLOAT8) for i in graph.graph.initializer if i.name.endswith(FLOAT8)]
        assert sorted(found) == sorted(engine.quantization.quantized)
        assert len(found) > 0
        shared = {node.input[0] for node in graph.graph.node if node.op_type == "QuantizeLinear"}
        assert 0 < len(shared) <= len(found)  # queries, keys and values are of the same activations
    with LatteFlowPipeline.from_pretrained(exported) as pipe, LatteFlowPipeline.from_pretrained(bundle) as wide:
        images, expected = (np.asarray(p("a", seed=0, output_type="latent").images) for p in (pipe, wide))
    assert 1e-4 < relative_error(images, expected) < 0.2


def test_an_image_is_the_same_alone_and_in_a_batch(exported: Path) -> None:
    """Scales are fixed, so nothing depends on what shares the batch but the rounding of sums in fp16."""
    with LatteFlowPipeline.from_pretrained(exported) as pipe:
        together = pipe(PROMPTS, seed=[1, 2, 3], num_inference_steps=8, output_type="np").images
        for i, prompt in enumerate(PROMPTS):
            alone = pipe(prompt, seed=i + 1, num_inference_steps=8, output_type="np").images[0]
            assert np.abs(alone.astype(int) - together[i]).max() <= 1


def test_weights_are_rounded_to_the_nearest_of_each_outputs_range() -> None:
    weight = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float16)
    weight[2] = 0
    weight[3] *= 1e-3
    scales = scales_of(weight)
    levels = float8_of(weight, scales)
    assert levels.dtype == ml_dtypes.float8_e4m3fn
    assert levels.shape == (64, 5)
    assert scales.dtype == np.float16
    back = levels.astype(np.float32).T * scales.astype(np.float32)[:, None]
    assert (np.abs(back - weight) <= np.abs(weight) / 16 + scales[:, None].astype(np.float32) * 2**-10).all()
    assert np.abs(levels.astype(np.float32)).max(axis=0)[[0, 1, 3, 4]].min() > 0.99 * LARGEST
    assert is_float8(weight, levels, scales)
    assert not is_float8(weight, np.roll(levels, 1, axis=0), scales)
    assert not is_float8(weight, levels, scales * np.float16(2))


@pytest.mark.parametrize("ending", [FLOAT8, SCALES])
def test_verification_finds_a_wrong_weight(altered: Path, reference: Reference, ending: str) -> None:
    graph = load_engine(altered / "expert_1")
    name = next(name for name in graph.graph.initializers if name.endswith(ending))
    value = graph.graph.initializers[name]
    assert value.const_value is not None
    changed = value.const_value.numpy().copy()
    if ending == FLOAT8:
        changed.view(np.uint8)[0, 0] ^= 1  # the last bit of one number
    else:
        changed[0] *= np.float16(1.002)
    value.const_value = ir.tensor(changed, name=name)
    save_engine(graph, altered / "expert_1")
    sign(altered)
    failed = [row for row in verify_bundle(altered, reference) if not row.passed]
    assert failed[0].rung == "weights"
    assert name.removesuffix(ending) in str(failed[0].note)


def test_verification_finds_scales_of_activations_that_differ(altered: Path, reference: Reference) -> None:
    path = altered / "expert_0" / "model.onnx"
    graph = onnx.load(path, load_external_data=False)
    node = next(node for node in graph.graph.node if node.op_type == "DequantizeLinear" and len(node.input) == 3)
    graph.graph.initializer.append(numpy_helper.from_array(np.array(0.05, np.float16), "other"))
    node.input[1] = "other"
    onnx.save(graph, path)
    sign(altered)
    failed = [row for row in verify_bundle(altered, reference) if not row.passed]
    assert failed
    assert failed[0].rung in ("input", "weights")


def test_tensorrt_takes_every_product_in_fp8(exported: Path, altered: Path) -> None:
    options = BuildOptions(provider="tensorrt-rtx")
    report = build_plans(altered, options, ["expert_0"])
    plan = report.manifest.engine("expert_0").plan("tensorrt-rtx")
    assert plan is not None
    assert plan.architectures == ("sm_89", "sm_120")
    with pytest.raises(InputError, match="sm_86 has no FP8, which needs compute capability"):
        build_plans(altered, options.model_copy(update={"compute_capabilities": ("8.6",)}), ["expert_0"])

    manifest = load_manifest(altered)
    engine = manifest.engine("expert_1")
    assert engine.quantization is not None
    said = engine.quantization.model_copy(update={"quantized": (*engine.quantization.quantized, "another")})
    wrong = engine.model_copy(update={"quantization": said})
    engines = tuple(wrong if e.name == "expert_1" else e for e in manifest.engines)
    save_manifest(manifest.model_copy(update={"engines": engines}), altered)
    count = len(said.quantized)
    with pytest.raises(EngineError, match=f"of {count} products in FP8, {count - 1} are"):
        build_plans(altered, options, ["expert_1"])


def test_what_excludes_each_other(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="fp8 is for TensorRT, which builds no graphs of --fuse"):
        export_bundle(checkpoint, tmp_path / "bundle", precision="fp8", fuse=True)
