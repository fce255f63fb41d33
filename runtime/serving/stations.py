"""The scheduler's stations over a pipeline's engines: jobs become the rows of a batch, and come back as latents."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from runtime.pipeline import LatteFlowPipeline
from runtime.rows import arrange_rows
from runtime.sampler import Sampler
from runtime.serving.requests import GenerationRequest
from runtime.serving.scheduler import EncodedPrompt, Job

REMEMBERED_BATCHES = 4
"""Arranged batches kept in memory: about as many as there are groups of requests at different flow times."""


class PipelineStations:
    """Runs batches of jobs on a pipeline's engines."""

    def __init__(self, pipeline: LatteFlowPipeline) -> None:
        geometry = pipeline.manifest.geometry
        self.schedule = pipeline.manifest.schedule
        self.latent_shape = (geometry.latent_channels, *geometry.latent_size)
        self._pipeline = pipeline
        self._samplers: OrderedDict[tuple[int, ...], Sampler] = OrderedDict()

    def check(self, request: GenerationRequest) -> None:
        """Raises `InputError` for a prompt that cannot be encoded."""
        for prompt in (request.prompt, request.negative_prompt):
            self._pipeline.check_prompt(prompt)

    def encode(self, jobs: Sequence[Job]) -> None:
        """Encodes each distinct prompt once; negative prompts are remembered."""
        prompts = self._pipeline.encode_prompts([job.request.prompt for job in jobs])
        guided = [job.request.negative_prompt for job in jobs if job.is_guided]
        negatives = iter(self._pipeline.encode_negative_prompts(guided))
        for job, prompt in zip(jobs, prompts, strict=True):
            job.encoded = EncodedPrompt(prompt, next(negatives) if job.is_guided else None)

    def step(self, group: int, jobs: Sequence[Job]) -> list[np.ndarray]:
        """Runs one step of every job, each at its own time."""
        latents = np.stack([job.latents for job in jobs])
        sampler = self._sampler(jobs)
        times = np.array([job.times[job.index : job.index + 2] for job in jobs]).T  # [2, B]
        (inputs,) = sampler.step_inputs(times)
        return list(sampler.step(latents, sampler.rows_of(latents), inputs)[0].numpy())

    def _sampler(self, jobs: Sequence[Job]) -> Sampler:
        """Returns the sampler for a batch of jobs; their prefixes are arranged again only when the batch changes."""
        key = tuple(job.number for job in jobs)
        sampler = self._samplers.pop(key, None)
        if sampler is None:
            encoded = [job.encoded for job in jobs if job.encoded is not None]
            conditional = [prompts.prompt for prompts in encoded]
            unconditional = [prompts.negative for prompts in encoded if prompts.negative is not None]
            scales = [job.request.guidance_scale for job in jobs]
            batch = arrange_rows(self._pipeline.backend, conditional, unconditional, scales)
            sampler = Sampler(self._pipeline.engines, self.schedule, batch)
        self._samplers[key] = sampler
        while len(self._samplers) > REMEMBERED_BATCHES:
            self._samplers.popitem(last=False)
        return sampler

    def decode(self, latents: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns the pixels of every image."""
        return list(self._pipeline.decode(np.stack(latents)))
