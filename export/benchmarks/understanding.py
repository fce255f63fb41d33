"""Answers through the engines beside transformers' `generate`, on the same weights, in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from export.benchmarks.machine import resident_megabytes
from export.verify import inputs_of_reference
from latte.model import LatteFlow
from latte.scenes import draw, sample_scene
from runtime.answers import AnswerSettings
from runtime.chat import ChatInputs, user_message
from runtime.pipeline import LatteFlowPipeline

QUESTION = "describe the image"


@dataclass(frozen=True)
class Measured:
    """One side."""

    name: str
    first_token_seconds: list[float]
    """From the prompt's tokens and patches to the first token, a number for each round."""
    tokens_per_second: list[float]
    """After the first token."""

    @property
    def first_token(self) -> float:
        """Median, in seconds."""
        return statistics.median(self.first_token_seconds)

    @property
    def rate(self) -> float:
        """Median tokens per second."""
        return statistics.median(self.tokens_per_second)


@dataclass(frozen=True)
class Report:
    """Both sides, whether they said the same, and what the engines hold in memory."""

    engines: Measured
    transformers: Measured
    same_tokens: bool
    prompt_tokens: int
    new_tokens: int
    memory_mb: dict[str, float]
    """Resident memory that each stage adds: the VLM for prompts, then the vision tower and answering."""


def measure(
    pipe: LatteFlowPipeline, model: LatteFlow, new_tokens: int, rounds: int, on_round: Callable[[], None]
) -> Report:
    """Greedy answers of exactly `new_tokens` to one question about one picture, the sides taking turns."""
    transformers_logging.set_verbosity_error()  # it warns that no token ends an answer, which is what is wanted here
    memory = {}
    before = resident_megabytes() or 0.0
    pipe.prepare([QUESTION], [""], [1.0])
    memory["vlm, encoding a prompt"] = (resident_megabytes() or 0.0) - before
    before = resident_megabytes() or 0.0
    picture = draw(sample_scene(np.random.default_rng(0)))
    inputs = pipe.answerer.chat([[user_message([picture], QUESTION)]])
    ours, theirs = _engine_tokens(pipe, inputs, new_tokens)[0], _reference_tokens(model, inputs, new_tokens)[0]
    pipe.ask(picture, QUESTION, max_new_tokens=new_tokens)
    memory["the same vlm and the vision tower, answering"] = (resident_megabytes() or 0.0) - before
    engine_times, reference_times = [], []
    for _ in range(rounds):
        engine_times.append(_engine_tokens(pipe, inputs, new_tokens)[1:])
        reference_times.append(_reference_tokens(model, inputs, new_tokens)[1:])
        on_round()
    return Report(
        engines=_measured("engines", engine_times, new_tokens),
        transformers=_measured("transformers", reference_times, new_tokens),
        same_tokens=ours == theirs,
        prompt_tokens=inputs.input_ids.shape[1],
        new_tokens=new_tokens,
        memory_mb=memory,
    )


def _measured(name: str, times: list[tuple[float, float]], new_tokens: int) -> Measured:
    return Measured(name, [first for first, _ in times], [(new_tokens - 1) / rest for _, rest in times])


def _engine_tokens(pipe: LatteFlowPipeline, inputs: ChatInputs, new_tokens: int) -> tuple[list[int], float, float]:
    """Tokens, seconds to the first, seconds of the rest."""
    started = time.perf_counter()
    stamps, tokens = [], []
    for chosen in pipe.answerer.tokens(inputs, AnswerSettings(max_new_tokens=new_tokens)):
        stamps.append(time.perf_counter())
        tokens.append(int(chosen[0]))
    return tokens, stamps[0] - started, stamps[-1] - stamps[0]


class _Stamps:
    """A streamer: remembers when each token came. The first call brings the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: object) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to flush."""


@torch.no_grad()
def _reference_tokens(model: LatteFlow, inputs: ChatInputs, new_tokens: int) -> tuple[list[int], float, float]:
    reference_inputs = inputs_of_reference(model, inputs)
    streamer = _Stamps()
    started = time.perf_counter()
    generated = model.vlm.generate(
        **reference_inputs, do_sample=False, max_new_tokens=new_tokens, eos_token_id=-1, streamer=streamer
    )
    tokens = generated[0, inputs.input_ids.shape[1] :].tolist()
    first, last = streamer.times[1], streamer.times[-1]
    return tokens, first - started, last - first
