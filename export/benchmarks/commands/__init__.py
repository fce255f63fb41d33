"""`latte-flow bench`: every subject measures its sides by turns in one run, and prints the machine."""

from export.benchmarks.commands import (
    compare,
    generation,
    int8,
    memory,
    precision,
    provider,
    serving,
    stages,
    steps,
    understanding,
)
from export.benchmarks.commands.report import app

__all__ = [
    "app",
    "compare",
    "generation",
    "int8",
    "memory",
    "precision",
    "provider",
    "serving",
    "stages",
    "steps",
    "understanding",
]
