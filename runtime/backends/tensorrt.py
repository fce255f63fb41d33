"""Native TensorRT, and TensorRT for RTX, which has the same API. The loop never leaves the device.

- Inputs are bound by address: another engine's output is read in place.
- Each engine has two sets of output buffers and alternates between them, because a step's output is the next step's
  input. An output is therefore valid until the engine's second next run.
- One block of scratch memory serves all engines, since they run one after another.
- From the second run with the same shapes and addresses, an engine runs as a CUDA graph.
- Only `numpy()` waits for the device.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from runtime.backends.base import Backend, DeviceTensor, Session, Value
from runtime.backends.cuda import Cuda, CudaTensor
from runtime.errors import EngineError, InputError, MissingExtraError, one_line
from runtime.manifest import EngineEntry, PlanEntry, PlanProvider, TensorSpec, check_file
from runtime.plans import TENSORRT, usable_plan

GRAPHS_KEPT = 64
"""CUDA graphs per engine, one for each combination of shapes and addresses."""


class TrtBackend(Backend):
    """Engines as TensorRT plans on one GPU."""

    recycles_outputs = True

    def __init__(self, name: PlanProvider, trt: Any, cuda: Cuda, *, graphs: bool) -> None:
        self.name = name
        self.trt = trt
        self.cuda = cuda
        self.graphs = graphs
        self.runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self._provider: PlanProvider = name
        self._sessions: list[TrtSession] = []
        self._scratch = (0, 0)

    def load(self, bundle: Path, entry: EngineEntry) -> Session:
        """Loads the engine's plan.

        Raises:
            BundleError: there is none for this TensorRT and this GPU.
            EngineError: the plan cannot be loaded.
        """
        plan = usable_plan(bundle, entry, self._provider, self.trt.__version__, self.cuda.architecture)
        engine = self.runtime.deserialize_cuda_engine(check_file(bundle, plan.file).read_bytes())
        if engine is None:
            raise EngineError(f"engine {entry.name}: {self.name} cannot read {plan.file.path}; build it again")
        session = TrtSession(entry, plan, engine, self)
        self._sessions.append(session)
        return session

    def upload(self, array: np.ndarray) -> DeviceTensor:
        return CudaTensor.upload(self.cuda, array)

    def scratch(self, size: int) -> tuple[int, int]:
        """Returns address and size of the scratch memory that all engines share; it has at least `size` bytes."""
        address, have = self._scratch
        if size > have:
            self.cuda.synchronize()
            for session in self._sessions:
                session.forget_graphs()  # they hold the old address
            if have:
                self.cuda.free(address)
            self._scratch = (int(self.cuda.call("cudaMalloc", size)), size)
        return self._scratch

    def drop(self, session: TrtSession) -> None:
        """Forgets a closed session."""
        self._sessions.remove(session)


class TrtSession(Session):
    """One plan, with a context for each optimisation profile and graphs by shape and address."""

    def __init__(self, entry: EngineEntry, plan: PlanEntry, engine: Any, backend: TrtBackend) -> None:
        super().__init__(entry)
        self._plan = plan
        self._engine = engine
        self._backend = backend
        self._contexts: dict[int, Any] = {}
        self._staged = {spec.name: _Buffer(backend.cuda) for spec in entry.inputs}
        self._outputs = [{spec.name: _Buffer(backend.cuda) for spec in entry.outputs} for _ in range(2)]
        self._turn = 0
        self._graphs: OrderedDict[tuple[Any, ...], Any] = OrderedDict()

    def _execute(self, feed: Mapping[str, Value]) -> dict[str, DeviceTensor]:
        axes = {
            axis: size
            for spec in self.entry.inputs
            for axis, size in zip(spec.shape, feed[spec.name].shape, strict=True)
            if isinstance(axis, str)
        }
        index = self._profile_of(axes)
        context = self._context(index)
        for spec in self.entry.inputs:
            self._bind_input(context, spec, feed[spec.name])
        self._turn = 1 - self._turn
        outputs: dict[str, DeviceTensor] = {}
        for spec in self.entry.outputs:
            shape = tuple(context.get_tensor_shape(spec.name))
            # Allocated once, for the largest size that the profile allows.
            limits = self._plan.profiles[index].axes
            largest = tuple(
                limits[axis].max if isinstance(axis, str) and axis in limits else size
                for axis, size in zip(spec.shape, shape, strict=True)
            )
            address = self._outputs[self._turn][spec.name].at_least(_size(largest, spec.dtype))
            context.set_tensor_address(spec.name, address)
            outputs[spec.name] = CudaTensor(self._backend.cuda, address, shape, spec.dtype)
        self._enqueue(context, index)
        return outputs

    def _profile_of(self, axes: Mapping[str, int]) -> int:
        for index, profile in enumerate(self._plan.profiles):
            if all(size in profile.axes[axis] for axis, size in axes.items()):
                return index
        sizes = ", ".join(f"{axis}={size}" for axis, size in axes.items())
        largest = ", ".join(f"{axis}={limit.max}" for axis, limit in self._plan.profiles[0].axes.items())
        raise InputError(
            f"engine {self.entry.name}: no optimisation profile of the plan covers {sizes} (the first goes up to "
            f"{largest}); build it with other --min and --max"
        )

    def _context(self, index: int) -> Any:
        trt = self._backend.trt
        if index not in self._contexts:
            context = self._engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            if context is None or not context.set_optimization_profile_async(index, self._stream):
                raise EngineError(f"engine {self.entry.name}: {self._backend.name} cannot make a context for it")
            self._contexts[index] = context
        context = self._contexts[index]
        context.set_device_memory(*self._backend.scratch(self._engine.device_memory_size_v2))
        return context

    @property
    def _stream(self) -> int:
        return int(self._backend.cuda.stream)

    def _bind_input(self, context: Any, spec: TensorSpec, value: Value) -> None:
        if isinstance(value, CudaTensor):
            address = value.address
        else:
            array = value if isinstance(value, np.ndarray) else value.numpy()
            address = self._staged[spec.name].at_least(array.nbytes)
            self._backend.cuda.copy_in(address, array)
        if not context.set_input_shape(spec.name, tuple(value.shape)):
            raise EngineError(f"engine {self.entry.name}: {spec.name} of shape {tuple(value.shape)} was refused")
        context.set_tensor_address(spec.name, address)

    def _enqueue(self, context: Any, index: int) -> None:
        def enqueue() -> None:
            if not context.execute_async_v3(self._stream):
                raise EngineError(f"engine {self.entry.name} failed in {self._backend.name}")

        if not self._backend.graphs:
            enqueue()
            return
        names = [spec.name for spec in (*self.entry.inputs, *self.entry.outputs)]
        key = (index, *((tuple(context.get_tensor_shape(n)), context.get_tensor_address(n)) for n in names))
        if key not in self._graphs:
            # The first run is not captured: TensorRT then does work that it deferred when the shapes changed.
            enqueue()
            self._graphs[key] = None
        else:
            if self._graphs[key] is None:
                self._graphs[key] = self._backend.cuda.capture(enqueue)
            self._backend.cuda.launch(self._graphs[key])
        self._graphs.move_to_end(key)
        while len(self._graphs) > GRAPHS_KEPT:
            _, graph = self._graphs.popitem(last=False)
            self._destroy(graph)

    def forget_graphs(self) -> None:
        """Frees all graphs; they are captured again when needed."""
        for graph in self._graphs.values():
            self._destroy(graph)
        self._graphs.clear()

    def _destroy(self, graph: Any) -> None:
        if graph is not None:
            self._backend.cuda.destroy(graph)

    def close(self) -> None:
        self._backend.cuda.synchronize()
        self.forget_graphs()
        self._contexts.clear()
        self._engine = None
        for buffer in (*self._staged.values(), *(b for outputs in self._outputs for b in outputs.values())):
            buffer.close()
        self._backend.drop(self)


class _Buffer:
    """Device memory that grows to the largest requested size and is kept."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._address = 0
        self._size = 0

    def at_least(self, size: int) -> int:
        """Returns the address of at least `size` bytes."""
        if size > self._size or not self._address:
            self.close()
            self._address, self._size = self._cuda.allocate(size), size
        return self._address

    def close(self) -> None:
        """Releases the memory for reuse."""
        if self._address:
            self._cuda.release(self._address, self._size)
            self._address = 0


