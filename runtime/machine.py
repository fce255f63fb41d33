"""This machine: its processor, its first GPU, and the folder for cached graphs."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Gpu:
    """A GPU, in the words of its driver."""

    name: str
    architecture: str
    """Such as "sm_89"."""
    memory: str
    driver: str


def find_gpu() -> Gpu | None:
    """Asks the driver's own tool for the first GPU; returns None if there is none."""
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        name, capability, memory, driver = (part.strip() for part in answer.splitlines()[0].split(","))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
    return Gpu(name, f"sm_{capability.replace('.', '')}", memory, driver)


def cpu_name(cpuinfo: Path = CPU_INFO) -> str:
    """Returns the processor's name, as far as the system knows it."""
    names = [value for key, value in _cpu_facts(cpuinfo) if key == "model name"]
    return names[0] if names else platform.processor() or platform.machine()


def products_saturate(cpuinfo: Path = CPU_INFO) -> bool:
    """Returns whether 8-bit matrix products can overflow on this CPU, so that weights should have 7 bits.

    x86 CPUs without VNNI add pairs of 8-bit products in 16 bits, and what overflows is lost.
    """
    flags = {flag for key, value in _cpu_facts(cpuinfo) if key == "flags" for flag in value.split()}
    return bool(flags) and not flags & {"avx512_vnni", "avx_vnni"}


def graph_cache() -> Path | None:
    """Returns the folder for traced graphs: `graphs` in `$LATTE_FLOW_CACHE`, or in the user's cache folder.

    Returns None for a user without a home.
    """
    try:
        if given := os.environ.get("LATTE_FLOW_CACHE"):
            return Path(given).expanduser() / "graphs"
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "latte-flow" / "graphs"
    except RuntimeError:
        return None


def _cpu_facts(cpuinfo: Path) -> list[tuple[str, str]]:
    """Reads the lines of `/proc/cpuinfo` as pairs of key and value; empty where the system has no such file."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [(key.strip(), value.strip()) for key, _, value in (line.partition(":") for line in lines)]
