"""Jobs, the units of work of a scheduler, and the stations where they wait."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from runtime.answers import Answer
from runtime.backends import Value
from runtime.chat import ChatInputs
from runtime.flow_time import ExpertSchedule, SamplingDefaults
from runtime.rows import PrefixRow, is_guided
from runtime.serving.requests import AnswerRequest, AnyRequest, GenerationRequest, Handle

Station = Literal["encode", "decode", "prefill", "write"] | int
"""Where a job waits. A number is an expert group; "prefill" reads a question, "write" adds a token to answers."""


@dataclass(frozen=True)
class EncodedPrompt:
    """The encoded prompt of a job, and its negative prompt if the job is guided."""

    prompt: PrefixRow
    negative: PrefixRow | None


@dataclass(eq=False)
class Job:
    """A unit of work: an image or an answer."""

    number: int
    """A number that no other job of the scheduler has."""
    handle: Handle
    expires: float
    """On the scheduler's clock."""
    arrived: float
    """On the scheduler's clock."""
    sharers: int = field(default=1, kw_only=True)
    """Number of jobs that share one weight: those of its client, or of its request if the client has no id."""
    error: Exception | None = field(default=None, kw_only=True)
    """Why it cannot be run: its question could not be read."""

    @property
    def rows(self) -> int:
        """Number of rows that it has in a batch."""
        return 1

    def station(self, schedule: ExpertSchedule) -> Station | None:
        """Returns where it waits; None while it cannot be run."""
        raise NotImplementedError


@dataclass(eq=False)
class ImageJob(Job):
    """One image that is being made."""

    request: GenerationRequest
    image: int
    latents: Value
    """x at `times[index]`, `[C, H, W]` float32; from its first step to its last it may stay on the device."""
    times: list[float]
    scales: list[float]
    """With which its rows are combined in each step; with 1 it has a single row."""
    index: int = 0
    """Number of steps that it has finished."""
    encoded: EncodedPrompt | None = None

    @property
    def scale(self) -> float:
        """With which its rows are combined in its next step."""
        return self.scales[min(self.index, len(self.scales) - 1)]

    @property
    def is_ever_guided(self) -> bool:
        """Whether any of its steps has two rows."""
        return any(map(is_guided, self.scales))

    @property
    def rows(self) -> int:
        """Number of rows that it has in an expert's batch."""
        return 2 if is_guided(self.scale) else 1

    @property
    def t(self) -> float:
        return self.times[self.index]

    def station(self, schedule: ExpertSchedule) -> Station:
        """Returns where it waits."""
        if self.encoded is None:
            return "encode"
        return "decode" if self.index + 1 == len(self.times) else schedule.group_of(self.t)


@dataclass(eq=False)
class AnswerJob(Job):
    """One answer that is being written."""

    request: AnswerRequest
    reading: bool = False
    """Whether its question is being read, or was."""
    inputs: ChatInputs | None = None
    """The question, once its images are decoded and its text is tokenised."""
    answer: Answer | None = None

    def station(self, schedule: ExpertSchedule) -> Station | None:
        """Returns where it waits; None while its question is being read."""
        if self.answer is not None:
            return "write"
        return None if self.inputs is None else "prefill"


class Stations(Protocol):
    """The work that the scheduler distributes. A batch that raises may be tried again in parts."""

    schedule: ExpertSchedule
    sampling: SamplingDefaults
    latent_shape: tuple[int, int, int]

    def max_rows(self, station: Station) -> int | None:
        """Returns how many rows a run of the station can have; None if the engines set no limit."""

    def check(self, request: AnyRequest) -> None:
        """Raises `InputError` for what the model cannot draw, before the request is queued."""

    def encode(self, jobs: Sequence[ImageJob]) -> list[EncodedPrompt]:
        """Returns the encoded prompts of every job."""

    def step(self, group: int, jobs: Sequence[ImageJob]) -> Sequence[Value]:
        """Returns the latents of every job after its next step, from `times[index]` to `times[index + 1]`."""

    def decode(self, latents: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns the pixels of every image, `[height, width, 3]` uint8."""

    def read(self, request: AnswerRequest) -> ChatInputs:
        """Decodes the images of a question and tokenises it. Needs no engine; called from threads of its own."""

    def prefill(self, job: AnswerJob) -> tuple[Answer, str]:
        """Begins an answer; returns it with its first text. Raises `CancelledError` as soon as the job is cancelled."""

    def write(self, jobs: Sequence[AnswerJob]) -> list[str]:
        """Adds a token to every answer; returns the new text of each."""
