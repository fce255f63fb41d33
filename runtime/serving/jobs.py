"""Jobs, the units of work of a scheduler, and the stations where they wait."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from runtime.flow_time import ExpertSchedule
from runtime.rows import PrefixRow, is_guided
from runtime.serving.requests import GenerationRequest, Handle

Station = Literal["encode", "decode"] | int
"""Where a job waits: a number is an expert group."""


@dataclass(frozen=True)
class EncodedPrompt:
    """The encoded prompt of a job, and its negative prompt if the job is guided."""

    prompt: PrefixRow
    negative: PrefixRow | None


@dataclass(eq=False)
class Job:
    """One image that is being made."""

    number: int
    """A number that no other job of the scheduler has."""
    handle: Handle
    image: int
    latents: np.ndarray
    """x at `times[index]`, `[C, H, W]` float32."""
    times: list[float]
    expires: float
    """On the scheduler's clock."""
    arrived: float
    """On the scheduler's clock."""
    index: int = 0
    """Number of steps that it has finished."""
    encoded: EncodedPrompt | None = None
    sharers: int = 1
    """Number of jobs that share one weight: those of its client, or of its request if the client has no name."""

    @property
    def request(self) -> GenerationRequest:
        return self.handle.request

    @property
    def is_guided(self) -> bool:
        return is_guided(self.request.guidance_scale)

    @property
    def rows(self) -> int:
        """Number of rows that it has in an expert's batch."""
        return 2 if self.is_guided else 1

    @property
    def t(self) -> float:
        return self.times[self.index]

    def station(self, schedule: ExpertSchedule) -> Station:
        """Returns where it waits."""
        if self.encoded is None:
            return "encode"
        return "decode" if self.index + 1 == len(self.times) else schedule.group_of(self.t)


class Stations(Protocol):
    """The work that the scheduler distributes. A batch that raises may be tried again in parts."""

    schedule: ExpertSchedule
    latent_shape: tuple[int, int, int]

    def max_rows(self, station: Station) -> int | None:
        """Returns how many rows a run of the station can have; None if the engines set no limit."""

    def check(self, request: GenerationRequest) -> None:
        """Raises `InputError` for a prompt that cannot be encoded, before the request is queued."""

    def encode(self, jobs: Sequence[Job]) -> list[EncodedPrompt]:
        """Returns the encoded prompts of every job."""

    def step(self, group: int, jobs: Sequence[Job]) -> list[np.ndarray]:
        """Returns the latents of every job after its next step, from `times[index]` to `times[index + 1]`."""

    def decode(self, latents: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns the pixels of every image, `[height, width, 3]` uint8."""
