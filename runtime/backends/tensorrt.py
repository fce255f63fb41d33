"""Native TensorRT, and TensorRT for RTX, which has the same API. The loop never leaves the device.

- Inputs are bound by address: another engine's output is read in place.
- Outputs belong to whoever gets them: their memory is reused when the last reference to them is gone.
- One block of scratch memory serves all engines, since they run one after another, whichever thread asks.
- An engine runs as a CUDA graph when the same shapes and addresses come for the third time. Each graph has a context of
  its own, which ran once before it is captured; what cannot be captured is run without.
- Keys and values of answers keep their addresses and shapes from token to token, and prompts are padded to few lengths,
  so that the shapes and addresses do come again.
- Only `numpy()` waits for the device.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from runtime.backends.base import Backend, Session
from runtime.backends.cuda import Cuda, CudaTensor
from runtime.backends.cuda_key_values import CudaKeyValues, padded
from runtime.backends.values import DeviceTensor, KeyValues, Value, to_host
from runtime.errors import EngineError, InputError, MissingExtraError, one_line
from runtime.manifest import EngineEntry, FileEntry, PlanEntry, PlanProvider, TensorSpec, read_file
from runtime.plans import TENSORRT, usable_plan
from runtime.stopwatch import ResultT

GRAPHS_KEPT = 32
"""CUDA graphs per engine, one for each combination of shapes and addresses."""
PADDED_TO = 16
"""Prompts are padded to a multiple of this many tokens, so that graphs of one prompt serve others."""
SEEN_KEPT = 1024
"""Combinations that an engine remembers to have run once."""


class TrtBackend(Backend):
    """Engines as TensorRT plans on one GPU. Any thread may use it; their runs come one after another."""

    def __init__(self, name: PlanProvider, trt: Any, cuda: Cuda, *, graphs: bool) -> None:
        self.name = name
        self.trt = trt
        self.cuda = cuda
        self.graphs = graphs
        self.graph_launches = 0
        """Number of runs that were a CUDA graph's."""
        self._provider: PlanProvider = name
        self._sessions: list[TrtSession] = []
        self._scratch = (0, 0)
        with cuda.exclusive():
            self.runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))

    def files(self, entry: EngineEntry) -> tuple[FileEntry, ...]:
        """Returns no file: the graph and its weights are not read, and the plan is checked while it is."""
        return ()

    def load(self, bundle: Path, entry: EngineEntry) -> Session:
        """Loads the engine's plan.

        Raises:
            BundleError: there is none for this TensorRT and this GPU, or it was altered.
            EngineError: the plan cannot be loaded.
        """
        plan = usable_plan(bundle, entry, self._provider, self.trt.__version__, self.cuda.architecture)
        with self.cuda.exclusive():
            engine = self.runtime.deserialize_cuda_engine(read_file(bundle, plan.file))
            if engine is None:
                raise EngineError(f"engine {entry.name}: {self.name} cannot read {plan.file.path}; build it again")
            session = TrtSession(entry, plan, engine, self)
            self._sessions.append(session)
        return session

    def upload(self, array: np.ndarray) -> DeviceTensor:
        return CudaTensor.upload(self.cuda, array)

    def upload_rows(self, array: np.ndarray) -> list[Value]:
        if len(array) < 2:
            return list(array)
        whole = CudaTensor.upload(self.cuda, array)
        return [whole.row(index) for index in range(len(array))]

    def key_values(self, kv: tuple[Value, ...], mask: np.ndarray, limit: int) -> KeyValues:
        return CudaKeyValues(self.cuda, kv, mask, limit) if self.graphs else super().key_values(kv, mask, limit)

    def padded(self, length: int, limit: int) -> int:
        return padded(length, PADDED_TO, limit) if self.graphs else length

    def synchronize(self) -> None:
        with self.cuda.exclusive():
            self.cuda.synchronize()

    def timed(self, work: Callable[[], ResultT]) -> tuple[float, ResultT]:
        with self.cuda.exclusive():
            return self.cuda.timed(work)

    def scratch(self, size: int) -> tuple[int, int]:
        """Returns address and size of the scratch memory that all engines share; it has at least `size` bytes."""
        address, have = self._scratch
        if size > have:
            self.cuda.synchronize()
            for session in self._sessions:
                session.forget_graphs()  # they hold the old address
            if have:
                self.cuda.free(address)
            self._scratch = (0, 0)  # if the next line fails, there is none
            self._scratch = (self.cuda.allocate(size), size)
        return self._scratch

    def drop(self, session: TrtSession) -> None:
        """Forgets a closed session."""
        self._sessions.remove(session)

    def close(self) -> None:
        """Frees all engines and all memory of the device, that of outputs which still exist too."""
        if self.cuda.closed:
            return
        with self.cuda.exclusive():
            for session in list(self._sessions):
                session.close()
            del self.runtime
            self.cuda.close()


