"""A double of CUDA's runtime API as cuda-python has it: addresses, streams, graphs, and the rules that CUDA documents.

Work of a stream is queued, and done when CUDA would have to: at a synchronisation, or a copy to the host. What CUDA
leaves undefined raises `BrokenRule`:

- memory is used after it was freed, beyond its end, or freed while work that needs it is queued;
- a stream reads or writes what another stream has yet to write, without a synchronisation between them;
- a thread uses a stream, memory or a graph of another device than its current one;
- a call that cannot be captured is made while a stream captures;
- anything is used after it was destroyed.

Addresses are never used twice, so that memory that was freed cannot be taken for new memory.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from types import SimpleNamespace
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
from cuda.bindings import runtime as real

ALIGNMENT = 256
P = ParamSpec("P")
ResultT = TypeVar("ResultT")


class BrokenRule(AssertionError):
    """What CUDA or TensorRT would answer with wrong numbers, a crash, or silence."""


@dataclass(eq=False)
class Block:
    """An allocation of device memory."""

    address: int
    size: int
    device: int
    data: np.ndarray
    freed: bool = False
    pinned: int = 0
    """Number of queued pieces of work that read or write it."""
    writer: Stream | None = None
    """The stream with queued work that writes it."""


@dataclass(frozen=True)
class Span:
    """Bytes in a block."""

    block: Block
    offset: int
    size: int

    @property
    def bytes(self) -> np.ndarray:
        """A view of them."""
        return self.block.data[self.offset : self.offset + self.size]

    def overlaps(self, other: Span) -> bool:
        """Whether they share a byte."""
        return (
            self.block is other.block
            and self.offset < other.offset + other.size
            and other.offset < self.offset + self.size
        )


@dataclass(eq=False)
class Work:
    """A piece of queued work."""

    name: str
    reads: list[Span]
    writes: list[Span]
    run: Callable[[], None]


@dataclass(eq=False)
class Captured(Work):
    """Work that is told when the graph that it is part of is destroyed."""

    on_destroy: Callable[[], None] = lambda: None


@dataclass(eq=False)
class Stream:
    """A stream. Its handle is a number, as TensorRT takes it."""

    number: int
    device: int
    queue: list[Work] = field(default_factory=list)
    capture: list[Work] | None = None
    destroyed: bool = False

    def __int__(self) -> int:
        return self.number


@dataclass(eq=False)
class EventDouble:
    """A place in a stream's work."""

    device: int
    time: float | None = None
    """When the work before it was done."""
    stream: Stream | None = None
    destroyed: bool = False


@dataclass(eq=False)
class Graph:
    """A captured graph, or one that can be launched."""

    work: list[Work]
    device: int
    destroyed: bool = False
    on_destroy: list[Callable[[], None]] = field(default_factory=list)


def one_at_a_time(
    method: Callable[Concatenate[CudaDouble, P], ResultT],
) -> Callable[Concatenate[CudaDouble, P], ResultT]:
    """Lets one thread at a time into a method that is no call of the API: those are locked in `__getattribute__`."""

    @wraps(method)
    def alone(self: CudaDouble, *args: P.args, **kwargs: P.kwargs) -> ResultT:
        with self._lock:
            return method(self, *args, **kwargs)

    return alone


