"""ONNX Runtime's backend: bfloat16, TF32, and the libraries of its TensorRT provider."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from runtime.backends import open_backend
from runtime.backends.onnxruntime import CPU, CUDA, TENSORRT, OrtBackend
from runtime.errors import EngineError, InputError, MissingExtraError
from runtime.manifest import EngineEntry, Precision, TensorSpec, file_entry


def bfloat16_engine(folder: Path, precision: Precision = "bf16") -> EngineEntry:
    """An engine that returns its input as it is, and in fp32."""
    info = [helper.make_tensor_value_info(name, TensorProto.BFLOAT16, ["rows", 3]) for name in ("x", "same")]
    wide = helper.make_tensor_value_info("wide", TensorProto.FLOAT, ["rows", 3])
    nodes = [
        helper.make_node("Identity", ["x"], ["same"]),
        helper.make_node("Cast", ["x"], ["wide"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(nodes, "same", [info[0]], [info[1], wide])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, folder / "model.onnx")
    return EngineEntry(
        name="expert_0",
        role="expert",
        precision=precision,
        opset=18,
        fused=False,
        files=(file_entry(folder, "model.onnx"),),
        inputs=(TensorSpec(name="x", dtype="bfloat16", shape=("rows", 3)),),
        outputs=(
            TensorSpec(name="same", dtype="bfloat16", shape=("rows", 3)),
            TensorSpec(name="wide", dtype="float32", shape=("rows", 3)),
        ),
    )


def test_bfloat16_goes_in_and_comes_out_from_the_host_and_from_the_device(tmp_path: Path) -> None:
    """NumPy's bfloat16 is not its own, and ONNX Runtime neither takes nor returns it."""
    backend = open_backend("cpu")
    values = np.array([[1, -2.5, 3e38], [0, 1e-30, np.inf]], ml_dtypes.bfloat16)
    with backend.load(tmp_path, bfloat16_engine(tmp_path)) as session:
        for feed in (values, backend.upload(values)):
            outputs = session.run({"x": feed})
            assert outputs["same"].dtype == "bfloat16"
            np.testing.assert_array_equal(outputs["same"].numpy(), values)
            np.testing.assert_array_equal(outputs["wide"].numpy(), values.astype(np.float32))
        empty = session.run({"x": backend.upload(values[:0])})
        assert empty["same"].numpy().shape == (0, 3)


@pytest.mark.parametrize(
    ("precision", "own", "expected"),
    [("fp32", {}, {"use_tf32": "0"}), ("fp32", {"use_tf32": "1"}, {"use_tf32": "1"}), ("fp16", {}, {})],
)
def test_an_fp32_engine_is_not_computed_in_tf32_on_cuda(
    precision: Precision,
    own: dict[str, str],
    expected: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """TF32, which is the provider's default, has errors of 1e-3: verification in fp32 would fail."""
    given: list[Any] = []

    def refuse(*_: object, providers: object) -> None:
        given.append(providers)
        raise RuntimeError("not here")

    monkeypatch.setattr(ort, "InferenceSession", refuse)
    backend = OrtBackend("cuda", {CUDA: own, CPU: {}}, "cuda")
    with pytest.raises(EngineError, match="not here"):
        backend.load(tmp_path, bfloat16_engine(tmp_path, precision))
    assert given == [[(CUDA, expected), (CPU, {})]]


@pytest.fixture
def with_tensorrt_provider(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], list[str]]:
    """Pretends that ONNX Runtime has its TensorRT provider, and that a TensorRT is installed, or none."""

    def install(version: str | None) -> list[str]:
        calls: list[str] = []
        monkeypatch.setattr(ort, "get_available_providers", lambda: [TENSORRT, CUDA, CPU])
        monkeypatch.setattr(ort, "preload_dlls", lambda: calls.append("CUDA"))
        module = ModuleType("tensorrt")
        module.__dict__["__version__"] = version
        monkeypatch.setitem(sys.modules, "tensorrt", module if version else None)
        return calls

    return install


def test_ort_tensorrt_loads_the_libraries_of_tensorrt_10(
    with_tensorrt_provider: Callable[[str | None], list[str]],
) -> None:
    calls = with_tensorrt_provider("10.16.1.11")
    assert open_backend("ort-tensorrt").name == "ort-tensorrt"
    assert calls == ["CUDA"]


@pytest.mark.parametrize(
    ("version", "message"),
    [(None, "ort-tensorrt needs TensorRT 10; install it"), ("11.4.0", "needs TensorRT 10, and this is 11.4.0")],
)
def test_ort_tensorrt_without_tensorrt_10_says_what_to_install(
    version: str | None, message: str, with_tensorrt_provider: Callable[[str | None], list[str]]
) -> None:
    with_tensorrt_provider(version)
    with pytest.raises(MissingExtraError, match=message) as caught:
        open_backend("ort-tensorrt")
    assert 'pip install "latte-flow[ort-tensorrt]"' in str(caught.value)


def test_the_threads_of_an_engine_are_a_provider_option(tmp_path: Path) -> None:
    values = np.zeros((2, 3), ml_dtypes.bfloat16)
    with open_backend("cpu", {"threads": "1"}).load(tmp_path, bfloat16_engine(tmp_path)) as session:
        assert session.run({"x": values})["wide"].numpy().shape == (2, 3)
    with pytest.raises(InputError, match="threads must be a whole number, got 'many'"):
        open_backend("cpu", {"threads": "many"})
