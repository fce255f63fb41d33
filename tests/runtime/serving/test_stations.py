"""The stations over a pipeline: what plans allow is what a batch holds."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from runtime.backends import open_backend
from runtime.backends.observed import ObservedBackend, ObservedRun
from runtime.errors import EngineError, InputError
from runtime.manifest import AxisRange, EngineEntry, FileEntry, Manifest, PlanEntry, PlanProfile, load_manifest
from runtime.pipeline import LatteFlowPipeline
from runtime.serving.requests import GenerationRequest, Limits
from runtime.serving.scheduler import Scheduler
from runtime.serving.stations import PipelineStations
from tests.doubles import GpuDouble

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


def image_request(seed: int, steps: int, scale: float = 3.0) -> GenerationRequest:
    return GenerationRequest("a red star", seed=seed, num_inference_steps=steps, guidance_scale=scale)


def drawn_on_a_gpu(plan_bundle: Path, requests: Sequence[GenerationRequest]) -> tuple[list[np.ndarray], Scheduler]:
    with LatteFlowPipeline.from_pretrained(plan_bundle, "tensorrt") as native:
        scheduler = Scheduler(PipelineStations(native), time.monotonic)
        handles = [scheduler.submit(request) for request in requests]
        while scheduler.tick():
            pass
        images = [next(e.pixels for e in handle.events(0) if e.kind == "image") for handle in handles]
    return [image for image in images if image is not None], scheduler


@pytest.mark.parametrize("requests", [[(0, 8)], [(0, 8), (1, 8)], [(0, 4), (1, 12), (2, 6)]])
def test_images_are_the_pipelines_whether_latents_stay_on_the_device_or_not(
    requests: list[tuple[int, int]], plan_bundle: Path, pipe: LatteFlowPipeline
) -> None:
    images, _ = drawn_on_a_gpu(plan_bundle, [image_request(seed, steps) for seed, steps in requests])
    for image, (seed, steps) in zip(images, requests, strict=True):
        expected = pipe("a red star", seed=seed, num_inference_steps=steps, guidance_scale=3.0, output_type="np").images
        assert int(np.abs(image.astype(int) - expected[0]).max()) <= 1


def test_latents_leave_the_gpu_once_however_many_steps(plan_bundle: Path, gpu: GpuDouble) -> None:
    """Each step brought them to the host and back, so no expert was a graph: its input had another place."""
    copies, launches = {}, {}
    for steps in (8, 24):
        gpu.cuda.copies.clear()
        before = gpu.cuda.launches
        drawn_on_a_gpu(plan_bundle, [image_request(0, steps), image_request(1, steps)])
        copies[steps] = Counter(kind for kind, _ in gpu.cuda.copies)
        launches[steps] = gpu.cuda.launches - before
    assert copies[8]["DeviceToHost"] == copies[24]["DeviceToHost"]
    groups = 2
    into = copies[24]["HostToDevice"] - copies[8]["HostToDevice"]
    assert into == 2 * (24 - 8)  # the time and the length of each step
    assert launches[24] >= launches[8] + 2 * (24 - 8) - groups


def test_an_image_that_is_not_finite_fails_and_harms_no_other(plan_bundle: Path, gpu: GpuDouble) -> None:
    """Its latents are looked at before they are decoded, since none leave the GPU before."""
    with LatteFlowPipeline.from_pretrained(plan_bundle, "tensorrt") as native:
        scheduler = Scheduler(PipelineStations(native), time.monotonic)
        good, bad = (scheduler.submit(image_request(seed, 4)) for seed in (0, 1))
        (job,) = scheduler._open[bad].jobs
        job.latents = np.full_like(job.latents, np.nan)  # type: ignore[attr-defined]
        while scheduler.tick():
            pass
        assert [event.kind for event in good.events(0)][-2:] == ["image", "done"]
        *_, last = bad.events(0)
        assert isinstance(last.error, EngineError)
        assert "finite" in str(last.error)
