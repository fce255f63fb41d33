"""CUDA for native TensorRT: memory that is reused, one stream, and graphs. A thin layer over cuda-python.

All work goes through one stream, so memory can be given to new work while older work that uses it is still queued.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from heapq import heappop, heappush
from typing import Any

import numpy as np

from runtime.backends.values import DeviceTensor
from runtime.errors import EngineError
from runtime.stopwatch import ResultT

ALIGNMENT = 256


class Cuda:
    """One device and one stream on it. Several threads may use it, each inside `exclusive`."""

    def __init__(self, device: int = 0) -> None:
        from cuda.bindings import runtime

        self.device = device
        self.closed = False
        self._api = runtime
        self._lock = threading.RLock()
        self._sizes: dict[int, int] = {}
        """Bytes of all memory that was not returned to the device, by address."""
        self._free: defaultdict[int, list[int]] = defaultdict(list)
        """Addresses of memory that can be used again, as heaps by size."""
        self._released: deque[int] = deque()
        """Addresses that were released since the last allocation: tensors are deleted in any thread, at any time."""
        with self.exclusive():
            properties = self.call("cudaGetDeviceProperties", device)
            self.architecture = f"sm_{properties.major}{properties.minor}"
            self.stream: Any = self.call("cudaStreamCreateWithFlags", runtime.cudaStreamNonBlocking)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keeps other threads out, and makes the device that of the current thread: CUDA has one for each thread.

        Raises:
            EngineError: it was closed.
        """
        with self._lock:
            if self.closed:
                raise EngineError("the GPU's engines were closed; open the bundle again")
            self.call("cudaSetDevice", self.device)
            yield

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
        """Returns the address of at least `size` bytes.

        Of released memory that fits, that with the lowest address is taken: then equal calls get equal addresses, and
        graphs, which are bound to addresses, can be launched again.
        """
        self._collect()
        rounded = _rounded(size)
        if self._free[rounded]:
            return heappop(self._free[rounded])
        try:
            address = int(self.call("cudaMalloc", rounded))
        except EngineError:
            self._forget_error()
            self._return_unused()
            address = int(self.call("cudaMalloc", rounded))
        self._sizes[address] = rounded
        return address

    def release(self, address: int) -> None:
        """Keeps memory for the next call of `allocate`. Any thread may call it, without `exclusive`."""
        self._released.append(address)

    def free(self, address: int) -> None:
        """Returns memory to the device; no work that uses it may be queued."""
        self.call("cudaFree", address)
        del self._sizes[address]

    def _forget_error(self) -> None:
        """Makes an error that was dealt with no later call's: CUDA remembers the last one, and returns it once."""
        self._api.cudaGetLastError()

    def _collect(self) -> None:
        while self._released:
            address = self._released.popleft()
            heappush(self._free[self._sizes[address]], address)

    def _return_unused(self) -> None:
        """Returns the memory that is kept for reuse."""
        self.synchronize()
        for addresses in self._free.values():
            for address in addresses:
                self.free(address)
        self._free.clear()

    def copy_in(self, address: int, array: np.ndarray) -> None:
        """Copies from host to device, in stream order; the array may change as soon as this returns."""
        if array.nbytes:
            kind = self._api.cudaMemcpyKind.cudaMemcpyHostToDevice
            contiguous = np.ascontiguousarray(array)
            self.call("cudaMemcpyAsync", address, contiguous.ctypes.data, array.nbytes, kind, self.stream)

    def copy_rows(self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
        """Copies rows of `width` bytes on the device; each begins a pitch after the one before."""
        kind = self._api.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        arguments = (target, target_pitch, source, source_pitch, width, rows, kind, self.stream)
        self.call("cudaMemcpy2DAsync", *arguments)

    def clear(self, address: int, size: int) -> None:
        """Sets bytes to zero."""
        self.call("cudaMemsetAsync", address, 0, size, self.stream)

    def copy_out(self, address: int, array: np.ndarray) -> None:
        """Copies from device to host; waits for the stream."""
        if array.nbytes:
            kind = self._api.cudaMemcpyKind.cudaMemcpyDeviceToHost
            self.call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, self.stream)
        self.synchronize()

    def synchronize(self) -> None:
        """Waits until all work in the stream is done."""
        self.call("cudaStreamSynchronize", self.stream)

    def timed(self, work: Callable[[], ResultT]) -> tuple[float, ResultT]:
        """Runs some work; returns the seconds between two events in the stream, before and after it, and its result."""
        before, after = (self.call("cudaEventCreate") for _ in range(2))
        self.call("cudaEventRecord", before, self.stream)
        result = work()
        self.call("cudaEventRecord", after, self.stream)
        self.call("cudaEventSynchronize", after)
        milliseconds = self.call("cudaEventElapsedTime", before, after)
        for event in (before, after):
            self.call("cudaEventDestroy", event)
        return milliseconds / 1000, result

    def capture(self, work: Callable[[], None]) -> Any:
        """Captures what `work()` enqueues as a graph that is ready to launch; returns None if it cannot be captured."""
        self.call("cudaStreamBeginCapture", self.stream, self._api.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed)
        failed = False
        try:
            work()
        except EngineError:
            failed = True
        finally:
            # After a failure it reports that too, and ends the capture nevertheless.
            error, *graphs = self._api.cudaStreamEndCapture(self.stream)
        if failed or int(error):
            self._forget_error()
            for graph in graphs if not int(error) else ():
                self.call("cudaGraphDestroy", graph)
            return None
        executable = self.call("cudaGraphInstantiate", graphs[0], 0)
        self.call("cudaGraphDestroy", graphs[0])
        return executable

    def launch(self, graph: Any) -> None:
        """Enqueues a graph."""
        self.call("cudaGraphLaunch", graph, self.stream)

    def destroy(self, graph: Any) -> None:
        """Frees a graph."""
        self.call("cudaGraphExecDestroy", graph)

    def close(self) -> None:
        """Frees the stream and all memory, that of tensors which still exist too."""
        with self.exclusive():
            self.synchronize()
            for address in list(self._sizes):
                self.free(address)
            self.call("cudaStreamDestroy", self.stream)
            self.closed = True


