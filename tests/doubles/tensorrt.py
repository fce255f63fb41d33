"""A double of TensorRT's runtime, over the double of CUDA. ONNX Runtime computes what the engines put out.

It keeps the documented rules of contexts; what breaks one raises `BrokenRule`:

- an enqueue has a profile, the shapes and addresses of all tensors, and scratch memory of the right size and alignment;
- outputs overlap neither inputs nor each other;
- a capture does not follow a change of shape or profile: an enqueue comes between;
- a context is in one graph at most, and its shapes do not change while it is in one;
- engines and contexts are used in threads whose device is theirs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort

from runtime.manifest import EngineEntry, PlanEntry, load_manifest
from tests.doubles.cuda import ALIGNMENT, BrokenRule, Captured, CudaDouble, Span, Stream

SCRATCH = 4096
"""Bytes of scratch memory of an engine's first profile; each further one takes more."""


class TensorRTDouble:
    """Stands for the module `tensorrt`. It knows the plans of the bundles that were shown to it."""

    SerializationFlag = SimpleNamespace(EXCLUDE_WEIGHTS="EXCLUDE_WEIGHTS", INCLUDE_REFIT="INCLUDE_REFIT")
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="USER_MANAGED")

    class Logger:
        """Logs nothing."""

        ERROR = 2

        def __init__(self, severity: int) -> None:
            self.severity = severity

    def __init__(self, cuda: CudaDouble, version: str) -> None:
        self.cuda = cuda
        self.__version__ = version
        self.capturable = True
        """Whether engines can be captured at all."""
        self.refittable = True
        """Whether the weights of engines can be replaced."""
        self.contexts: list[ContextDouble] = []
        self.enqueued: list[str] = []
        """Names of the engines that ran outside a graph, in order."""
        self._plans: dict[str, tuple[Path, EngineEntry, PlanEntry]] = {}
        self._sessions: dict[Path, Any] = {}

    def show(self, bundle: Path) -> None:
        """Makes the plans of a bundle readable."""
        for entry in load_manifest(bundle).engines:
            self.show_engine(bundle, entry)

    def show_engine(self, bundle: Path, entry: EngineEntry) -> None:
        """Makes the plans of an engine readable."""
        for plan in entry.plans:
            self._plans[plan.file.sha256] = (bundle, entry, plan)

    def Runtime(self, logger: Logger) -> Any:
        return SimpleNamespace(deserialize_cuda_engine=self._deserialize)

    def _deserialize(self, content: bytes) -> EngineDouble | None:
        known = self._plans.get(hashlib.sha256(content).hexdigest())
        if known is None:
            return None
        bundle, entry, plan = known
        return EngineDouble(self, entry, plan, self.session_of(bundle / entry.files[0].path))

    def Refitter(self, engine: EngineDouble, logger: Logger) -> RefitterDouble:
        return RefitterDouble(engine)

    def OnnxParserRefitter(self, refitter: RefitterDouble, logger: Logger) -> Any:
        return SimpleNamespace(refit_from_file=refitter.take)

    def session_of(self, path: Path) -> Any:
        """Returns the session that computes a graph."""
        if path not in self._sessions:
            options = ort.SessionOptions()
            options.intra_op_num_threads = 1
            options.log_severity_level = 3
            self._sessions[path] = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return self._sessions[path]


