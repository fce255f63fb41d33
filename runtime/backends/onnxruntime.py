"""ONNX Runtime. Values stay OrtValues between engines; nothing goes through NumPy on the way."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runtime.backends.base import Backend, DeviceTensor, Session, Value
from runtime.errors import EngineError, MissingExtraError, one_line
from runtime.manifest import EngineEntry

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

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape())

    @property
    def dtype(self) -> str:
        return _DTYPES[self.value.data_type()]

    def numpy(self) -> np.ndarray:
        # A copy: OrtValue.numpy() is a view that dangles once the OrtValue is collected.
        return np.array(self.value.numpy())


class OrtSession(Session):
    """One engine in ONNX Runtime."""

    def __init__(self, entry: EngineEntry, session: Any, device: str) -> None:
        super().__init__(entry)
        self._session = session
        self._device = device
        self._outputs = [spec.name for spec in entry.outputs]

    def _execute(self, feed: Mapping[str, Value]) -> dict[str, DeviceTensor]:
        import onnxruntime as ort

        binding = self._session.io_binding()
        for name, value in feed.items():
            ort_value = value.value if isinstance(value, OrtTensor) else ort.OrtValue.ortvalue_from_numpy(value)
            binding.bind_ortvalue_input(name, ort_value)
        for name in self._outputs:
            binding.bind_output(name, self._device)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime raises its own classes, all direct children of Exception
            raise EngineError(f"engine {self.entry.name} failed: {one_line(error)}") from error
        return dict(zip(self._outputs, map(OrtTensor, binding.get_outputs()), strict=True))

    def close(self) -> None:
        self._session = None


class OrtBackend(Backend):
    """ONNX Runtime with a list of execution providers."""

    def __init__(self, name: str, providers: list[str], device: str, threads: int = 0) -> None:
        self.name = name
        self._providers = providers
        self._device = device
        self._threads = threads

    def load(self, bundle: Path, entry: EngineEntry) -> Session:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self._threads
        # Experts run one after another; a pool that spins while another works takes its cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        path = bundle / entry.files[0].path
        try:
            session = ort.InferenceSession(str(path), options, providers=self._providers)
        except Exception as error:
            raise EngineError(f"engine {entry.name} cannot be loaded by ONNX Runtime: {one_line(error)}") from error
        return OrtSession(entry, session, self._device)

    def upload(self, array: np.ndarray) -> DeviceTensor:
        import onnxruntime as ort

        return OrtTensor(ort.OrtValue.ortvalue_from_numpy(array))


def open_cpu() -> Backend:
    """ONNX Runtime on the CPU."""
    _require()
    return OrtBackend("cpu", ["CPUExecutionProvider"], "cpu")


def _require() -> None:
    try:
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            'ONNX Runtime is not installed; install it with: pip install "latte-flow[cpu]" (or [gpu])'
        ) from error
