"""Memory and start-up of a bundle, each way of keeping engines in a process of its own.

python -m export.benchmarks.memory BUNDLE PROVIDER LOW_MEMORY      what the parent starts
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import EngineError
from runtime.manifest import Precision
from runtime.pipeline import LatteFlowPipeline


@dataclass(frozen=True)
class Footprint:
    """Of one process."""

    low_memory: bool
    first_image_seconds: float
    """From nothing but the interpreter and its libraries to the first picture."""
    second_image_seconds: float
    interpreter_mb: float
    """Largest resident memory before the bundle was opened."""
    peak_mb: float
    """Largest resident memory of all; pages of memory-mapped files count."""


@dataclass(frozen=True)
class ExportFootprint:
    """Of an export without verification."""

    seconds: float
    interpreter_mb: float
    """Largest resident memory with all libraries imported, before the checkpoint was opened."""
    peak_mb: float
    checkpoint_mb: float
    """On disk."""


def measure_export(checkpoint: Path, bundle: Path, precision: Precision) -> ExportFootprint:
    """Exports in a process of its own."""
    size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file()) / 1e6
    found = _run("export", str(checkpoint), str(bundle), precision)
    return ExportFootprint(checkpoint_mb=size, **found)


def measure_memory(bundle: Path, provider: str) -> list[Footprint]:
    """All engines in memory, and one at a time."""
    return [_probe(bundle, provider, low_memory) for low_memory in (False, True)]


def _probe(bundle: Path, provider: str, low_memory: bool) -> Footprint:
    return Footprint(low_memory=low_memory, **_run("draw", str(bundle), provider, str(int(low_memory))))


def _run(*arguments: str) -> dict[str, float]:
    command = [sys.executable, "-m", "export.benchmarks.memory", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise EngineError(f"the process that was measured failed: {result.stderr.strip().splitlines()[-1]}")
    found: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return found


def _peak_mb() -> float:
    # Not `getrusage`: what that says of a child begins at its parent's size.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return int(status["VmHWM"].split()[0]) * 1024 / 1e6


def _draw(bundle: str, provider: str, low_memory: str) -> dict[str, float]:
    interpreter = _peak_mb()
    started = time.perf_counter()
    with LatteFlowPipeline.from_pretrained(bundle, provider, low_memory=low_memory == "1") as pipe:
        pipe("a red star", seed=0)
        first = time.perf_counter()
        pipe("a red star", seed=1)
        second = time.perf_counter()
    return {
        "first_image_seconds": first - started,
        "second_image_seconds": second - first,
        "interpreter_mb": interpreter,
        "peak_mb": _peak_mb(),
    }


def _export(checkpoint: str, bundle: str, precision: Precision) -> dict[str, float]:
    from export.bundle import export_bundle  # its libraries are no part of drawing

    interpreter = _peak_mb()
    started = time.perf_counter()
    export_bundle(checkpoint, Path(bundle), precision=precision, verify=False)
    return {"seconds": time.perf_counter() - started, "interpreter_mb": interpreter, "peak_mb": _peak_mb()}


if __name__ == "__main__":
    functions: dict[str, Callable[..., dict[str, float]]] = {"draw": _draw, "export": _export}
    print(json.dumps(functions[sys.argv[1]](*sys.argv[2:])))
