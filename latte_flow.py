"""LaTtE-Flow from checkpoint to production: the public names of the toolkit.

Each name is imported when it is first used, so that `import latte_flow` needs neither torch nor a server.

Example:
    >>> from latte_flow import LatteFlowPipeline
    >>> pipe = LatteFlowPipeline.from_pretrained("bundle")
    >>> pipe("a small red circle", seed=7).images[0].save("circle.png")
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model_repository.client import Client
    from runtime.errors import (
        BundleError,
        CancelledError,
        CheckpointError,
        DeadlineError,
        DrainingError,
        EngineError,
        InputError,
        LatteFlowError,
        MissingExtraError,
        QueueFullError,
        ServiceError,
        TrainingError,
        VerificationError,
    )
    from runtime.manifest import load_manifest
    from runtime.pipeline import LatteFlowPipeline

    __version__: str

__all__ = [
    "BundleError",
    "CancelledError",
    "CheckpointError",
    "Client",
    "DeadlineError",
    "DrainingError",
    "EngineError",
    "InputError",
    "LatteFlowError",
    "LatteFlowPipeline",
    "MissingExtraError",
    "QueueFullError",
    "ServiceError",
    "TrainingError",
    "VerificationError",
    "__version__",
    "load_manifest",
]
_MODULES = {
    "Client": "model_repository.client",
    "LatteFlowPipeline": "runtime.pipeline",
    "load_manifest": "runtime.manifest",
}
"""Modules of the names that are not exceptions."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in __all__:
        raise AttributeError(f"module 'latte_flow' has no attribute {name!r}")
    try:
        return getattr(import_module(_MODULES.get(name, "runtime.errors")), name)
    except ModuleNotFoundError as error:
        if name != "Client":
            raise
        # An AttributeError, so that `hasattr` works without the extra.
        raise AttributeError(f'{name} needs {error.name}; install it with: pip install "latte-flow[triton]"') from error


def _version() -> str:
    try:
        return version("latte-flow")
    except PackageNotFoundError:  # a source tree that is not installed
        return "unknown"


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
