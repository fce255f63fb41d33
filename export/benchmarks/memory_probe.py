"""Draws or exports in a process of its own, and prints its time and memory as JSON.

    python -m export.benchmarks.memory_probe draw BUNDLE PROVIDER LOW_MEMORY
    python -m export.benchmarks.memory_probe batch BUNDLE PROVIDER INPUT OUTPUT STEPS
    python -m export.benchmarks.memory_probe export CHECKPOINT BUNDLE PRECISION

It imports nothing that drawing does not need, which is why it is not part of `export.benchmarks.memory`.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

from runtime.manifest import Precision
from runtime.pipeline import LatteFlowPipeline


def _peak_mb() -> float:
    # Not `getrusage`, whose value for a child process starts at its parent's size.
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


def _batch(bundle: str, provider: str, source: str, output: str, steps: str) -> dict[str, float]:
    from runtime.batch.job import Job, Watcher, run_job
    from runtime.batch.outputs import parquet_to_write
    from runtime.batch.reading import RowOptions

    class Stopwatch(Watcher):
        loaded = 0.0

        def ready(self) -> None:
            self.loaded = time.perf_counter()

    parquet_to_write()  # imported already when the interpreter's size is taken
    interpreter, watch = _peak_mb(), Stopwatch()
    started = time.perf_counter()
    options = RowOptions(defaults={"num_inference_steps": int(steps)})
    run_job(Job(Path(source), Path(output), Path(bundle), rows=options, provider=provider), watch)
    return {
        "start_seconds": watch.loaded - started,
        "seconds": time.perf_counter() - watch.loaded,
        "interpreter_mb": interpreter,
        "peak_mb": _peak_mb(),
    }


def _export(checkpoint: str, bundle: str, precision: Precision) -> dict[str, float]:
    from export.bundle import export_bundle  # drawing does not need its libraries
    from export.graph_store import GraphStore

    interpreter = _peak_mb()
    started = time.perf_counter()
    export_bundle(checkpoint, Path(bundle), precision=precision, verify=False, store=GraphStore(None))
    return {
        "seconds": time.perf_counter() - started,
        "interpreter_mb": interpreter,
        "peak_mb": _peak_mb(),
        "tracing_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6,
    }


if __name__ == "__main__":
    functions: dict[str, Callable[..., dict[str, float]]] = {"draw": _draw, "batch": _batch, "export": _export}
    print(json.dumps(functions[sys.argv[1]](*sys.argv[2:])))
