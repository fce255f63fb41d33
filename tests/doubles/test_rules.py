"""The doubles refuse what CUDA and TensorRT leave undefined; without that they would prove nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.manifest import load_manifest
from tests.doubles import GpuDouble
from tests.doubles.cuda import BrokenRule, CudaDouble

KIND = CudaDouble.cudaMemcpyKind
MODE = CudaDouble.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed


def done(answer: tuple[Any, ...]) -> Any:
    error, *results = answer
    assert int(error) == 0
    return results[0] if results else None


class Work:
    """A stream and two blocks of memory."""

    def __init__(self, cuda: CudaDouble) -> None:
        self.cuda = cuda
        self.stream = done(cuda.cudaStreamCreateWithFlags(1))
        self.one, self.two = (done(cuda.cudaMalloc(64)) for _ in range(2))

    def copy(self, target: int, source: int, size: int = 64, stream: Any = None) -> None:
        done(self.cuda.cudaMemcpyAsync(target, source, size, KIND.cudaMemcpyDeviceToDevice, stream or self.stream))

    def copy_in(self, target: int, array: np.ndarray) -> None:
        kind = KIND.cudaMemcpyHostToDevice
        done(self.cuda.cudaMemcpyAsync(target, array.ctypes.data, array.nbytes, kind, self.stream))

    def copy_out(self, source: int, array: np.ndarray) -> None:
        kind = KIND.cudaMemcpyDeviceToHost
        done(self.cuda.cudaMemcpyAsync(array.ctypes.data, source, array.nbytes, kind, self.stream))


@pytest.fixture
def work() -> Work:
    return Work(CudaDouble())


def test_work_is_done_in_order_and_a_host_array_may_change_at_once(work: Work) -> None:
    array, result = np.arange(64, dtype=np.uint8), np.zeros(64, np.uint8)
    work.copy_in(work.one, array)
    array.fill(7)
    work.copy(work.two, work.one)
    assert not result.any()
    work.copy_out(work.two, result)
    np.testing.assert_array_equal(result, np.arange(64))


def test_memory_is_not_zero_before_it_is_written(work: Work) -> None:
    result = np.zeros(16, np.float32)
    work.copy_out(work.one, result)
    assert np.isnan(result).all()


def test_a_full_gpu_is_an_error_that_is_remembered_once() -> None:
    cuda = CudaDouble(memory=100)
    assert cuda.cudaMalloc(101)[0].name == "cudaErrorMemoryAllocation"
    assert cuda.cudaGetLastError()[0].name == "cudaErrorMemoryAllocation"
    assert cuda.cudaGetLastError()[0].name == "cudaSuccess"


def use_after_free(work: Work) -> None:
    done(work.cuda.cudaFree(work.one))
    work.copy(work.two, work.one)


def use_beyond_the_end(work: Work) -> None:
    work.copy(work.two, work.one, 65)


def free_what_is_needed(work: Work) -> None:
    work.copy(work.two, work.one)
    done(work.cuda.cudaFree(work.two))


def read_what_another_stream_writes(work: Work) -> None:
    other, third = done(work.cuda.cudaStreamCreateWithFlags(1)), done(work.cuda.cudaMalloc(64))
    work.copy(work.two, work.one)
    work.copy(third, work.two, stream=other)


def write_what_another_stream_reads(work: Work) -> None:
    other, third = done(work.cuda.cudaStreamCreateWithFlags(1)), done(work.cuda.cudaMalloc(64))
    work.copy(work.two, work.one)
    work.copy(work.one, third, stream=other)


def use_in_a_thread_of_another_device(work: Work) -> None:
    done(work.cuda.cudaSetDevice(1))
    work.copy(work.two, work.one)


def capture_a_copy_from_the_host(work: Work) -> None:
    done(work.cuda.cudaStreamBeginCapture(work.stream, MODE))
    work.copy_in(work.one, np.zeros(64, np.uint8))


def wait_in_a_capture(work: Work) -> None:
    done(work.cuda.cudaStreamBeginCapture(work.stream, MODE))
    done(work.cuda.cudaStreamSynchronize(work.stream))


def captured(work: Work) -> Any:
    done(work.cuda.cudaStreamBeginCapture(work.stream, MODE))
    work.copy(work.two, work.one)
    return done(work.cuda.cudaGraphInstantiate(done(work.cuda.cudaStreamEndCapture(work.stream)), 0))


def launch_with_memory_that_was_freed(work: Work) -> None:
    graph = captured(work)
    done(work.cuda.cudaFree(work.two))
    done(work.cuda.cudaGraphLaunch(graph, work.stream))


def launch_after_the_end(work: Work) -> None:
    graph = captured(work)
    done(work.cuda.cudaGraphExecDestroy(graph))
    done(work.cuda.cudaGraphLaunch(graph, work.stream))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (use_after_free, "used after it was freed"),
        (use_beyond_the_end, "used beyond its end"),
        (free_what_is_needed, "freed while queued work needs it"),
        (read_what_another_stream_writes, "reads what another stream is writing"),
        (write_what_another_stream_reads, "writes what another stream is using"),
        (use_in_a_thread_of_another_device, "of device 0 in a thread whose device is 1"),
        (capture_a_copy_from_the_host, "memory that can be paged is captured"),
        (wait_in_a_capture, "synchronised while it captures"),
        (launch_with_memory_that_was_freed, "used after it was freed"),
        (launch_after_the_end, "launched after it was destroyed"),
    ],
)
def test_what_cuda_leaves_undefined_is_refused(break_it: Callable[[Work], None], message: str, work: Work) -> None:
    with pytest.raises(BrokenRule, match=message):
        break_it(work)


def test_a_graph_repeats_what_was_captured_and_runs_nothing_before(work: Work) -> None:
    graph, result = captured(work), np.zeros(64, np.uint8)
    work.copy_in(work.one, np.full(64, 5, np.uint8))
    done(work.cuda.cudaGraphLaunch(graph, work.stream))
    work.copy_out(work.two, result)
    assert (result == 5).all()


class Context:
    """The engine `solver_step` with tensors of the smallest size."""

    def __init__(self, gpu: GpuDouble, bundle: Path) -> None:
        self.cuda = gpu.cuda
        self.entry = load_manifest(bundle).engine("solver_step")
        self.stream = done(gpu.cuda.cudaStreamCreateWithFlags(1))
        engine = gpu.trt.Runtime(None).deserialize_cuda_engine((bundle / "solver_step" / "model.plan").read_bytes())
        self.context = engine.create_execution_context("USER_MANAGED")
        assert self.context.set_optimization_profile_async(0, int(self.stream))
        self.context.set_device_memory(done(gpu.cuda.cudaMalloc(engine.device_memory_size_v2)), 4096)
        self.set_shapes(1)
        for spec in (*self.entry.inputs, *self.entry.outputs):
            address = done(gpu.cuda.cudaMalloc(1 << 16))
            done(gpu.cuda.cudaMemsetAsync(address, 0, 1 << 16, self.stream))
            assert self.context.set_tensor_address(spec.name, address)

    def set_shapes(self, rows: int) -> None:
        for spec in self.entry.inputs:
            shape = tuple(
                {"batch": rows, "rows": rows, "latent_height": 6, "latent_width": 8}.get(a, a) for a in spec.shape
            )
            assert self.context.set_input_shape(spec.name, shape)

    def run(self) -> None:
        assert self.context.execute_async_v3(int(self.stream))

    def capture(self) -> Any:
        done(self.cuda.cudaStreamBeginCapture(self.stream, MODE))
        try:
            self.run()
        finally:
            graph = done(self.cuda.cudaStreamEndCapture(self.stream))
        return done(self.cuda.cudaGraphInstantiate(graph, 0))


@pytest.fixture
def context(gpu: GpuDouble, plan_bundle: Path) -> Context:
    return Context(gpu, plan_bundle)


def capture_at_once(context: Context) -> None:
    context.capture()


def capture_after_a_change_of_shape(context: Context) -> None:
    context.run()
    context.set_shapes(2)
    context.capture()


def capture_twice(context: Context) -> None:
    context.run()
    context.capture()
    context.capture()


def change_what_is_in_a_graph(context: Context) -> None:
    context.run()
    context.capture()
    context.set_shapes(2)


def overwrite_an_input(context: Context) -> None:
    context.context.set_tensor_address("next_latents", context.context.get_tensor_address("latents"))
    context.run()


def run_with_less_scratch_memory(context: Context) -> None:
    context.context.set_device_memory(context.context.get_tensor_address("latents"), 16)
    context.run()


def run_in_a_thread_of_another_device(context: Context) -> None:
    done(context.cuda.cudaSetDevice(1))
    context.run()


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (capture_at_once, "a capture right after a change of shape"),
        (capture_after_a_change_of_shape, "a capture right after a change of shape"),
        (capture_twice, "a context in two graphs"),
        (change_what_is_in_a_graph, "the shape of a context that is in a graph is changed"),
        (overwrite_an_input, "an output of solver_step overwrites its input"),
        (run_with_less_scratch_memory, "16 bytes of scratch memory and needs 4096"),
        (run_in_a_thread_of_another_device, "an engine of device 0 in a thread whose device is 1"),
    ],
)
def test_what_tensorrt_leaves_undefined_is_refused(
    break_it: Callable[[Context], None], message: str, context: Context
) -> None:
    with pytest.raises(BrokenRule, match=message):
        break_it(context)


def test_a_context_can_be_captured_again_after_its_graph_is_gone(context: Context) -> None:
    context.run()
    done(context.cuda.cudaGraphExecDestroy(context.capture()))
    context.capture()


def test_a_shape_outside_the_profile_is_refused_as_tensorrt_does(context: Context) -> None:
    assert not context.context.set_input_shape("latents", (33, 4, 6, 8))
