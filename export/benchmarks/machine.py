"""What a measurement was made on, printed with every benchmark."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import onnxruntime
import torch

from runtime.console import stdout
from runtime.doctor import find_gpu


def describe_machine() -> dict[str, str]:
    """Processor, cores, memory, and the versions that matter."""
    return {
        "processor": _cpu_info("model name") or platform.processor() or platform.machine(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "onnxruntime": onnxruntime.__version__,
        "transformers": version("transformers"),
        "latte-flow": version("latte-flow"),
    } | ({} if (gpu := find_gpu()) is None else {"GPU": f"{gpu.name}, driver {gpu.driver}"})


def print_machine(machine: dict[str, str]) -> None:
    """A line for each fact, on stdout."""
    for name, value in machine.items():
        stdout.print(f"{name}: {value}", highlight=False)


def resident_megabytes() -> float | None:
    """Memory of this process in RAM, in MB; None where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _cpu_info(key: str) -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), None)
