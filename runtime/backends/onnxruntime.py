"""ONNX Runtime. Values stay OrtValues between engines, without a detour through NumPy."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from runtime.backends.base import Backend, Session
from runtime.backends.values import DeviceTensor, Value, to_host
from runtime.errors import EngineError, InputError, MissingExtraError, one_line
from runtime.manifest import EngineEntry

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
    "tensor(uint8)": "uint8",
}


ONNX_BFLOAT16 = 16
"""`TensorProto.BFLOAT16`."""


class OrtTensor(DeviceTensor):
    """An OrtValue."""

    def __init__(self, value: Any) -> None:
        self.value = value

    @cached_property  # every feed is checked, and most of its tensors are the same as before
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape())

    @cached_property
    def dtype(self) -> str:
        return _DTYPES[self.value.data_type()]

    def numpy(self) -> np.ndarray:
        if self.dtype == "bfloat16":
            return _bfloat16_array(self.value)
        # A copy: OrtValue.numpy() is a view that dangles once the OrtValue is collected.
        return np.array(self.value.numpy())


def ort_value(array: np.ndarray, device: str = "cpu", device_id: int = 0) -> Any:
    """Returns an array as an OrtValue. ONNX Runtime does not know NumPy's bfloat16, so its bits are passed."""
    import onnxruntime as ort

    if str(array.dtype) != "bfloat16":
        return ort.OrtValue.ortvalue_from_numpy(array, device, device_id)
    value = ort.OrtValue.ortvalue_from_shape_and_type(array.shape, ONNX_BFLOAT16, device, device_id)
    if array.size:
        value.update_inplace(np.ascontiguousarray(array).view(np.uint16))
    return value


def _bfloat16_array(value: Any) -> np.ndarray:
    """Copies an OrtValue in bfloat16 to the host. A run has ended on the device when it returns."""
    bits = np.empty(value.shape(), np.uint16)
    if value.device_name() == "cpu":
        ctypes.memmove(bits.ctypes.data, value.data_ptr(), bits.nbytes)
    else:
        from cuda.bindings import runtime

        kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        (error,) = runtime.cudaMemcpy(bits.ctypes.data, value.data_ptr(), bits.nbytes, kind)
        if int(error):
            raise EngineError(f"CUDA: cudaMemcpy failed with {error.name}")
    return bits.view("bfloat16")


class OrtSession(Session):
    """One engine in ONNX Runtime."""

    def __init__(self, entry: EngineEntry, session: Any, device: str, device_id: int) -> None:
        super().__init__(entry)
        self._session = session
        self._device = device
        self._device_id = device_id
        self._outputs = [spec.name for spec in entry.outputs]

    def _execute(self, feed: Mapping[str, Value]) -> dict[str, DeviceTensor]:
        binding = self._session.io_binding()
        for name, value in feed.items():
            bound = value.value if isinstance(value, OrtTensor) else ort_value(to_host(value))
            binding.bind_ortvalue_input(name, bound)
        for name in self._outputs:
            binding.bind_output(name, self._device, self._device_id)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime raises its own classes, all direct children of Exception
            raise EngineError(f"engine {self.entry.name} failed: {one_line(error)}") from error
        return dict(zip(self._outputs, map(OrtTensor, binding.get_outputs()), strict=True))

    def close(self) -> None:
        self._session = None


