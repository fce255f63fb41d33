"""What `import latte_flow` offers, and what it costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import latte_flow
from runtime.errors import LatteFlowError

NAMES = [
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


def test_the_public_names_are_pinned() -> None:
    assert latte_flow.__all__ == NAMES
    assert set(NAMES) <= set(dir(latte_flow))
    for name in NAMES:
        assert getattr(latte_flow, name) is not None
    errors = [getattr(latte_flow, name) for name in NAMES if name.endswith("Error")]
    assert all(issubclass(error, LatteFlowError) for error in errors)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'latte_flow' has no attribute 'Pipeline'"):
        latte_flow.Pipeline  # noqa: B018


def test_importing_it_imports_nothing_heavy() -> None:
    code = (
        "import sys, latte_flow; latte_flow.LatteFlowPipeline; latte_flow.InputError; "
        "print(*[m for m in ('torch', 'transformers', 'onnxruntime', 'tritonclient', 'latte') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


def test_a_client_without_its_extra_is_an_attribute_that_is_missing() -> None:
    code = (
        "import sys; sys.modules['tritonclient'] = None\n"
        "import latte_flow; assert not hasattr(latte_flow, 'Client'); assert latte_flow.LatteFlowPipeline\n"
        "latte_flow.Client"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stderr.strip().splitlines()[-1].endswith('install it with: pip install "latte-flow[triton]"')
