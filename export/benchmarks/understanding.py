"""Answers through the engines against transformers' `generate`, with the same weights, in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer
from rich.table import Table
from transformers.utils import logging as transformers_logging

from export.benchmarks.report import Against, AsJson, Publisher, app, bundle_for_the_run, resident_megabytes
from export.benchmarks.timing import take_turns
from export.reference import Reference
from latte.shapes.scenes import draw, sample_scene
from runtime.answers import AnswerSettings
from runtime.chat import ChatInputs, user_message
from runtime.console import progress_bar, stdout
from runtime.pipeline import LatteFlowPipeline

QUESTION = "describe the image"


@dataclass(frozen=True)
class AnswerTiming:
    """The times of one side."""

    name: str
    first_token_seconds: list[float]
    """Time from the prompt's tokens and patches to the first new token, for each round."""
    tokens_per_second: list[float]
    """Rate after the first token, for each round."""

    @property
    def first_token(self) -> float:
        """Median, in seconds."""
        return statistics.median(self.first_token_seconds)

    @property
    def rate(self) -> float:
        """Median tokens per second."""
        return statistics.median(self.tokens_per_second)


@dataclass(frozen=True)
class UnderstandingReport:
    """Both sides, whether they wrote the same tokens, and the memory of the engines."""

    engines: AnswerTiming
    transformers: AnswerTiming
    same_tokens: bool
    prompt_tokens: int
    new_tokens: int
    memory_mb: dict[str, float]
    """Resident memory that each stage adds: the VLM for prompts, then the vision tower and answering."""


def measure(
    pipe: LatteFlowPipeline, reference: Reference, new_tokens: int, rounds: int, on_round: Callable[[], None]
) -> UnderstandingReport:
    """Times greedy answers of exactly `new_tokens` to one question about one image; the sides take turns."""
    transformers_logging.set_verbosity_error()  # it warns that no token ends an answer, which is intended here
    memory = {}
    before = resident_megabytes() or 0.0
    pipe.encode_prompts([QUESTION])
    memory["vlm, encoding a prompt"] = (resident_megabytes() or 0.0) - before
    before = resident_megabytes() or 0.0
    image = draw(sample_scene(np.random.default_rng(0)))
    inputs = pipe.chat.encode_conversations([[user_message([image], QUESTION)]])
    pipe.ask(image, QUESTION, max_new_tokens=new_tokens)
    memory["the same vlm and the vision tower, answering"] = (resident_megabytes() or 0.0) - before
    turns = take_turns(
        {
            "engines": lambda _: _engine_answer(pipe, inputs, new_tokens),
            "transformers": lambda _: _reference_answer(reference, image, new_tokens),
        },
        rounds,
        on_round,
    )
    engines, transformers = (turns[name].results for name in ("engines", "transformers"))
    return UnderstandingReport(
        engines=_timing("engines", engines),
        transformers=_timing("transformers", transformers),
        same_tokens=engines[0].tokens == transformers[0].tokens,
        prompt_tokens=inputs.input_ids.shape[1],
        new_tokens=new_tokens,
        memory_mb=memory,
    )


class _Answer(NamedTuple):
    tokens: list[int]
    first_seconds: float
    """Time to the first token."""
    rest_seconds: float
    """Time of the other tokens."""


def _timing(name: str, answers: list[_Answer]) -> AnswerTiming:
    rates = [(len(answer.tokens) - 1) / answer.rest_seconds for answer in answers]
    return AnswerTiming(name, [answer.first_seconds for answer in answers], rates)


def _engine_answer(pipe: LatteFlowPipeline, inputs: ChatInputs, new_tokens: int) -> _Answer:
    started = time.perf_counter()
    stamps, tokens = [], []
    for chosen in pipe.answerer.tokens(inputs, AnswerSettings(max_new_tokens=new_tokens)):
        stamps.append(time.perf_counter())
        tokens.append(int(chosen[0]))
    return _Answer(tokens, stamps[0] - started, stamps[-1] - stamps[0])


class _Stamps:
    """A streamer that records when each token came. The first call has the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: object) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to flush."""


@torch.no_grad()
def _reference_answer(reference: Reference, image: np.ndarray, new_tokens: int) -> _Answer:
    inputs = reference.question_inputs([image], QUESTION)
    streamer = _Stamps()
    started = time.perf_counter()
    generated = reference.model.vlm.generate(
        **inputs, do_sample=False, max_new_tokens=new_tokens, eos_token_id=-1, streamer=streamer
    )
    tokens = generated[0, inputs["input_ids"].shape[1] :].tolist()
    first, last = streamer.times[1], streamer.times[-1]
    return _Answer(tokens, first - started, last - first)


@app.command(no_args_is_help=False)
def understanding(
    checkpoint: Annotated[str, typer.Argument(help="The name of a shipped checkpoint, or a folder.")] = "shapes",
    bundle: Annotated[Path | None, typer.Option(help="Its bundle; by default one is exported for the run.")] = None,
    new_tokens: Annotated[int, typer.Option(help="Number of tokens of each answer.", min=2)] = 64,
    rounds: Annotated[int, typer.Option(help="Number of answers of each side.", min=1)] = 9,
    against: Against = None,
    as_json: AsJson = False,
) -> None:
    """Time answers to one question about one image: the engines against transformers' `generate`.

    \b
    Examples:
      latte-flow bench understanding
      latte-flow bench understanding my-checkpoint --bundle my-bundle --json
    """
    publisher = Publisher(as_json, against)
    with bundle_for_the_run(bundle, checkpoint) as bundle:
        reference = Reference.from_pretrained(checkpoint)
        reference.model.vlm.set_attn_implementation("sdpa")
        with LatteFlowPipeline.from_pretrained(bundle) as pipe, progress_bar() as progress:
            task = progress.add_task("answer", total=rounds)
            report = measure(pipe, reference, new_tokens, rounds, lambda: progress.advance(task))

    def show() -> None:
        table = Table(
            "",
            "first token",
            "tokens per second",
            title=f"{report.prompt_tokens} tokens of prompt and image, {report.new_tokens} new ones, {rounds} rounds",
        )
        for side in (report.engines, report.transformers):
            table.add_row(side.name, f"{1000 * side.first_token:.1f} ms", f"{side.rate:.1f}")
        table.add_row(
            "engines are faster by",
            f"{report.transformers.first_token / report.engines.first_token:.2f}x",
            f"{report.engines.rate / report.transformers.rate:.2f}x",
        )
        stdout.print(table)
        stdout.print(f"both sides wrote the same tokens: {'yes' if report.same_tokens else 'NO'}")
        for stage, megabytes in report.memory_mb.items():
            stdout.print(f"memory, {stage}: {megabytes:+.1f} MB", highlight=False)

    publisher.publish(_as_dict(report), show)


def _as_dict(report: UnderstandingReport) -> dict[str, object]:
    sides = (report.engines, report.transformers)
    return {
        "prompt_tokens": report.prompt_tokens,
        "new_tokens": report.new_tokens,
        "same_tokens": report.same_tokens,
        "memory_mb": report.memory_mb,
        **{
            side.name: {
                "first_token_seconds": side.first_token_seconds,
                "tokens_per_second": side.tokens_per_second,
            }
            for side in sides
        },
    }
