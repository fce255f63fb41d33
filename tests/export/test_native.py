"""Verification and benchmark of native TensorRT, on doubles of CUDA and TensorRT (tests/doubles)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from export.benchmarks.provider import run_provider
from export.reference import Reference
from export.verify import verify_bundle
from runtime.manifest import load_manifest
from tests.doubles import GpuDouble
from tests.plan_files import add_plans


def test_it_passes_the_ladder_with_the_plans_that_are_built_by_default(plan_bundle: Path, reference: Reference) -> None:
    """They take latents of one size and write one answer at a time; the ladder asked for more."""
    rows = verify_bundle(plan_bundle, reference, "tensorrt")
    assert [row for row in rows if not row.passed] == []
    assert {row.rung for row in rows} == {"input", "weights", "engine", "step", "trajectory", "image", "answer"}
    assert sum(row.what.startswith("logits of answer 3 of 3") for row in rows) == 4


def test_the_benchmark_of_a_provider_builds_the_plans_that_it_runs(
    checkpoint: Path, reference: Reference, tmp_path: Path, gpu: GpuDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(bundle: Path, options: object) -> None:
        add_plans(bundle, "tensorrt")
        gpu.trt.show(bundle)

    monkeypatch.setattr("export.benchmarks.provider.build_plans", build)
    ignore: Callable[[str], None] = lambda stage: None  # noqa: E731
    report = run_provider(str(checkpoint), reference, "tensorrt", tmp_path, ("fp32",), ({},), 1, ignore)
    assert [row for row in report.parity["fp32"] if not row.passed] == []
    assert {timing.provider for timing in report.timings} == {"tensorrt", "cpu"}
    assert all(engine.plans for engine in load_manifest(tmp_path / "bundle-fp32").engines)
