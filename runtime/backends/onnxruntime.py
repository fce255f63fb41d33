"""ONNX Runtime. Values stay OrtValues between engines, without a detour through NumPy."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from runtime.backends.base import Backend, DeviceTensor, Session, Value
from runtime.errors import EngineError, MissingExtraError, one_line
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
        # A copy: OrtValue.numpy() is a view that dangles once the OrtValue is collected.
        return np.array(self.value.numpy())


class OrtSession(Session):
    """One engine in ONNX Runtime."""

    def __init__(self, entry: EngineEntry, session: Any, device: str, device_id: int) -> None:
        super().__init__(entry)
        self._session = session
        self._device = device
        self._device_id = device_id
        self._outputs = [spec.name for spec in entry.outputs]

    def _execute(self, feed: Mapping[str, Value]) -> dict[str, DeviceTensor]:
        import onnxruntime as ort

        binding = self._session.io_binding()
        for name, value in feed.items():
            ort_value = value.value if isinstance(value, OrtTensor) else ort.OrtValue.ortvalue_from_numpy(value)
            binding.bind_ortvalue_input(name, ort_value)
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

    def __init__(self, name: str, providers: Mapping[str, Mapping[str, str]], device: str) -> None:
        self.name = name
        self._providers = [(provider, dict(options)) for provider, options in providers.items()]
        self._device = device
        self._device_id = int(self._providers[0][1].get("device_id", "0"))

    def load(self, bundle: Path, entry: EngineEntry) -> Session:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3
        # Experts run one after another; a thread pool that spins takes cores from the one that works.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        path = bundle / entry.files[0].path
        try:
            session = ort.InferenceSession(str(path), options, providers=self._providers)
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

    def upload(self, array: np.ndarray) -> DeviceTensor:
        import onnxruntime as ort

        return OrtTensor(ort.OrtValue.ortvalue_from_numpy(array, self._device, self._device_id))


def open_cpu(options: Mapping[str, str]) -> Backend:
    """Opens ONNX Runtime on the CPU."""
    return _open("cpu", {CPU: options}, "cpu")


def open_cuda(options: Mapping[str, str]) -> Backend:
    """Opens ONNX Runtime on CUDA. Latents, keys and values stay in GPU memory unless "io_binding" is 0."""
    own = {name: value for name, value in options.items() if name != "io_binding"}
    return _open("cuda", {CUDA: own, CPU: {}}, "cpu" if options.get("io_binding") == "0" else "cuda")


def open_ort_tensorrt(options: Mapping[str, str]) -> Backend:
    """Opens ONNX Runtime's TensorRT provider, which builds its own engines when a session is created."""
    device = {name: value for name, value in options.items() if name == "device_id"}
    return _open("ort-tensorrt", {TENSORRT: options, CUDA: device, CPU: {}}, "cuda")


def _open(name: str, providers: Mapping[str, Mapping[str, str]], device: str) -> Backend:
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
    return OrtBackend(name, providers, device)