class _Key(NamedTuple):
    """What a graph is bound to."""

    profile: int
    shapes: tuple[tuple[int, ...], ...]
    """Of the inputs."""
    addresses: tuple[int, ...]
    """Of the inputs, then of the outputs."""


@dataclass
class _Binding:
    """A context that belongs to one graph."""

    context: Any
    graph: Any = None
    """None until it is captured."""
    can_be_captured: bool = True


class TrtSession(Session):
    """One plan: a context for each optimisation profile, and one for each graph."""

    def __init__(self, entry: EngineEntry, plan: PlanEntry, engine: Any, backend: TrtBackend) -> None:
        super().__init__(entry)
        self._plan = plan
        self._engine = engine
        self._backend = backend
        self._cuda = backend.cuda
        self._contexts: dict[int, Any] = {}
        """Contexts for runs outside graphs, by profile."""
        self._staged = {spec.name: _Buffer(backend.cuda) for spec in entry.inputs}
        """Where inputs from the host go."""
        self._output_shapes: dict[tuple[Any, ...], list[tuple[int, ...]]] = {}
        self._seen: OrderedDict[_Key, None] = OrderedDict()
        self._bindings: OrderedDict[_Key, _Binding] = OrderedDict()

    def _execute(self, feed: Mapping[str, Value]) -> dict[str, DeviceTensor]:
        with self._cuda.exclusive():
            profile = self._profile_of(feed)
            shapes = tuple(tuple(feed[spec.name].shape) for spec in self.entry.inputs)
            inputs = [self._address_of(spec, feed[spec.name]) for spec in self.entry.inputs]
            outputs = {
                spec.name: CudaTensor(self._cuda, shape, spec.dtype)
                for spec, shape in zip(self.entry.outputs, self._shapes_of_outputs(profile, shapes), strict=True)
            }
            addresses = (*inputs, *(tensor.address for tensor in outputs.values()))
            self._run(_Key(profile, shapes, addresses))
            return dict(outputs)

    def _profile_of(self, feed: Mapping[str, Value]) -> int:
        axes = {
            axis: size
            for spec in self.entry.inputs
            for axis, size in zip(spec.shape, feed[spec.name].shape, strict=True)
            if isinstance(axis, str)
        }
        for index, profile in enumerate(self._plan.profiles):
            if all(size in profile.axes[axis] for axis, size in axes.items()):
                return index
        sizes = ", ".join(f"{axis}={size}" for axis, size in axes.items())
        largest = ", ".join(f"{axis}={limit.max}" for axis, limit in self._plan.profiles[0].axes.items())
        raise InputError(
            f"engine {self.entry.name}: no optimisation profile of the plan covers {sizes} (the first goes up to "
            f"{largest}); build it with other --min and --max"
        )

    def _address_of(self, spec: TensorSpec, value: Value) -> int:
        """Returns where an input is; one that is not on this device is copied to memory that the session keeps.

        So is a row of a larger array: each has another address, and would need a graph of its own.
        """
        if isinstance(value, CudaTensor) and value.cuda is self._cuda:
            if value.whole is None:
                return value.address
            address, size = self._staged[spec.name].at_least(value.nbytes), value.nbytes
            self._cuda.copy_rows(address, size, value.address, size, size, 1)
            return address
        array = to_host(value)
        address = self._staged[spec.name].at_least(array.nbytes)
        self._cuda.copy_in(address, array)
        return address

    def _shapes_of_outputs(self, profile: int, shapes: tuple[tuple[int, ...], ...]) -> list[tuple[int, ...]]:
        key = (profile, shapes)
        if key not in self._output_shapes:
            context = self._context(profile)
            self._set_shapes(context, shapes)
            found = [tuple(context.get_tensor_shape(spec.name)) for spec in self.entry.outputs]
            self._output_shapes[key] = found
        return self._output_shapes[key]

    def _run(self, key: _Key) -> None:
        binding = self._bindings.get(key)
        if binding is None and key in self._seen:
            # TensorRT does work that it deferred when the shapes changed, which cannot be captured, so the context
            # runs once before.
            context = self._new_context(key.profile, for_graph=True)
            self._enqueue(context, key)
            self._bindings[key] = _Binding(context)
            self._drop_oldest()
            return
        if binding is None:
            if self._backend.graphs:
                self._seen[key] = None
                if len(self._seen) > SEEN_KEPT:
                    self._seen.popitem(last=False)
            self._enqueue(self._context(key.profile), key)
            return
        self._bindings.move_to_end(key)
        if binding.graph is None and binding.can_be_captured:
            binding.graph = self._capture(binding.context)
            binding.can_be_captured = binding.graph is not None
        if binding.graph is None:
            self._execute_in(binding.context)
            return
        self._cuda.launch(binding.graph)
        self._backend.graph_launches += 1

    def _context(self, profile: int) -> Any:
        """Returns the context for runs outside graphs."""
        if profile not in self._contexts:
            self._contexts[profile] = self._new_context(profile)
        return self._contexts[profile]

    def _new_context(self, profile: int, *, for_graph: bool = False) -> Any:
        trt = self._backend.trt
        memory = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if for_graph and hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
            # TensorRT for RTX compiles kernels for new shapes in the background, and runs slower ones until then: a
            # graph would keep those for good.
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(memory)
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            context = self._engine.create_execution_context(config)
        else:
            context = self._engine.create_execution_context(memory)
        if context is None or not context.set_optimization_profile_async(profile, self._stream):
            raise EngineError(f"engine {self.entry.name}: {self._backend.name} cannot make a context for it")
        return context

    @property
    def _stream(self) -> int:
        return int(self._cuda.stream)

    def _set_shapes(self, context: Any, shapes: tuple[tuple[int, ...], ...]) -> None:
        for spec, shape in zip(self.entry.inputs, shapes, strict=True):
            if not context.set_input_shape(spec.name, shape):
                raise EngineError(f"engine {self.entry.name}: {spec.name} of shape {shape} was refused")

    def _enqueue(self, context: Any, key: _Key) -> None:
        """Binds a context and runs it."""
        size = self._engine.get_device_memory_size_for_profile_v2(key.profile)
        context.set_device_memory(*self._backend.scratch(size))
        self._set_shapes(context, key.shapes)
        for spec, address in zip((*self.entry.inputs, *self.entry.outputs), key.addresses, strict=True):
            context.set_tensor_address(spec.name, address)
        self._execute_in(context)

    def _execute_in(self, context: Any) -> None:
        if not context.execute_async_v3(self._stream):
            raise EngineError(f"engine {self.entry.name} failed in {self._backend.name}")

    def _capture(self, context: Any) -> Any:
        """Returns a graph of a context that ran since its shapes changed; None if it cannot be captured."""
        # Only TensorRT for RTX has it: while it compiles kernels for new shapes, a capture is not possible.
        if hasattr(context, "is_stream_capturable") and not context.is_stream_capturable(self._stream):
            return None
        return self._cuda.capture(lambda: self._execute_in(context))

    def _drop_oldest(self) -> None:
        while len(self._bindings) > GRAPHS_KEPT:
            _, binding = self._bindings.popitem(last=False)
            self._destroy(binding)

    def forget_graphs(self) -> None:
        """Frees all graphs; they are captured again when needed."""
        for binding in self._bindings.values():
            self._destroy(binding)
        self._bindings.clear()

    def _destroy(self, binding: _Binding) -> None:
        if binding.graph is not None:
            self._cuda.synchronize()  # it may be running
            self._cuda.destroy(binding.graph)

    def refit(self, bundle: Path, entry: EngineEntry) -> None:
        graph = bundle / entry.files[0].path
        with self._cuda.exclusive():
            if not self._engine.refittable:
                raise EngineError(f"engine {self.entry.name}: its plan has fixed weights; build it with --refit")
            self._cuda.synchronize()  # no run may be under way
            self.forget_graphs()  # they may have weights in them
            self._seen.clear()
            if not refit(self._backend.trt, self._engine, graph):
                raise EngineError(f"engine {self.entry.name} takes no weights of {graph}; open the bundle again")

    def close(self) -> None:
        if self._cuda.closed or self._engine is None:
            return
        with self._cuda.exclusive():
            self._cuda.synchronize()
            self.forget_graphs()
            self._contexts.clear()
            self._engine = None
            for buffer in self._staged.values():
                buffer.close()
            self._backend.drop(self)


def refit(trt: Any, engine: Any, graph: Path) -> bool:
    """Gives an engine the weights of a graph like its own; returns whether all of them fit."""
    logger = trt.Logger(trt.Logger.ERROR)
    refitter = trt.Refitter(engine, logger)
    parser = trt.OnnxParserRefitter(refitter, logger)
    return bool(parser.refit_from_file(str(graph)) and refitter.refit_cuda_engine())


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
            self._cuda.release(self._address)
            self._address = 0


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
