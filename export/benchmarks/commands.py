"""`latte-flow bench`: every subject measures its sides in turns, in one run, and prints the machine."""

from export.benchmarks import (
    ablations,
    batch,
    calls,
    gateway,
    generation,
    int8,
    memory,
    precision,
    provider,
    report,
    scale_out,
    serving,
    soak,
    stages,
    steps,
    understanding,
)
from export.benchmarks.report import app

__all__ = [
    "ablations",
    "app",
    "batch",
    "calls",
    "gateway",
    "generation",
    "int8",
    "memory",
    "precision",
    "provider",
    "report",
    "scale_out",
    "serving",
    "soak",
    "stages",
    "steps",
    "understanding",
]
