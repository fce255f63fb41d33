"""What native TensorRT needs of CUDA: memory that is reused, one stream, graphs. Thin over cuda-python."""

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
        """Calls CUDA's function; its result.

        Raises:
            EngineError: it failed.
        """
        error, *results = getattr(self._api, function)(*arguments)
        if int(error):
            raise EngineError(f"CUDA: {function} failed with {error.name}")
        return results[0] if len(results) == 1 else None

    def allocate(self, size: int) -> int:
        """Memory of at least `size` bytes. What was released before comes again, so addresses, and graphs, recur."""
        rounded = max(ALIGNMENT, -(-size // ALIGNMENT) * ALIGNMENT)
        return self._free[rounded].pop() if self._free[rounded] else int(self.call("cudaMalloc", rounded))

    def release(self, address: int, size: int) -> None:
        """Keeps memory for who asks next."""
        self._free[max(ALIGNMENT, -(-size // ALIGNMENT) * ALIGNMENT)].append(address)

    def free(self, address: int) -> None:
        """Gives memory back to the device."""
        self.call("cudaFree", address)

    def copy_in(self, address: int, array: np.ndarray) -> None:
        """Host to device, in the stream's order; the array may be changed as soon as this returns."""
        if array.nbytes:
            kind = self._api.cudaMemcpyKind.cudaMemcpyHostToDevice
            contiguous = np.ascontiguousarray(array)
            self.call("cudaMemcpyAsync", address, contiguous.ctypes.data, array.nbytes, kind, self.stream)

    def copy_out(self, address: int, array: np.ndarray) -> None:
        """Device to host; waits for the stream."""
        if array.nbytes:
            kind = self._api.cudaMemcpyKind.cudaMemcpyDeviceToHost
            self.call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, self.stream)
        self.synchronize()

    def synchronize(self) -> None:
        """Waits until the stream has done all."""
        self.call("cudaStreamSynchronize", self.stream)

    def capture(self, work: Any) -> Any:
        """A graph of what `work()` puts into the stream, ready to launch."""
        self.call("cudaStreamBeginCapture", self.stream, self._api.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed)
        try:
            work()
        finally:
            graph = self.call("cudaStreamEndCapture", self.stream)
        executable = self.call("cudaGraphInstantiate", graph, 0)
        self.call("cudaGraphDestroy", graph)
        return executable

    def launch(self, graph: Any) -> None:
        """Puts a graph into the stream."""
        self.call("cudaGraphLaunch", graph, self.stream)

    def destroy(self, graph: Any) -> None:
        """Frees a graph."""
        self.call("cudaGraphExecDestroy", graph)

    def close(self) -> None:
        """Frees what was kept for reuse, and the stream."""
        self.synchronize()
        for addresses in self._free.values():
            for address in addresses:
                self.free(address)
        self._free.clear()
        self.call("cudaStreamDestroy", self.stream)


class CudaTensor(DeviceTensor):
    """An array in device memory; memory that it owns is reused once it is gone."""

    def __init__(self, cuda: Cuda, address: int, shape: tuple[int, ...], dtype: str, *, owned: bool = False) -> None:
        self.address = address
        self._cuda = cuda
        self._shape = shape
        self._dtype = dtype
        self._owned = owned

    @classmethod
    def upload(cls, cuda: Cuda, array: np.ndarray) -> CudaTensor:
        """A copy of a host array."""
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
