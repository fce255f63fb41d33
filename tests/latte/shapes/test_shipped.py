"""The shipped checkpoints do what docs/shapes.md says of them; the tables there are of 500 prompts and questions each.

The samples here are smaller, so their bars are the card's numbers less three standard deviations of the sample.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from latte.checkpoint import load_checkpoint, load_image_processor, resolve_checkpoint
from latte.model import LatteFlow
from latte.score import answer
from latte.shapes.recipe import GUIDANCE_SCALE
from latte.shapes.score import score_answers, score_drawing

SAMPLE = 80


@cache
def shipped(name: str) -> LatteFlow:
    return load_checkpoint(name)


@pytest.fixture(scope="module")
def shapes() -> LatteFlow:
    return shipped("shapes")


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve_checkpoint("shapes")


@pytest.mark.parametrize(
    ("name", "count", "bar"),
    [("shapes", 1, 0.98), ("shapes", 2, 0.95), ("shapes-4step", 1, 0.975), ("shapes-4step", 2, 0.94)],
)
def test_held_out_prompts_are_drawn_right_in_every_attribute(name: str, count: int, bar: float) -> None:
    """In the steps that each checkpoint is for: 20 guided ones, or 4 of one row."""
    model = shipped(name)

    def draw(prompts: list[str], seeds: list[int]) -> np.ndarray:
        return model.generate(list(prompts), seed=list(seeds))

    result = score_drawing(draw, SAMPLE, shapes=count)  # type: ignore[arg-type]
    assert result.share() >= less_chance(bar), [(failure.prompt, failure.wrong) for failure in result.failures]


def test_its_guidance_scale_is_that_of_its_recipe_and_of_its_page(shapes: LatteFlow) -> None:
    assert shapes.config.sampling.guidance_scale == GUIDANCE_SCALE == 2.0


def test_it_answers_questions_about_held_out_images(shapes: LatteFlow, folder: Path) -> None:
    processor = load_image_processor(folder)
    result = score_answers(lambda images, texts: answer(shapes.vlm, shapes.tokenizer, processor, images, texts), SAMPLE)
    assert result.share() >= less_chance(0.98), result.failures


def less_chance(share: float) -> float:
    """What a sample shows of a share with a chance of 99.9 %."""
    return share - 3 * (share * (1 - share) / SAMPLE) ** 0.5


@pytest.mark.parametrize(("dtype", "psnr"), [(torch.float16, 50.0), (torch.bfloat16, 40.0)])
def test_it_draws_in_half_precision_with_rotary_frequencies_in_fp32(
    dtype: torch.dtype, psnr: float, shapes: LatteFlow
) -> None:
    half = load_checkpoint("shapes", dtype)
    assert half.flow.rotary_frequencies.dtype == torch.float32
    images = [model.generate("a red star on white", seed=3).astype(float) for model in (shapes, half)]
    error = np.square(images[0] - images[1]).mean()
    assert 10 * np.log10(255**2 / error) > psnr