def _size(shape: tuple[int, ...], dtype: str) -> int:
    return int(np.prod(shape)) * np.dtype(dtype).itemsize


def _open(name: PlanProvider, options: Mapping[str, str]) -> Backend:
    known = {"device_id", "cuda_graphs"}
    if unknown := sorted(set(options) - known):
        raise InputError(f"{name} has no option {unknown[0]!r}; there are {', '.join(sorted(known))}")
    library = TENSORRT[name]
    try:
        trt = import_module(library.module)
        import_module("ml_dtypes")  # NumPy's bfloat16
        cuda = Cuda(int(options.get("device_id", "0")))
    except ImportError as error:
        raise MissingExtraError(f"{name} is not installed; install it with: {library.install}") from error
    except EngineError as error:
        raise EngineError(
            f"{name} needs an NVIDIA GPU and its driver ({one_line(error)}); run: latte-flow doctor"
        ) from error
    return TrtBackend(name, trt, cuda, graphs=options.get("cuda_graphs", "1") != "0")


def open_tensorrt(options: Mapping[str, str]) -> Backend:
    """Opens native TensorRT on a GPU."""
    return _open("tensorrt", options)


def open_tensorrt_rtx(options: Mapping[str, str]) -> Backend:
    """Opens TensorRT for RTX on a GPU."""
    return _open("tensorrt-rtx", options)
