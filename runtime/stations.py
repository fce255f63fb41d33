"""The scheduler's stations over a pipeline's engines: jobs become rows of a batch, and come back as latents."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from runtime.pipeline import LatteFlowPipeline
from runtime.prefixes import PrefixRow, arrange_rows
from runtime.requests import GenerationRequest
from runtime.sampler import Sampler
from runtime.scheduler import Job

REMEMBERED_BATCHES = 4
"""Arranged prefixes kept in memory: as many as cohorts of requests at different times usually are."""


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
        """Each different prompt goes through the VLM once; negative prompts are remembered."""
        prompts = self._pipeline.encode_prompts([job.request.prompt for job in jobs])
        guided = [job for job in jobs if job.rows == 2]
        negatives = iter(self._pipeline.encode_negative_prompts([job.request.negative_prompt for job in guided]))
        for job, prompt in zip(jobs, prompts, strict=True):
            job.encoded = (prompt, next(negatives) if job.rows == 2 else None)

    def step(self, group: int, jobs: Sequence[Job]) -> list[np.ndarray]:
        """One step of every job, each at its own time."""
        latents = np.stack([job.latents for job in jobs])
        t = np.array([job.times[job.index] for job in jobs])
        t_next = np.array([job.times[job.index + 1] for job in jobs])
        sampler = self._sampler(jobs)
        return list(sampler.step(latents, sampler.rows_of(latents), t, t_next)[0].numpy())

    def _sampler(self, jobs: Sequence[Job]) -> Sampler:
        """The jobs' prefixes side by side: arranged anew only when the batch is another one."""
        key = tuple(job.number for job in jobs)
        sampler = self._samplers.pop(key, None)
        if sampler is None:
            conditional: list[PrefixRow] = []
            unconditional: list[PrefixRow] = []
            for job in jobs:
                assert job.encoded is not None
                prompt, negative = job.encoded
                assert isinstance(prompt, PrefixRow)
                conditional.append(prompt)
                if isinstance(negative, PrefixRow):
                    unconditional.append(negative)
            scales = [job.request.guidance_scale for job in jobs]
            batch = arrange_rows(self._pipeline.backend, conditional, unconditional, scales)
            sampler = Sampler(self._pipeline.engines, self.schedule, batch)
        self._samplers[key] = sampler
        while len(self._samplers) > REMEMBERED_BATCHES:
            self._samplers.popitem(last=False)
        return sampler

    def decode(self, latents: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Pixels of every image."""
        return list(self._pipeline.engines["vae_decoder"].run({"latents": np.stack(latents)})["image"].numpy())
