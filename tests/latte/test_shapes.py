"""The shipped checkpoint is good enough to look at. The full table is in docs/shapes.md; this is its smoke test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from latte.checkpoint import load_checkpoint, load_image_processor, resolve_checkpoint
from latte.model import LatteFlow
from latte.score import score_answers, score_drawing
from latte.understanding import answer


@pytest.fixture(scope="module")
def shapes() -> LatteFlow:
    return load_checkpoint("shapes")


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve_checkpoint("shapes")


@pytest.mark.parametrize(("count", "at_least"), [(1, 0.8), (2, 0.6)])
def test_it_draws_what_held_out_prompts_say(shapes: LatteFlow, count: int, at_least: float) -> None:
    """30 prompts vary by up to 8 points around the share of 500; the bounds lie well below that and above chance."""

    def draw(prompts: list[str], seeds: list[int]) -> np.ndarray:
        return shapes.generate(list(prompts), seed=list(seeds), num_inference_steps=20)

    result = score_drawing(draw, 30, count)  # type: ignore[arg-type]
    assert result.share() >= at_least, [(failure.prompt, failure.wrong) for failure in result.failures]


def test_it_answers_questions_about_held_out_pictures(shapes: LatteFlow, folder: Path) -> None:
    processor = load_image_processor(folder)
    result = score_answers(lambda images, texts: answer(shapes.vlm, shapes.tokenizer, processor, images, texts), 40)
    assert result.share() >= 0.85, result.failures