class OrtBackend(Backend):
    """ONNX Runtime with a list of execution providers, of which the first must be usable."""

    def __init__(self, name: str, providers: Mapping[str, Mapping[str, str]], device: str, threads: int = 0) -> None:
        """Notes what sessions need.

        Args:
            threads: those of an engine's run; 0 for one per core.
        """
        self.name = name
        self._threads = threads
        self._providers = [(provider, dict(options)) for provider, options in providers.items()]
        self._device = device
        self._device_id = int(self._providers[0][1].get("device_id", "0"))

    def load(self, bundle: Path, entry: EngineEntry) -> Session:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self._threads
        # Experts run one after another; a thread pool that spins takes cores from the one that works.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        path = bundle / entry.files[0].path
        try:
            session = ort.InferenceSession(str(path), options, providers=self._providers_for(entry))
        except Exception as error:
            raise EngineError(f"engine {entry.name} cannot be loaded by ONNX Runtime: {one_line(error)}") from error
        # If a library of the provider is missing, ONNX Runtime falls back to the CPU with only a log line.
        first = self._providers[0][0]
        if first not in session.get_providers():
            raise EngineError(
                f"engine {entry.name}: ONNX Runtime cannot use its {first} on this machine: it needs a GPU and CUDA's "
                "libraries; run: latte-flow doctor"
            )
        return OrtSession(entry, session, self._device, self._device_id)

    def _providers_for(self, entry: EngineEntry) -> list[tuple[str, dict[str, str]]]:
        """Returns the providers with their options. An fp32 engine is not computed in TF32 unless the user says so."""
        if entry.precision != "fp32":
            return self._providers
        return [
            (provider, {"use_tf32": "0"} | options if provider == CUDA else options)
            for provider, options in self._providers
        ]

    def upload(self, array: np.ndarray) -> DeviceTensor:
        return OrtTensor(ort_value(array, self._device, self._device_id))


def open_cpu(options: Mapping[str, str]) -> Backend:
    """Opens ONNX Runtime on the CPU, with "threads" for each engine; one per core by default.

    Raises:
        InputError: that is not a number of threads.
    """
    own = {name: value for name, value in options.items() if name != "threads"}
    threads = options.get("threads", "0")
    if not (threads.isascii() and threads.isdigit()):
        raise InputError(f"the provider option threads must be a whole number, got {threads!r}")
    return _open("cpu", {CPU: own}, "cpu", int(threads))


def open_cuda(options: Mapping[str, str]) -> Backend:
    """Opens ONNX Runtime on CUDA. Latents, keys and values stay in GPU memory unless "io_binding" is 0."""
    own = {name: value for name, value in options.items() if name != "io_binding"}
    return _open("cuda", {CUDA: own, CPU: {}}, "cpu" if options.get("io_binding") == "0" else "cuda")


def open_ort_tensorrt(options: Mapping[str, str]) -> Backend:
    """Opens ONNX Runtime's TensorRT provider, which builds its own engines when a session is created.

    It needs the libraries of TensorRT 10.
    """
    device = {name: value for name, value in options.items() if name == "device_id"}
    return _open("ort-tensorrt", {TENSORRT: options, CUDA: device, CPU: {}}, "cuda")


def _open(name: str, providers: Mapping[str, Mapping[str, str]], device: str, threads: int = 0) -> Backend:
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise MissingExtraError(
            'ONNX Runtime is not installed; install it with: pip install "latte-flow[cpu]" (or [gpu])'
        ) from error
    first = next(iter(providers))
    if first not in ort.get_available_providers():
        raise MissingExtraError(
            f"this ONNX Runtime has no {first}; install one that has it, instead of onnxruntime: "
            'pip uninstall onnxruntime && pip install "latte-flow[gpu]"'
        )
    if first != CPU:
        ort.preload_dlls()  # finds CUDA's libraries in their Python packages
        import_module("ml_dtypes")  # NumPy's bfloat16
    if first == TENSORRT:
        _load_tensorrt()
    return OrtBackend(name, providers, device, threads)


def _load_tensorrt() -> None:
    """Loads TensorRT's libraries from its Python package: ONNX Runtime's provider links them and does not find them.

    Raises:
        MissingExtraError: TensorRT is missing, or of another major version than the one that is linked.
    """
    install = 'pip install "latte-flow[ort-tensorrt]"'
    try:
        version = str(import_module("tensorrt").__version__)
    except ImportError as error:
        raise MissingExtraError(f"ort-tensorrt needs TensorRT 10; install it with: {install}") from error
    if version.partition(".")[0] != "10":
        raise MissingExtraError(f"ort-tensorrt needs TensorRT 10, and this is {version}; install 10 with: {install}")
