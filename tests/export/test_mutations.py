"""Verification finds every small corruption of a bundle, in every precision."""

from __future__ import annotations

from pathlib import Path

import pytest

from export.bundle import export_bundle
from export.reference import Reference
from runtime.manifest import Precision
from tests.export.mutations import MUTATIONS, PRECISIONS, found_by


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_corruption_is_found(
    precision: Precision, checkpoint: Path, reference: Reference, tmp_path: Path
) -> None:
    """A corruption that cannot matter says why; it must then pass, so that the reason does not outlive its truth."""
    _, failed = export_bundle(checkpoint, tmp_path / precision, precision=precision)
    assert not failed
    mutations = [mutation for mutation in MUTATIONS if precision in mutation.only]
    found = {m.name: found_by(tmp_path / precision, m, reference, tmp_path) for m in mutations}
    assert len(found) == len(mutations) >= 25
    harmless = {mutation.name for mutation in mutations if precision in mutation.harmless}
    assert {name for name, row in found.items() if row is None} == harmless
