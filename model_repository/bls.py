"""A backend whose engines are other models of the same Triton server (`--layout per-engine`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

from model_repository.schema import engine_model
from runtime.backends import Backend, DeviceTensor, Session, Value, to_host
from runtime.errors import EngineError
from runtime.manifest import EngineEntry


class HostTensor(DeviceTensor):
    """An output of another model."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    @property
    def shape(self) -> tuple[int, ...]:
        return self._array.shape

    @property
    def dtype(self) -> str:
        return str(self._array.dtype)

    def numpy(self) -> np.ndarray:
        return self._array


class BlsSession(Session):
    """Calls the model that runs the engine."""

    def _execute(self, feed: Mapping[str, Value]) -> dict[str, DeviceTensor]:
        request = pb_utils.InferenceRequest(
            model_name=engine_model(self.entry.name),
            inputs=[pb_utils.Tensor(name, to_host(value)) for name, value in feed.items()],
            requested_output_names=[spec.name for spec in self.entry.outputs],
        )
        response = request.exec()
        if response.has_error():
            raise EngineError(f"engine {self.entry.name} failed: {response.error().message()}")
        # A copy: the tensor's memory is the response's.
        return {tensor.name(): HostTensor(np.array(tensor.as_numpy())) for tensor in response.output_tensors()}

    def close(self) -> None:
        """Does nothing: the model belongs to Triton."""


class BlsBackend(Backend):
    """Finds engines among the server's models by name."""

    name = "triton"

    def load(self, bundle: Path, entry: EngineEntry) -> Session:
        return BlsSession(entry)

    def upload(self, array: np.ndarray) -> DeviceTensor:
        return HostTensor(array)
