"""A bundle that is distilled: its defaults, and what every door says when it is asked for what it cannot do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from latte.model import LatteFlow
from model_repository.schema import DrawRequest, read_request
from runtime.errors import InputError
from runtime.flow_time import SamplingDefaults
from runtime.gateway.images import generation_request
from runtime.gateway.schema import ImagesBody
from runtime.manifest import load_manifest, save_manifest
from runtime.pipeline import LatteFlowPipeline
from runtime.serving.requests import GenerationRequest
from runtime.serving.service import LocalService

DISTILLED = SamplingDefaults(num_inference_steps=4, guidance_scale=3.0, guidance_distilled=True, allowed_steps=(2, 4))


@pytest.fixture
def distilled(bundle_copy: Path) -> Iterator[LatteFlowPipeline]:
    save_manifest(load_manifest(bundle_copy).model_copy(update={"sampling": DISTILLED}), bundle_copy)
    with LatteFlowPipeline.from_pretrained(bundle_copy) as pipe:
        yield pipe


def latents_of(pipe: LatteFlowPipeline, **options: object) -> np.ndarray:
    return np.asarray(pipe("a red circle", seed=7, output_type="latent", **options).images)  # type: ignore[arg-type]


def test_the_pipeline_draws_with_one_row_and_the_models_steps(
    distilled: LatteFlowPipeline, pipe: LatteFlowPipeline
) -> None:
    np.testing.assert_array_equal(latents_of(distilled), latents_of(pipe, num_inference_steps=4, guidance_scale=1.0))
    np.testing.assert_array_equal(
        latents_of(distilled, num_inference_steps=2, guidance_scale=3.0),
        latents_of(pipe, num_inference_steps=2, guidance_scale=1.0),
    )
    for wrong, line in (
        ({"num_inference_steps": 20}, "distilled for 2 or 4 steps, got num_inference_steps 20"),
        ({"guidance_scale": 5.0}, "guidance of scale 3 built in, got guidance_scale 5; leave it out"),
        ({"negative_prompt": "blue"}, "without a negative prompt; leave it out"),
        ({"shift": 2.0}, "distilled for steps with shift 1, got 2"),
        ({"guidance_interval": (0.0, 0.5)}, "guidance built in at all times, got guidance_interval; leave it out"),
    ):
        with pytest.raises(InputError, match=line):
            latents_of(distilled, **wrong)


def test_the_service_draws_what_the_pipeline_draws(distilled: LatteFlowPipeline) -> None:
    expected = distilled("a red circle", seed=7, output_type="np").images[0]
    with LocalService(distilled) as service:
        sampling = service.model.sampling
        assert sampling == DISTILLED
        request = GenerationRequest("a red circle", **sampling.choose()._asdict(), seed=7)
        handle = service.submit(request, lambda handle, event: None)
        assert handle.request == request
        with pytest.raises(InputError, match="distilled for 2 or 4 steps, got num_inference_steps 20"):
            service.submit(GenerationRequest("a red circle"), lambda handle, event: None)
        handles = service.scheduler.submit(request)
        np.testing.assert_array_equal(handles.result(60)[0], expected)


@pytest.mark.parametrize("interval", [(0.75, 0.25), (0.5, 0.5), (0.5, 9.0), (-0.1, 1.0), (float("nan"), 1.0)])
def test_an_interval_that_is_none_is_refused(interval: tuple[float, float]) -> None:
    with pytest.raises(ValidationError, match="0 <= start < end <= 1"):
        SamplingDefaults(guidance_interval=interval)


@pytest.mark.parametrize("interval", [(0.0, 0.5), (0.3, 0.8)])
def test_guidance_by_interval(
    bundle_copy: Path, model: LatteFlow, pipe: LatteFlowPipeline, interval: tuple[float, float]
) -> None:
    """The runtime draws what the reference draws, in the pipeline and in a service that mixes guided and other rows.

    A call may ask for an interval, and a bundle may have one by default.
    """
    sampling = SamplingDefaults(guidance_interval=interval)
    save_manifest(load_manifest(bundle_copy).model_copy(update={"sampling": sampling}), bundle_copy)
    prompts, scales = ["a red circle", "a blue star", "a ring"], [3.0, 1.0, 5.0]
    options = {"num_inference_steps": 8, "seed": [4, 9, 2]}
    expected = model.generate(
        prompts,
        guidance_scale=scales,
        guidance_interval=interval,
        output_type="latent",
        **options,  # type: ignore[arg-type]
    )
    rows = []
    with LatteFlowPipeline.from_pretrained(bundle_copy) as pipe:
        run = pipe.engines["solver_step"].run

        def count(feed: dict[str, np.ndarray]) -> object:
            rows.append(feed["velocity"].shape[0])
            return run(feed)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipe.engines["solver_step"], "run", count)
            latents = pipe(prompts, guidance_scale=scales, output_type="latent", **options).images  # type: ignore
        images = pipe(prompts, guidance_scale=scales, output_type="np", **options).images  # type: ignore[arg-type]
        with LocalService(pipe) as service:
            handles = [
                service.scheduler.submit(
                    GenerationRequest(prompt, num_inference_steps=8, guidance_scale=scale, seed=seed)
                )
                for prompt, scale, seed in zip(prompts, scales, [4, 9, 2], strict=True)
            ]
            served = [handle.result(60)[0] for handle in handles]
    asked = {"guidance_scale": scales, "guidance_interval": interval, "output_type": "latent"}
    np.testing.assert_array_equal(pipe(prompts, **asked, **options).images, latents)  # type: ignore[arg-type]
    assert rows == [5 if interval[0] <= i / 8 < interval[1] else 3 for i in range(8)]
    assert np.linalg.norm(latents - expected) <= 1e-5 * np.linalg.norm(expected)
    np.testing.assert_allclose(np.stack(served).astype(int), images.astype(int), atol=1)


def test_the_doors_take_the_models_defaults(distilled: LatteFlowPipeline) -> None:
    with LocalService(distilled) as service:
        model = service.model
    for quality, steps in (("auto", 4), ("low", 2), ("high", 4)):
        drawing = generation_request(ImagesBody(prompt="a", quality=quality), "a", model, "", "")  # type: ignore
        assert (drawing.num_inference_steps, drawing.guidance_scale, drawing.shift) == (steps, 3.0, 1.0)
    with pytest.raises(InputError, match="got guidance_scale 1"):
        generation_request(ImagesBody(prompt="a", guidance_scale=1.0), "a", model, "", "")
    prompt = {"prompt": np.array([b"a"], np.object_)}
    read = read_request(prompt, sampling=DISTILLED)
    assert isinstance(read, DrawRequest)
    assert (read.generation.num_inference_steps, read.generation.guidance_scale) == (4, 3.0)
    with pytest.raises(InputError, match="distilled for 2 or 4 steps"):
        read_request(prompt | {"num_inference_steps": np.array([8], np.int32)}, sampling=DISTILLED)


def test_defaults_must_be_allowed() -> None:
    with pytest.raises(ValueError, match="num_inference_steps 20 is not in"):
        SamplingDefaults(allowed_steps=(4,))
