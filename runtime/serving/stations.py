"""The scheduler's stations over a pipeline's engines: jobs become the rows of a batch, and come back as latents."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from runtime.answers import Answer
from runtime.backends import DeviceTensor, to_host
from runtime.chat import ChatInputs
from runtime.errors import CancelledError, InputError
from runtime.pipeline import LatteFlowPipeline
from runtime.plans import most_in_plans
from runtime.sampler import Sampler
from runtime.serving.jobs import AnswerJob, EncodedPrompt, ImageJob, Station
from runtime.serving.requests import AnswerRequest, AnyRequest

REMEMBERED_BATCHES = 4
"""Arranged batches kept in memory: about as many as there are groups of requests at different flow times."""


@dataclass(frozen=True)
class _Batch:
    """The latents of a batch after a step, where the engines left them."""

    sampler: Sampler
    latents: DeviceTensor
    """By image, `[B, C, H, W]` float32."""
    row_latents: DeviceTensor
    """By row, `[R, C, H, W]` float32."""

    @cached_property
    def on_host(self) -> np.ndarray:
        """The latents by image: one copy for all of its images."""
        return self.latents.numpy()


class StepLatents:
    """The latents of one image of a batch, `[C, H, W]` float32: a `DeviceTensor`."""

    dtype = "float32"

    def __init__(self, batch: _Batch, index: int) -> None:
        self.batch = batch
        self._index = index

    @property
    def shape(self) -> tuple[int, ...]:
        return self.batch.latents.shape[1:]

    def numpy(self) -> np.ndarray:
        """Returns a copy on the host."""
        latents: np.ndarray = self.batch.on_host[self._index]
        return latents


def _batch_of(jobs: Sequence[ImageJob], sampler: Sampler) -> _Batch | None:
    """Returns the batch in which these jobs, as the sampler has them, made their last step; None if there is none."""
    first = jobs[0].latents
    if not isinstance(first, StepLatents) or first.batch.sampler is not sampler:
        return None
    together = all(isinstance(job.latents, StepLatents) and job.latents.batch is first.batch for job in jobs)
    return first.batch if together else None


class PipelineStations:
    """Runs batches of jobs on a pipeline's engines."""

    def __init__(self, pipeline: LatteFlowPipeline) -> None:
        geometry = pipeline.manifest.geometry
        self.schedule = pipeline.manifest.schedule
        self.sampling = pipeline.manifest.sampling
        self.latent_shape = (geometry.latent_channels, *geometry.latent_size)
        self._pipeline = pipeline
        self._samplers: OrderedDict[tuple[tuple[int, int], ...], Sampler] = OrderedDict()
        manifest, provider = pipeline.manifest, pipeline.backend.name
        self._max_rows: dict[Station, int | None] = {
            "encode": most_in_plans(manifest, provider, "vlm", "batch", past=0),
            "decode": most_in_plans(manifest, provider, "vae_decoder", "batch"),
            "prefill": 1,
            "write": most_in_plans(manifest, provider, "vlm", "batch", tokens=1, past=1),
        }
        solver = [most_in_plans(manifest, provider, "solver_step", axis) for axis in ("rows", "batch")]
        for group in range(self.schedule.num_groups):
            limits = [most_in_plans(manifest, provider, f"expert_{group}", "rows"), *solver]
            self._max_rows[group] = min((limit for limit in limits if limit is not None), default=None)
        self._max_tokens = most_in_plans(manifest, provider, "vlm", "tokens", past=0, image_tokens=1)

    def max_rows(self, station: Station) -> int | None:
        """Returns how many rows a run of the station can have: what the plans' profiles allow, or None."""
        return self._max_rows[station]

    def check(self, request: AnyRequest) -> None:
        """Raises `InputError` for what the model cannot draw; questions are checked when they are read."""
        if isinstance(request, AnswerRequest):
            return
        self.sampling.check(request.num_inference_steps, request.guidance_scale, request.shift, request.negative_prompt)
        for prompt in (request.prompt, request.negative_prompt):
            tokens = len(self._pipeline.chat.prompt_tokens(prompt))
            if self._max_tokens is not None and tokens > self._max_tokens:
                raise InputError(
                    f"a prompt has {tokens} tokens in its chat template, the service's plans take {self._max_tokens}; "
                    "shorten it"
                )

    def encode(self, jobs: Sequence[ImageJob]) -> list[EncodedPrompt]:
        """Encodes each distinct prompt once, and none that is remembered."""
        prompts = self._pipeline.encode_prompts([job.request.prompt for job in jobs])
        guided = [job.request.negative_prompt for job in jobs if job.is_ever_guided]
        negatives = iter(self._pipeline.encode_prompts(guided))
        return [
            EncodedPrompt(prompt, next(negatives) if job.is_ever_guided else None)
            for job, prompt in zip(jobs, prompts, strict=True)
        ]

    def step(self, group: int, jobs: Sequence[ImageJob]) -> list[StepLatents]:
        """Runs one step of every job, each at its own time.

        Latents of a batch that was stepped before stay on the device; if others join or some leave, all go through the
        host. The run has ended when this returns, so that the scheduler learns what it costs.
        """
        sampler = self._sampler(jobs)
        times = np.array([job.times[job.index : job.index + 2] for job in jobs]).T  # [2, B]
        (inputs,) = sampler.step_inputs(times)
        batch = _batch_of(jobs, sampler)
        if batch is None:
            latents = np.stack([to_host(job.latents) for job in jobs])
            stepped = sampler.step(latents, sampler.rows_of(latents), inputs)
        else:
            stepped = sampler.step(batch.latents, batch.row_latents, inputs)
        self._pipeline.backend.synchronize()
        after = _Batch(sampler, *stepped)
        return [StepLatents(after, index) for index in range(len(jobs))]

    def _sampler(self, jobs: Sequence[ImageJob]) -> Sampler:
        """Returns the sampler for a batch of jobs; their prefixes are arranged again only when the batch changes."""
        key = tuple((job.number, job.rows) for job in jobs)
        sampler = self._samplers.pop(key, None)
        if sampler is None:
            encoded = [(job.encoded, job.rows) for job in jobs if job.encoded is not None]
            conditional = [prompts.prompt for prompts, _ in encoded]
            unconditional = [
                prompts.negative for prompts, rows in encoded if rows == 2 and prompts.negative is not None
            ]
            scales = [job.scale for job in jobs]
            sampler = self._pipeline.sampler_of(conditional, unconditional, scales)
        self._samplers[key] = sampler
        while len(self._samplers) > REMEMBERED_BATCHES:
            self._samplers.popitem(last=False)
        return sampler

    def decode(self, latents: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns the pixels of every image."""
        return list(self._pipeline.decode(np.stack(latents)))

    def read(self, request: AnswerRequest) -> ChatInputs:
        """Decodes the images of a question and tokenises it."""
        return self._pipeline.chat.encode_conversations([request.conversation])

    def prefill(self, job: AnswerJob) -> tuple[Answer, str]:
        """Begins an answer; looks for a cancellation between any two runs of engines."""

        def stop_if_cancelled() -> None:
            if job.handle.cancelled:
                raise CancelledError("the request was cancelled")

        assert job.inputs is not None
        answers, texts = self._pipeline.answerer.begin(job.inputs, job.request.settings, stop_if_cancelled)
        return answers[0], texts[0]

    def write(self, jobs: Sequence[AnswerJob]) -> list[str]:
        """Adds a token to every answer, in one run."""
        return self._pipeline.answerer.write([job.answer for job in jobs if job.answer is not None])
