"""The stations over a pipeline: what plans allow is what a batch holds."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from runtime.backends import open_backend
from runtime.backends.observed import ObservedBackend, ObservedRun
from runtime.errors import InputError
from runtime.manifest import AxisRange, EngineEntry, FileEntry, Manifest, PlanEntry, PlanProfile, load_manifest
from runtime.pipeline import LatteFlowPipeline
from runtime.serving.requests import GenerationRequest, Limits
from runtime.serving.scheduler import Scheduler
from runtime.serving.stations import PipelineStations

ROWS = 6


def with_plans(manifest: Manifest) -> Manifest:
    """The manifest of a bundle whose engines have plans for at most 6 rows, and prompts of at most 50 tokens."""

    def plan(engine: EngineEntry) -> PlanEntry:
        sizes = {"rows": ROWS, "batch": ROWS, "tokens": 50}
        axes = {axis: AxisRange(min=0, opt=1, max=sizes.get(axis, 4096)) for axis in engine.axes}
        return PlanEntry(
            provider="tensorrt",
            file=FileEntry(path=f"{engine.name}/model.plan", sha256="0" * 64, size=1),
            version="11.0",
            version_compatible=False,
            architectures=("sm_90",),
            profiles=(PlanProfile(name="all", axes=axes),),
            ingredients={},
            inspected=True,
            build_seconds=1.0,
            build_peak_bytes=1,
        )

    engines = tuple(engine.model_copy(update={"plans": (plan(engine),)}) for engine in manifest.engines)
    return manifest.model_copy(update={"engines": engines})


class PlannedBackend(ObservedBackend):
    """ONNX Runtime that refuses what the plans would refuse."""

    def __init__(self) -> None:
        super().__init__(open_backend("cpu"))
        self.name = "tensorrt"
        self.largest = 0

    def observe(self, run: ObservedRun) -> None:
        for spec in run.entry.inputs:
            for axis, size in zip(spec.shape, run.feed[spec.name].shape, strict=True):
                if axis in ("rows", "batch"):
                    self.largest = max(self.largest, size)
                    if size > ROWS:
                        raise InputError(f"engine {run.entry.name}: no profile covers {axis}={size}")


def test_a_full_queue_stays_within_the_plans_profiles(bundle: Path) -> None:
    """The default of 32 rows a tick used to fail whole batches with INVALID_ARG, where plans take 16."""
    backend = PlannedBackend()
    with LatteFlowPipeline(bundle, with_plans(load_manifest(bundle)), backend) as pipe:
        scheduler = Scheduler(PipelineStations(pipe), time.monotonic, Limits(max_rows_per_tick=32))
        scales = (1.0, 3.0)
        handles = [
            scheduler.submit(GenerationRequest(f"a red star {i}", num_inference_steps=2, guidance_scale=scales[i % 2]))
            for i in range(20)
        ]
        while scheduler.tick():
            pass
        assert [len(handle.result(0)) for handle in handles] == [1] * 20
        assert backend.largest == ROWS
        with pytest.raises(InputError, match="the service's plans take 50"):
            scheduler.submit(GenerationRequest("red " * 30))


def test_a_backend_without_plans_sets_no_limit(pipe: LatteFlowPipeline) -> None:
    stations = PipelineStations(pipe)
    assert [stations.max_rows(station) for station in ("encode", 0, 1, "decode")] == [None] * 4
