"""What executes engines. A backend is chosen by name; its vendor library is imported only then."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from runtime.backends.base import Backend, DeviceTensor, Session, Value, to_host
from runtime.errors import InputError

_FACTORIES = {"cpu": "runtime.backends.onnxruntime:open_cpu"}
"""Provider name to `module:function`."""


def open_backend(provider: str) -> Backend:
    """The backend of a provider name.

    Raises:
        InputError: an unknown name; the known ones are listed.
        MissingExtraError: its library is not installed.
    """
    if provider not in _FACTORIES:
        raise InputError(f"unknown provider {provider!r}; known are {', '.join(sorted(_FACTORIES))}")
    module, _, function = _FACTORIES[provider].partition(":")
    factory: Callable[[], Backend] = getattr(import_module(module), function)
    return factory()


__all__ = ["Backend", "DeviceTensor", "Session", "Value", "open_backend", "to_host"]
