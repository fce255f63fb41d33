"""Backends, which execute engines. A backend is chosen by its provider's name; only then is its library imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module

from runtime.backends.base import Backend, Session
from runtime.backends.values import DeviceTensor, KeyValues, Value, to_host
from runtime.errors import InputError

PROVIDERS = {
    "cpu": "runtime.backends.onnxruntime:open_cpu",
    "cuda": "runtime.backends.onnxruntime:open_cuda",
    "ort-tensorrt": "runtime.backends.onnxruntime:open_ort_tensorrt",
    "tensorrt": "runtime.backends.tensorrt:open_tensorrt",
    "tensorrt-rtx": "runtime.backends.tensorrt:open_tensorrt_rtx",
}
"""Provider name to `module:function`: ONNX Runtime on the CPU, on CUDA, or with TensorRT; TensorRT itself."""


def open_backend(provider: str, options: Mapping[str, str] | None = None) -> Backend:
    """Opens the backend of a provider.

    Args:
        options: the provider's options, by the names in its own documentation.

    Raises:
        InputError: the name is unknown; the message lists the known ones.
        MissingExtraError: the provider's library is not installed.
        EngineError: the provider does not work on this machine.
    """
    if provider not in PROVIDERS:
        raise InputError(f"unknown provider {provider!r}; known are {', '.join(PROVIDERS)}")
    module, _, function = PROVIDERS[provider].partition(":")
    factory: Callable[[Mapping[str, str]], Backend] = getattr(import_module(module), function)
    return factory(options or {})


__all__ = ["PROVIDERS", "Backend", "DeviceTensor", "KeyValues", "Session", "Value", "open_backend", "to_host"]
