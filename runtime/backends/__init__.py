"""What executes engines. A backend is chosen by name; its vendor library is imported only then."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module

from runtime.backends.base import Backend, DeviceTensor, Session, Value, to_host
from runtime.errors import InputError

PROVIDERS = {
    "cpu": "runtime.backends.onnxruntime:open_cpu",
    "cuda": "runtime.backends.onnxruntime:open_cuda",
    "ort-tensorrt": "runtime.backends.onnxruntime:open_ort_tensorrt",
    "tensorrt": "runtime.backends.tensorrt:open_tensorrt",
    "tensorrt-rtx": "runtime.backends.tensorrt:open_tensorrt_rtx",
}
"""Provider name to `module:function`: ONNX Runtime on the CPU, on CUDA, with its TensorRT provider; native TensorRT."""


def open_backend(provider: str, options: Mapping[str, str] | None = None) -> Backend:
    """The backend of a provider name.

    Args:
        options: of the provider, by the names that its own documentation gives them.

    Raises:
        InputError: an unknown name; the known ones are listed.
        MissingExtraError: its library is not installed.
        EngineError: it does not work on this machine.
    """
    if provider not in PROVIDERS:
        raise InputError(f"unknown provider {provider!r}; known are {', '.join(PROVIDERS)}")
    module, _, function = PROVIDERS[provider].partition(":")
    factory: Callable[[Mapping[str, str]], Backend] = getattr(import_module(module), function)
    return factory(options or {})


__all__ = ["PROVIDERS", "Backend", "DeviceTensor", "Session", "Value", "open_backend", "to_host"]