class CudaTensor(DeviceTensor):
    """An array in device memory, which is reused after the array is deleted."""

    def __init__(self, cuda: Cuda, shape: tuple[int, ...], dtype: str) -> None:
        """Takes memory, whose content is undefined."""
        self.cuda = cuda
        self.whole: CudaTensor | None = None
        """The array that it is a row of, and whose memory it uses."""
        self._shape = shape
        self._dtype = dtype
        self.address = cuda.allocate(self.nbytes)

    @classmethod
    def upload(cls, cuda: Cuda, array: np.ndarray) -> CudaTensor:
        """Copies a host array to the device."""
        with cuda.exclusive():
            tensor = cls(cuda, array.shape, str(array.dtype))
            cuda.copy_in(tensor.address, array)
        return tensor

    def row(self, index: int) -> CudaTensor:
        """Returns `self[index]`, in the same memory."""
        row = CudaTensor.__new__(CudaTensor)
        row.cuda, row.whole, row._shape, row._dtype = self.cuda, self, self._shape[1:], self._dtype
        row.address = self.address + index * row.nbytes
        return row

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
        with self.cuda.exclusive():
            self.cuda.copy_out(self.address, array)
        return array

    def __del__(self) -> None:
        if self.whole is None and hasattr(self, "address"):
            self.cuda.release(self.address)


def _rounded(size: int) -> int:
    """Returns a size of at most an eighth more, of which there are few: memory for arrays that grow is reused too."""
    step = max(ALIGNMENT, 1 << max(0, size.bit_length() - 4))
    return max(ALIGNMENT, -(-size // step) * step)
