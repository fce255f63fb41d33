"""Memory and start-up of a bundle, each way of keeping engines in a process of its own.

python -m export.benchmarks.memory BUNDLE PROVIDER LOW_MEMORY      what the parent starts
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import EngineError
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


def measure_memory(bundle: Path, provider: str) -> list[Footprint]:
    """All engines in memory, and one at a time."""
    return [_probe(bundle, provider, low_memory) for low_memory in (False, True)]


def _probe(bundle: Path, provider: str, low_memory: bool) -> Footprint:
    command = [sys.executable, "-m", "export.benchmarks.memory", str(bundle), provider, str(int(low_memory))]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise EngineError(f"the process that was measured failed: {result.stderr.strip().splitlines()[-1]}")
    return Footprint(**json.loads(result.stdout))


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def _measure(bundle: str, provider: str, low_memory: bool) -> dict[str, float | bool]:
    interpreter = _peak_mb()
    started = time.perf_counter()
    with LatteFlowPipeline.from_pretrained(bundle, provider, low_memory=low_memory) as pipe:
        pipe("a red star", seed=0)
        first = time.perf_counter()
        pipe("a red star", seed=1)
        second = time.perf_counter()
    return {
        "low_memory": low_memory,
        "first_image_seconds": first - started,
        "second_image_seconds": second - first,
        "interpreter_mb": interpreter,
        "peak_mb": _peak_mb(),
    }


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1], sys.argv[2], sys.argv[3] == "1")))
