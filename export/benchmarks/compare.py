"""Two runs of a benchmark side by side: what got slower by more than repeated runs differ among themselves."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import InputError

NOISE_FACTOR = 3.0
"""Slower is what is slower by more than so many times the spread of the rounds."""
SMALLEST_NOISE = 0.03
"""Share of the median that no two runs on a shared machine agree to, however many rounds."""
NOISE_OF_ONE = 0.1
"""The same where a report holds one number, not those of its rounds."""


@dataclass(frozen=True)
class Comparison:
    """One measurement in both runs."""

    name: str
    old: float
    """Median, in seconds or in something per second."""
    new: float
    slower_by: float
    """1.2 is 20 % slower, whatever the unit."""
    noise: float
    """What the rounds of either run differ by, as a share of the median."""

    @property
    def verdict(self) -> str:
        """ "slower", "faster" or "same"."""
        margin = NOISE_FACTOR * max(self.noise, SMALLEST_NOISE)
        if self.slower_by > 1 + margin:
            return "slower"
        return "faster" if self.slower_by < 1 / (1 + margin) else "same"


def compare_reports(old: dict[str, Any], new: dict[str, Any]) -> list[Comparison]:
    """Everything that both reports measured in rounds.

    Raises:
        InputError: they have nothing in common.
    """
    before, after = dict(_series(old)), dict(_series(new))
    shared = [name for name in after if name in before]
    if not shared:
        raise InputError("the two reports have no measurement in common; compare two runs of the same benchmark")
    return [_compare(name, before[name], after[name]) for name in shared]


def load_report(path: Path) -> dict[str, Any]:
    """A report that a benchmark printed with --json.

    Raises:
        InputError: it is none.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no report of `latte-flow bench … --json`: {error}") from error
    if not isinstance(report, dict) or "machine" not in report:
        raise InputError(f"{path} is no report of `latte-flow bench … --json`: it names no machine")
    return report


def _series(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, list[float]]]:
    """Numbers, one or many, below a key that says that they are times or rates, by the names on the way to them.

    An object in a list has the name that its texts make, or its place.
    """
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _series(inner, (*path, str(key)))
    elif isinstance(value, list) and not _are_numbers(value):
        for place, inner in enumerate(value):
            texts = [text for text in inner.values() if isinstance(text, str)] if isinstance(inner, dict) else []
            yield from _series(inner, (*path, ", ".join(texts) or str(place)))
    elif any("second" in key for key in path):
        numbers = value if isinstance(value, list) else [value]
        if _are_numbers(numbers):
            yield " / ".join(path), [float(number) for number in numbers]


def _are_numbers(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)


def _compare(name: str, old: list[float], new: list[float]) -> Comparison:
    before, after = statistics.median(old), statistics.median(new)
    faster, slower = (before, after) if "per_second" in name else (after, before)
    ratio = faster / slower if slower else 1.0
    return Comparison(name, before, after, ratio, max(_spread(old), _spread(new)))


def _spread(values: list[float]) -> float:
    """Median absolute deviation as a share of the median, scaled to a standard deviation."""
    if len(values) == 1:
        return NOISE_OF_ONE
    middle = statistics.median(values)
    return 1.4826 * statistics.median(abs(value - middle) for value in values) / middle if middle else 0.0