class CudaDouble:
    """Stands for the module `cuda.bindings.runtime`.

    Args:
        devices: number of GPUs.
        memory: bytes of each GPU; an allocation beyond them fails as on a real one.
    """

    cudaStreamNonBlocking = real.cudaStreamNonBlocking
    cudaStreamCaptureMode = real.cudaStreamCaptureMode
    cudaMemcpyKind = real.cudaMemcpyKind

    def __init__(self, devices: int = 2, memory: int = 1 << 30) -> None:
        self.devices = devices
        self.memory = memory
        self.blocks: dict[int, Block] = {}
        self.streams: dict[int, Stream] = {}
        self.graphs: list[Graph] = []
        self.events: list[EventDouble] = []
        self.launches = 0
        self.copies: list[tuple[str, int]] = []
        """Kind and bytes of every copy, in order."""
        self.synchronisations = 0
        self._last_error = real.cudaError_t.cudaSuccess
        self._next = 1 << 40
        self._thread = threading.local()
        self._lock = threading.RLock()

    # ---- the API -------------------------------------------------------------------------------------

    def __getattribute__(self, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if not name.startswith("cuda") or not callable(value) or isinstance(value, type):
            return value

        def locked(*arguments: Any) -> Any:
            with self._lock:
                result = value(*arguments)
            if isinstance(result, real.cudaError_t):
                if name != "cudaGetLastError":
                    self._last_error = result
                return (result,)
            return (real.cudaError_t.cudaSuccess,) if result is None else (real.cudaError_t.cudaSuccess, result)

        return locked

    def cudaSetDevice(self, device: int) -> Any:
        if not 0 <= device < self.devices:
            return real.cudaError_t.cudaErrorInvalidDevice
        self._thread.device = device
        return None

    def cudaGetDeviceProperties(self, device: int) -> Any:
        return SimpleNamespace(major=9, minor=0) if device < self.devices else real.cudaError_t.cudaErrorInvalidDevice

    def cudaGetLastError(self) -> Any:
        error, self._last_error = self._last_error, real.cudaError_t.cudaSuccess
        return error

    def cudaMalloc(self, size: int) -> Any:
        used = sum(block.size for block in self.blocks.values() if block.device == self.device and not block.freed)
        if used + size > self.memory:
            return real.cudaError_t.cudaErrorMemoryAllocation
        block = Block(self._next, size, self.device, np.full(size, 0xFF, np.uint8))  # NaN, where it is read as a float
        self.blocks[block.address] = block
        self._next += -(-size // ALIGNMENT) * ALIGNMENT + ALIGNMENT
        return block.address

    def cudaFree(self, address: int) -> None:
        block = self.blocks.get(address)
        self._require(block is not None and not block.freed, f"{address:#x} is freed, and is no allocation")
        assert block is not None
        self._check_device(block.device, "memory is freed")
        self._require(not block.pinned, "memory is freed while queued work needs it")
        block.freed = True
        block.data = np.empty(0, np.uint8)

    def cudaStreamCreateWithFlags(self, flags: int) -> Stream:
        stream = Stream(len(self.streams) + 0x51000, self.device)
        self.streams[stream.number] = stream
        return stream

    def cudaStreamDestroy(self, stream: Stream) -> None:
        self._check_stream(stream)
        self._require(stream.capture is None, "a stream is destroyed while it captures")
        self._drain(stream)
        stream.destroyed = True

    def cudaStreamSynchronize(self, stream: Stream) -> None:
        self._check_stream(stream)
        self._require(stream.capture is None, "a stream is synchronised while it captures")
        self.synchronisations += 1
        self._drain(stream)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: Any, stream: Stream) -> None:
        self._check_stream(stream)
        self.copies.append((kind.name.removeprefix("cudaMemcpy"), size))
        if kind == real.cudaMemcpyKind.cudaMemcpyDeviceToDevice:
            written, read = self.span(target, size), self.span(source, size)
            self._require(not written.overlaps(read), "a copy's source and target overlap")
            self.enqueue(stream, Work("copy", [read], [written], lambda: _copy(written.bytes, read.bytes)))
            return
        # The host's memory can be paged: it is read before the call returns, or written after all that was queued.
        self._require(stream.capture is None, "a copy from or to memory that can be paged is captured")
        if kind == real.cudaMemcpyKind.cudaMemcpyHostToDevice:
            content = _host(source, size).copy()
            written = self.span(target, size)
            self.enqueue(stream, Work("copy in", [], [written], lambda: _copy(written.bytes, content)))
        else:
            read = self.span(source, size)
            self.enqueue(stream, Work("copy out", [read], [], lambda: _copy(_host(target, size), read.bytes)))
            self._drain(stream)

    def cudaMemcpy2DAsync(
        self,
        target: int,
        target_pitch: int,
        source: int,
        source_pitch: int,
        width: int,
        height: int,
        kind: Any,
        stream: Stream,
    ) -> None:
        self._check_stream(stream)
        self._require(
            kind == real.cudaMemcpyKind.cudaMemcpyDeviceToDevice, "a copy in 2-D that does not stay on the device"
        )
        self._require(width <= min(target_pitch, source_pitch), "the rows of a copy overlap")
        self.copies.append(("2D", width * height))
        written = self.span(target, target_pitch * (height - 1) + width)
        read = self.span(source, source_pitch * (height - 1) + width)

        def copy() -> None:
            for row in range(height):
                part = read.bytes[row * source_pitch : row * source_pitch + width]
                written.bytes[row * target_pitch : row * target_pitch + width] = part

        self.enqueue(stream, Work("copy in 2-D", [read], [written], copy))

    def cudaMemsetAsync(self, target: int, value: int, size: int, stream: Stream) -> None:
        self._check_stream(stream)
        written = self.span(target, size)
        self.enqueue(stream, Work("set", [], [written], lambda: written.bytes.fill(value)))

    def cudaStreamBeginCapture(self, stream: Stream, mode: Any) -> None:
        self._check_stream(stream)
        self._require(stream.capture is None, "a stream that captures is captured again")
        stream.capture = []

    def cudaStreamEndCapture(self, stream: Stream) -> Graph:
        self._check_stream(stream)
        self._require(stream.capture is not None, "a capture is ended that did not begin")
        assert stream.capture is not None
        graph = Graph(stream.capture, stream.device)
        stream.capture = None
        self.graphs.append(graph)
        return graph

    def cudaGraphInstantiate(self, graph: Graph, flags: int) -> Graph:
        self._require(not graph.destroyed, "a graph is used after it was destroyed")
        executable = Graph(graph.work, graph.device)
        executable.on_destroy = [work.on_destroy for work in graph.work if isinstance(work, Captured)]
        self.graphs.append(executable)
        return executable

    def cudaGraphDestroy(self, graph: Graph) -> None:
        self._require(not graph.destroyed, "a graph is destroyed twice")
        graph.destroyed = True

    def cudaGraphExecDestroy(self, graph: Graph) -> None:
        self._require(not graph.destroyed, "a graph is destroyed twice")
        graph.destroyed = True
        for forget in graph.on_destroy:
            forget()

    def cudaEventCreate(self) -> EventDouble:
        event = EventDouble(self.device)
        self.events.append(event)
        return event

    def cudaEventRecord(self, event: EventDouble, stream: Stream) -> None:
        self._check_stream(stream)
        self._require(not event.destroyed, "an event is used after it was destroyed")
        self._require(event.device == stream.device, "an event is recorded on another device")
        event.stream, event.time = stream, None

        def happen() -> None:
            event.time = time.perf_counter()

        self.enqueue(stream, Work("event", [], [], happen))

    def cudaEventSynchronize(self, event: EventDouble) -> None:
        self._require(event.stream is not None, "an event is awaited that was not recorded")
        assert event.stream is not None
        self.synchronisations += 1
        self._drain(event.stream)

    def cudaEventElapsedTime(self, before: EventDouble, after: EventDouble) -> float:
        self._require(before.time is not None and after.time is not None, "time between events that did not happen")
        assert before.time is not None
        assert after.time is not None
        return 1000 * (after.time - before.time)

    def cudaEventDestroy(self, event: EventDouble) -> None:
        self._require(not event.destroyed, "an event is destroyed twice")
        event.destroyed = True

    def cudaGraphLaunch(self, graph: Graph, stream: Stream) -> None:
        self._check_stream(stream)
        self._require(not graph.destroyed, "a graph is launched after it was destroyed")
        self._require(graph.device == stream.device, "a graph is launched on another device")
        self.launches += 1
        for work in graph.work:
            self.enqueue(stream, work)

    # ---- for the double of TensorRT and for tests ------------------------------------------------------

    @property
    def device(self) -> int:
        """The current thread's device, 0 unless it was set."""
        return getattr(self._thread, "device", 0)

    @one_at_a_time
    def span(self, address: int, size: int) -> Span:
        """Returns the bytes at an address; raises unless they are memory of the current device."""
        start = max((start for start in self.blocks if start <= address), default=None)
        self._require(start is not None, f"{address:#x} is no device memory")
        assert start is not None
        block = self.blocks[start]
        self._require(not block.freed, "memory is used after it was freed")
        self._require(address + size <= start + block.size, "memory is used beyond its end")
        self._check_device(block.device, "memory is used")
        return Span(block, address - start, size)

    @one_at_a_time
    def enqueue(self, stream: Stream, work: Work) -> None:
        """Queues work, or captures it."""
        for span in (*work.reads, *work.writes):
            self._require(not span.block.freed, f"{work.name}: memory is used after it was freed")
        if stream.capture is not None:
            stream.capture.append(work)
            return
        for span in work.reads:
            writer = span.block.writer
            self._require(writer in (None, stream), f"{work.name} reads what another stream is writing")
        for span in work.writes:
            others = [queued for other in self.streams.values() if other is not stream for queued in other.queue]
            clash = any(span.overlaps(used) for other in others for used in (*other.reads, *other.writes))
            self._require(not clash, f"{work.name} writes what another stream is using")
            span.block.writer = stream
        for span in (*work.reads, *work.writes):
            span.block.pinned += 1
        stream.queue.append(work)

    def stream_of(self, handle: int) -> Stream:
        """Returns the stream of a handle."""
        self._require(handle in self.streams, "this is no stream")
        stream = self.streams[handle]
        self._check_stream(stream)
        return stream

    @one_at_a_time
    def alive(self) -> dict[str, int]:
        """Counts what was not freed or destroyed."""
        return {
            "blocks": sum(not block.freed for block in self.blocks.values()),
            "streams": sum(not stream.destroyed for stream in self.streams.values()),
            "graphs": sum(not graph.destroyed for graph in self.graphs),
            "events": sum(not event.destroyed for event in self.events),
        }

    @one_at_a_time
    def is_queued(self, name: str) -> bool:
        """Returns whether work of this name is queued in any stream."""
        return any(work.name == name for stream in self.streams.values() for work in stream.queue)

    def _drain(self, stream: Stream) -> None:
        for work in stream.queue:
            work.run()
            for span in (*work.reads, *work.writes):
                span.block.pinned -= 1
            for span in work.writes:
                span.block.writer = None
        stream.queue.clear()

    def _check_stream(self, stream: Stream) -> None:
        self._require(not stream.destroyed, "a stream is used after it was destroyed")
        self._check_device(stream.device, "a stream is used")

    def _check_device(self, device: int, what: str) -> None:
        self._require(self.device == device, f"{what} of device {device} in a thread whose device is {self.device}")

    def _require(self, kept: bool, rule: str) -> None:
        if not kept:
            raise BrokenRule(rule)


def _host(address: int, size: int) -> np.ndarray:
    return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8)), (size,))


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    target[:] = source
