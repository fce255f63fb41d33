"""Timing of a piece of work."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

ResultT = TypeVar("ResultT")


def wall_time(work: Callable[[], ResultT]) -> tuple[float, ResultT]:
    """Runs some work; returns the seconds on the wall's clock, and its result."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result
