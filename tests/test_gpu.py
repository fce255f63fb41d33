"""What only a GPU can show: `make test-gpu`. Elsewhere these are skipped; docs/gpu.md says what was run where."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from export.bundle import export_bundle
from export.plans.build import BuildOptions, build_plans
from export.reference import Reference
from export.verify import verify_bundle
from runtime.backends import open_backend
from runtime.backends.tensorrt import TrtBackend
from runtime.errors import LatteFlowError
from runtime.machine import find_gpu
from runtime.manifest import Precision, load_manifest
from runtime.pipeline import LatteFlowPipeline

GPU = find_gpu()
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(GPU is None, reason="needs an NVIDIA GPU and its driver")]


def native() -> str:
    """The TensorRT that runs on this GPU."""
    for name, module in (("tensorrt", "tensorrt"), ("tensorrt-rtx", "tensorrt_rtx")):
        if find_spec(module) is not None and not (name == "tensorrt-rtx" and GPU and GPU.architecture == "sm_90"):
            return name
    pytest.skip("needs tensorrt, or tensorrt-rtx on a GPU that it supports")


class TestCuda:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
    def test_onnx_runtime_on_cuda_passes_the_ladder(
        self, precision: Precision, checkpoint: Path, reference: Reference, tmp_path: Path
    ) -> None:
        export_bundle(checkpoint, tmp_path / "bundle", precision=precision, verify=False)
        assert [row for row in verify_bundle(tmp_path / "bundle", reference, "cuda") if not row.passed] == []

    def test_values_stay_on_the_device(self, bundle: Path) -> None:
        with LatteFlowPipeline.from_pretrained(bundle, "cuda") as pipe:
            tensor = pipe.backend.upload(np.zeros((1, 2), np.float32))
            assert tensor.value.device_name() == "cuda"  # type: ignore[attr-defined]

    def test_images_are_those_of_the_cpu(self, bundle: Path, pipe: LatteFlowPipeline) -> None:
        with LatteFlowPipeline.from_pretrained(bundle, "cuda") as there:
            drawn, expected = (p("a red star", seed=3, output_type="np").images for p in (there, pipe))
        assert np.abs(drawn.astype(int) - expected.astype(int)).max() <= 2


class TestNative:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
    @pytest.mark.parametrize("graphs", ["0", "1"])
    def test_native_tensorrt_passes_the_ladder(
        self, precision: Precision, graphs: str, checkpoint: Path, reference: Reference, tmp_path: Path
    ) -> None:
        name = native()
        bundle = tmp_path / "bundle"
        export_bundle(checkpoint, bundle, precision=precision, verify=False)
        build_plans(bundle, BuildOptions(provider=name))  # type: ignore[arg-type]
        assert all(plan.inspected for engine in load_manifest(bundle).engines for plan in engine.plans)
        rows = verify_bundle(bundle, reference, name, {"cuda_graphs": graphs})
        assert [row for row in rows if not row.passed] == []

    def test_the_same_call_twice_is_a_graph_and_the_same_image(self, checkpoint: Path, tmp_path: Path) -> None:
        name = native()
        export_bundle(checkpoint, tmp_path / "bundle", verify=False)
        build_plans(tmp_path / "bundle", BuildOptions(provider=name))  # type: ignore[arg-type]
        with LatteFlowPipeline.from_pretrained(tmp_path / "bundle", name) as pipe:
            assert isinstance(pipe.backend, TrtBackend)
            drawn = [pipe("a red star", seed=3, output_type="np").images for _ in range(3)]
            assert pipe.backend.graph_launches > 0
        np.testing.assert_array_equal(drawn[0], drawn[1])
        np.testing.assert_array_equal(drawn[0], drawn[2])


# ---- without one -------------------------------------------------------------------------------------


@pytest.mark.skipif(GPU is not None, reason="there is a GPU")
@pytest.mark.parametrize(
    ("provider", "message"),
    [
        ("cuda", "no CUDAExecutionProvider; install one that has it"),
        ("ort-tensorrt", "no TensorrtExecutionProvider"),
        ("tensorrt", "tensorrt is not installed; install it with: pip install"),
        ("tensorrt-rtx", "needs an NVIDIA GPU and its driver .*latte-flow doctor"),
    ],
)
def test_a_provider_that_cannot_work_here_says_so_in_one_line(provider: str, message: str) -> None:
    with pytest.raises(LatteFlowError, match=message) as caught:
        open_backend(provider)
    assert len(str(caught.value).splitlines()) == 1


USED_OF_TENSORRT = {
    "Runtime": ("deserialize_cuda_engine",),
    "ICudaEngine": (
        "create_execution_context",
        "create_runtime_config",
        "get_device_memory_size_for_profile_v2",
        "create_engine_inspector",
        "refittable",
        "create_serialization_config",
        "serialize_with_config",
    ),
    "IExecutionContext": (
        "set_optimization_profile_async",
        "set_device_memory",
        "set_input_shape",
        "set_tensor_address",
        "get_tensor_shape",
        "execute_async_v3",
    ),
    "ExecutionContextAllocationStrategy": ("USER_MANAGED",),
    "IRuntimeConfig": ("set_execution_context_allocation_strategy", "dynamic_shapes_kernel_specialization_strategy"),
    "DynamicShapesKernelSpecializationStrategy": ("EAGER",),
    "Refitter": ("refit_cuda_engine",),
    "OnnxParserRefitter": ("refit_from_file",),
    "SerializationFlag": ("EXCLUDE_WEIGHTS", "INCLUDE_REFIT"),
    "EngineInspector": ("get_engine_information", "execution_context"),
    "LayerInformationFormat": ("JSON",),
}
USED_OF_CUDA = (
    "cudaSetDevice",
    "cudaGetDeviceProperties",
    "cudaStreamCreateWithFlags",
    "cudaStreamNonBlocking",
    "cudaMalloc",
    "cudaFree",
    "cudaMemcpyAsync",
    "cudaMemcpy2DAsync",
    "cudaMemsetAsync",
    "cudaStreamSynchronize",
    "cudaGetLastError",
    "cudaStreamBeginCapture",
    "cudaStreamEndCapture",
    "cudaGraphInstantiate",
    "cudaGraphLaunch",
    "cudaEventCreate",
    "cudaEventRecord",
    "cudaEventSynchronize",
    "cudaEventElapsedTime",
    "cudaEventDestroy",
    "cudaGraphExecDestroy",
    "cudaGraphDestroy",
    "cudaStreamDestroy",
)


def test_what_the_native_backend_calls_exists() -> None:
    """It cannot run here; names that a new version has dropped can at least be told."""
    import tensorrt_rtx
    from cuda.bindings import runtime

    for owner, names in USED_OF_TENSORRT.items():
        assert [name for name in names if not hasattr(getattr(tensorrt_rtx, owner), name)] == []
    assert [name for name in USED_OF_CUDA if not hasattr(runtime, name)] == []


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(LatteFlowError, match="tensorrt-rtx has no option 'graphs'; there are cuda_graphs, device_id"):
        open_backend("tensorrt-rtx", {"graphs": "1"})