class EngineDouble:
    """Stands for an `ICudaEngine`."""

    def __init__(self, trt: TensorRTDouble, entry: EngineEntry, plan: PlanEntry, session: Any) -> None:
        self.trt = trt
        self.entry = entry
        self.plan = plan
        self.device = trt.cuda.device
        self.session = session
        self._shapes: dict[str, dict[str, tuple[int, ...]]] = {}

    @property
    def refittable(self) -> bool:
        return self.trt.refittable

    @property
    def device_memory_size_v2(self) -> int:
        return max(map(self.get_device_memory_size_for_profile_v2, range(len(self.plan.profiles))))

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return SCRATCH * (profile + 1)

    def create_runtime_config(self) -> RuntimeConfigDouble:
        return RuntimeConfigDouble()

    def create_execution_context(self, how: str | RuntimeConfigDouble) -> ContextDouble:
        self.check_device()
        memory = how.memory if isinstance(how, RuntimeConfigDouble) else how
        if memory != "USER_MANAGED":
            raise BrokenRule("scratch memory is given to a context that takes its own")
        context = ContextDouble(self, how)
        self.trt.contexts.append(context)
        return context

    def check_device(self) -> None:
        """Raises if the current thread's device is another one."""
        if self.trt.cuda.device != self.device:
            raise BrokenRule(f"an engine of device {self.device} in a thread whose device is {self.trt.cuda.device}")

    def compute(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs the engine's graph."""
        names = [spec.name for spec in self.entry.outputs]
        return dict(zip(names, self.session.run(names, dict(inputs)), strict=True))

    def output_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the outputs for those of the inputs, from a run on zeros."""
        key = json.dumps(shapes, sort_keys=True)
        if key not in self._shapes:
            zeros = {spec.name: np.zeros(shapes[spec.name], spec.dtype) for spec in self.entry.inputs}
            self._shapes[key] = {name: value.shape for name, value in self.compute(zeros).items()}
        return self._shapes[key]


class RefitterDouble:
    """Stands for an `IRefitter`, and for the parser that gives it the weights of a graph."""

    def __init__(self, engine: EngineDouble) -> None:
        self._engine = engine
        self._session: Any = None

    def take(self, path: str) -> bool:
        session = self._engine.trt.session_of(Path(path))
        fits = _signature(session) == _signature(self._engine.session)
        self._session = session if fits else None
        return fits

    def refit_cuda_engine(self) -> bool:
        engine = self._engine
        engine.check_device()
        if not engine.refittable:
            return False
        if engine.trt.cuda.is_queued(engine.entry.name):
            raise BrokenRule("weights are replaced while runs of the engine are queued")
        if any(context.is_in_graph for context in engine.trt.contexts if context.engine is engine):
            raise BrokenRule("weights are replaced that a graph may have in it")
        engine.session = self._session
        return True


def _signature(session: Any) -> list[tuple[str, list[Any], str]]:
    return [(value.name, value.shape, value.type) for value in (*session.get_inputs(), *session.get_outputs())]


class RuntimeConfigDouble:
    """Stands for an `IRuntimeConfig`."""

    memory = "STATIC"
    dynamic_shapes_kernel_specialization_strategy = "LAZY"

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.memory = strategy


class ContextDouble:
    """Stands for an `IExecutionContext`."""

    def __init__(self, engine: EngineDouble, how: str | RuntimeConfigDouble) -> None:
        self.engine = engine
        self.how = how
        """What it was made with."""
        self._cuda = engine.trt.cuda
        self._profile: int | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._memory = (0, 0)
        self._is_settled = False
        """Whether an enqueue followed the last change of shape or profile."""
        self.captures = 0
        """How often it was captured."""
        self._graphs = 0
        """Number of graphs that it is in."""

    @property
    def is_in_graph(self) -> bool:
        """Whether a graph has it."""
        return bool(self._graphs)

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.engine.check_device()
        self._cuda.stream_of(stream)
        if not 0 <= profile < len(self.engine.plan.profiles):
            return False
        if profile != self._profile:
            self._change("profile")
            self._shapes.clear()
            self._profile = profile
        return True

    def set_device_memory(self, address: int, size: int) -> None:
        self._memory = (address, size)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if self._profile is None:
            raise BrokenRule("a shape is set before the profile")
        spec = self.engine.entry.input(name)
        limits = self.engine.plan.profiles[self._profile].axes
        fits = len(shape) == len(spec.shape) and all(
            size in limits[axis] if isinstance(axis, str) else size == axis
            for axis, size in zip(spec.shape, shape, strict=True)
        )
        if fits and self._shapes.get(name) != shape:
            self._change("shape")
            self._shapes[name] = shape
        return fits

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self._shapes:
            return self._shapes[name]
        return self.engine.output_shapes(self._shapes)[name]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def get_tensor_address(self, name: str) -> int:
        return self._addresses[name]

    def execute_async_v3(self, handle: int) -> bool:
        self.engine.check_device()
        stream = self._cuda.stream_of(handle)
        if stream.capture is not None:
            return self._capture(stream)
        if self._graphs:
            raise BrokenRule("a context that is in a graph is enqueued")
        self.engine.trt.enqueued.append(self.engine.entry.name)
        self._cuda.enqueue(stream, self._work())
        self._is_settled = True
        return True

    def _capture(self, stream: Stream) -> bool:
        if not self._is_settled:
            raise BrokenRule("a capture right after a change of shape or profile")
        if self._graphs:
            raise BrokenRule("a context in two graphs")
        if not self.engine.trt.capturable:
            return False
        work = self._work()
        self._cuda.enqueue(stream, work)
        self._graphs += 1
        self.captures += 1
        work.on_destroy = self._leave_graph
        return True

    def _leave_graph(self) -> None:
        self._graphs -= 1

    def _change(self, what: str) -> None:
        if self._graphs:
            raise BrokenRule(f"the {what} of a context that is in a graph is changed")
        self._is_settled = False

    def _work(self) -> Captured:
        entry = self.engine.entry
        if self._profile is None or set(self._shapes) != {spec.name for spec in entry.inputs}:
            raise BrokenRule("an enqueue without a profile, or without the shapes of all inputs")
        shapes = self._shapes | self.engine.output_shapes(self._shapes)
        spans: dict[str, Span] = {}
        for spec in (*entry.inputs, *entry.outputs):
            address = self._addresses.get(spec.name, 0)
            size = int(np.prod(shapes[spec.name])) * np.dtype(spec.dtype).itemsize
            if not address or address % ALIGNMENT:
                raise BrokenRule(f"{spec.name} of {entry.name} has no address, or one that is not aligned")
            spans[spec.name] = self._cuda.span(address, size)
        written = [spans[spec.name] for spec in entry.outputs]
        if any(a.overlaps(b) for i, a in enumerate(written) for b in (*written[:i], *written[i + 1 :])):
            raise BrokenRule(f"two outputs of {entry.name} overlap")
        if any(spans[spec.name].overlaps(output) for spec in entry.inputs for output in written):
            raise BrokenRule(f"an output of {entry.name} overwrites its input")
        needed = self.engine.get_device_memory_size_for_profile_v2(self._profile)
        if self._memory[1] < needed or self._memory[0] % ALIGNMENT:
            raise BrokenRule(f"{entry.name} has {self._memory[1]} bytes of scratch memory and needs {needed}")
        scratch = self._cuda.span(self._memory[0], needed)

        def run() -> None:
            feed = {
                spec.name: spans[spec.name].bytes.view(spec.dtype).reshape(shapes[spec.name]) for spec in entry.inputs
            }
            scratch.bytes.fill(0xAA)
            for name, value in self.engine.compute(feed).items():
                spans[name].bytes[:] = np.ascontiguousarray(value).reshape(-1).view(np.uint8)

        return Captured(entry.name, [spans[spec.name] for spec in entry.inputs], [*written, scratch], run)
