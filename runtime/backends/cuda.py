"""CUDA for native TensorRT: reused memory, one stream, and graphs. A thin layer over cuda-python."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np

from runtime.backends.base import DeviceTensor
from runtime.errors import EngineError

ALIGNMENT = 256


class Cuda:
    """One device and one stream on it."""

    def __init__(self, device: int = 0) -> None:
        from cuda.bindings import runtime

        self._api = runtime
        self.call("cudaSetDevice", device)
        properties = self.call("cudaGetDeviceProperties", device)
        self.architecture = f"sm_{properties.major}{properties.minor}"
        self.stream: Any = self.call("cudaStreamCreateWithFlags", runtime.cudaStreamNonBlocking)
        self._free: defaultdict[int, list[int]] = defaultdict(list)

    def call(self, function: str, *arguments: Any) -> Any:
        """Calls a function of CUDA's runtime API and returns its result.

        Raises:
            EngineError: it failed.
        """
        error, *results = getattr(self._api, function)(*arguments)
        if int(error):
            raise EngineError(f"CUDA: {function} failed with {error.name}")
        return results[0] if len(results) == 1 else None

    def allocate(self, size: int) -> int:
        """Returns the address of at least `size` bytes. Released memory is reused, so addresses and graphs recur."""
        rounded = max(ALIGNMENT, -(-size // ALIGNMENT) * ALIGNMENT)
        return self._free[rounded].pop() if self._free[rounded] else int(self.call("cudaMalloc", rounded))

    def release(self, address: int, size: int) -> None:
        """Keeps memory for the next call of `allocate`."""
        self._free[max(ALIGNMENT, -(-size // ALIGNMENT) * ALIGNMENT)].append(address)

    def free(self, address: int) -> None:
        """Returns memory to the device."""
        self.call("cudaFree", address)

    def copy_in(self, address: int, array: np.ndarray) -> None:
        """Copies from host to device, in stream order; the array may change as soon as this returns."""
        if array.nbytes:
            kind = self._api.cudaMemcpyKind.cudaMemcpyHostToDevice
            contiguous = np.ascontiguousarray(array)
            self.call("cudaMemcpyAsync", address, contiguous.ctypes.data, array.nbytes, kind, self.stream)

    def copy_out(self, address: int, array: np.ndarray) -> None:
        """Copies from device to host; waits for the stream."""
        if array.nbytes:
            kind = self._api.cudaMemcpyKind.cudaMemcpyDeviceToHost
            self.call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, self.stream)
        self.synchronize()

    def synchronize(self) -> None:
        """Waits until all work in the stream is done."""
        self.call("cudaStreamSynchronize", self.stream)

    def capture(self, work: Any) -> Any:
        """Captures the work that `work()` enqueues as a graph that is ready to launch."""
        self.call("cudaStreamBeginCapture", self.stream, self._api.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed)
        try:
            work()
        finally:
            graph = self.call("cudaStreamEndCapture", self.stream)
        executable = self.call("cudaGraphInstantiate", graph, 0)
        self.call("cudaGraphDestroy", graph)
        return executable

    def launch(self, graph: Any) -> None:
        """Enqueues a graph."""
        self.call("cudaGraphLaunch", graph, self.stream)

    def destroy(self, graph: Any) -> None:
        """Frees a graph."""
        self.call("cudaGraphExecDestroy", graph)

    def close(self) -> None:
        """Frees the memory kept for reuse, and the stream."""
        self.synchronize()
        for addresses in self._free.values():
            for address in addresses:
                self.free(address)
        self._free.clear()
        self.call("cudaStreamDestroy", self.stream)


class CudaTensor(DeviceTensor):
    """An array in device memory. If it owns the memory, the memory is reused after the array is deleted."""

    def __init__(self, cuda: Cuda, address: int, shape: tuple[int, ...], dtype: str, *, owned: bool = False) -> None:
        self.address = address
        self._cuda = cuda
        self._shape = shape
        self._dtype = dtype
        self._owned = owned

    @classmethod
    def upload(cls, cuda: Cuda, array: np.ndarray) -> CudaTensor:
        """Copies a host array to the device."""
        address = cuda.allocate(array.nbytes)
        cuda.copy_in(address, array)
        return cls(cuda, address, array.shape, str(array.dtype), owned=True)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def dtype(self) -> str:
        return self._dtype

    @property
    def nbytes(self) -> int:
        return int(np.prod(self._shape)) * np.dtype(self._dtype).itemsize

    def numpy(self) -> np.ndarray:
        array = np.empty(self._shape, self._dtype)
        self._cuda.copy_out(self.address, array)
        return array

    def __del__(self) -> None:
        if self._owned:
            self._cuda.release(self.address, self.nbytes)
