"""The measures of a verification, and the rows that report them.

A reference that is constant or not finite fails: it would agree with anything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runtime.manifest import ParityRow, Precision, Rung

PSNR_OF_EQUAL_IMAGES = 100.0
"""Reported if no pixel differs."""
SMALLEST_NORM = 1e-12
"""References of zeros are divided by this."""


@dataclass(frozen=True)
class Tolerances:
    """The largest accepted relative error, ‖a − b‖ / ‖b‖, and the smallest accepted PSNR in dB."""

    engine: float
    trajectory: float
    image_psnr_db: float


TOLERANCES: dict[Precision, Tolerances] = {
    "fp32": Tolerances(engine=1e-4, trajectory=1e-3, image_psnr_db=50.0),
    "fp16": Tolerances(engine=1e-2, trajectory=3e-2, image_psnr_db=35.0),
    "bf16": Tolerances(engine=5e-2, trajectory=1.5e-1, image_psnr_db=25.0),
    "int8": Tolerances(engine=1e-1, trajectory=1e-1, image_psnr_db=35.0),
    "fp8": Tolerances(engine=1e-1, trajectory=1e-1, image_psnr_db=30.0),
}


def relative_error(value: np.ndarray, reference: np.ndarray) -> float:
    """Returns ‖value − reference‖ / ‖reference‖; infinite if shapes differ or a value is not finite."""
    value, reference = np.asarray(value, np.float64), np.asarray(reference, np.float64)
    if value.shape != reference.shape or not np.isfinite(value).all() or not np.isfinite(reference).all():
        return math.inf
    return float(np.linalg.norm(value - reference)) / max(float(np.linalg.norm(reference)), SMALLEST_NORM)


def psnr_db(value: np.ndarray, reference: np.ndarray) -> float | None:
    """Returns the peak signal-to-noise ratio of uint8 images; None if the reference is constant or shapes differ."""
    if value.shape != reference.shape or _is_constant(reference):
        return None
    error = np.mean((value.astype(np.float64) - reference.astype(np.float64)) ** 2)
    return PSNR_OF_EQUAL_IMAGES if error == 0 else min(PSNR_OF_EQUAL_IMAGES, float(10 * np.log10(255.0**2 / error)))


def bias_levels(value: np.ndarray, reference: np.ndarray) -> float | None:
    """Returns the mean signed error of uint8 pixels, of the darker or of the brighter ones, whichever is larger.

    Errors that are random cancel out; those of another rounding or another contrast do not, however small they are.
    None if the reference is constant or shapes differ.
    """
    if value.shape != reference.shape or _is_constant(reference):
        return None
    error = value.astype(np.float64) - reference
    is_dark = reference < reference.mean()
    return max((float(error[of].mean()) for of in (is_dark, ~is_dark)), key=abs)


def _is_constant(reference: np.ndarray) -> bool:
    return reference.size > 1 and bool(np.ptp(reference) == 0)


def relative_row(
    rung: Rung,
    what: str,
    value: np.ndarray,
    reference: np.ndarray,
    tolerance: float,
    *,
    group: int | None = None,
    step: int | None = None,
) -> ParityRow:
    """Compares by relative error, which must not exceed the tolerance."""
    error = math.inf if _is_constant(reference) else relative_error(value, reference)
    return ParityRow(
        rung=rung,
        what=what,
        group=group,
        step=step,
        metric="relative_error",
        value=error if math.isfinite(error) else None,
        tolerance=tolerance,
        passed=error <= tolerance,
    )


def psnr_row(rung: Rung, what: str, value: np.ndarray, reference: np.ndarray, tolerance: float) -> ParityRow:
    """Compares images by PSNR, which must reach the tolerance in dB."""
    number = psnr_db(value, reference)
    passed = number is not None and number >= tolerance
    return ParityRow(rung=rung, what=what, metric="psnr_db", value=number, tolerance=tolerance, passed=passed)


def bias_row(rung: Rung, what: str, value: np.ndarray, reference: np.ndarray, tolerance: float) -> ParityRow:
    """Compares images by their bias, whose magnitude must not exceed the tolerance in levels of 255."""
    number = bias_levels(value, reference)
    passed = number is not None and abs(number) <= tolerance
    return ParityRow(rung=rung, what=what, metric="bias_levels", value=number, tolerance=tolerance, passed=passed)


def equality_row(rung: Rung, what: str, value: object, expected: object) -> ParityRow:
    """Compares what must be equal, such as tokens or parts of a manifest."""
    return differences_row(rung, what, _differences(value, expected))


def differences_row(rung: Rung, what: str, differences: Sequence[str], group: int | None = None) -> ParityRow:
    """Reports differences, of which there must be none; the note shows the first."""
    return ParityRow(
        rung=rung,
        what=what,
        group=group,
        metric="differences",
        value=len(differences),
        tolerance=0,
        passed=not differences,
        note=differences[0] if differences else None,
    )


def _differences(value: object, expected: object, where: str = "") -> list[str]:
    if isinstance(value, dict) and isinstance(expected, dict):
        names = sorted(value.keys() | expected.keys())
        return [d for n in names for d in _differences(value.get(n), expected.get(n), f"{where}.{n}" if where else n)]
    if isinstance(value, (list, tuple)) and isinstance(expected, (list, tuple)) and len(value) == len(expected):
        pairs = enumerate(zip(value, expected, strict=True))
        return [difference for i, pair in pairs for difference in _differences(*pair, f"{where}[{i}]")]
    if value == expected:
        return []
    return [f"{f'{where} is ' if where else ''}{value!r:.80}, expected {expected!r:.80}"]
