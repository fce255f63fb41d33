"""The shipped checkpoint `emoji` does what docs/emoji.md says of it; the tables there are of 500 prompts each.

The samples here are smaller, so their bars are the card's numbers less three standard deviations of the sample.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from latte.checkpoint import load_checkpoint, load_image_processor, resolve_checkpoint
from latte.emoji.catalogue import Catalogue, load_catalogue
from latte.emoji.package import fetch
from latte.emoji.questions import WHAT
from latte.emoji.score import score_answers, score_drawing
from latte.model import LatteFlow
from latte.score import answer
from runtime.errors import InputError

SAMPLE = 48


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    """The images of emoji, to judge by."""
    try:
        return load_catalogue(fetch(tmp_path_factory.mktemp("emoji") / "package"))
    except InputError as error:
        pytest.skip(f"the images to judge by could not be fetched: {error}")


@cache
def emoji() -> LatteFlow:
    return load_checkpoint("emoji")


def less_chance(share: float) -> float:
    """What a sample shows of a share with a chance of 99.9 %."""
    return share - 3 * (share * (1 - share) / SAMPLE) ** 0.5


@pytest.mark.parametrize(("count", "name", "background"), [(1, 0.85, 0.98), (2, 0.7, 0.98)])
def test_held_out_prompts_show_their_emoji(count: int, name: float, background: float, catalogue: Catalogue) -> None:
    def draw(prompts: list[str], seeds: list[int]) -> np.ndarray:
        return emoji().generate(list(prompts), seed=list(seeds))

    result = score_drawing(draw, catalogue, SAMPLE, emoji=count)  # type: ignore[arg-type]
    wrong = [(failure.prompt, failure.wrong) for failure in result.failures]
    assert result.share("emoji") >= less_chance(name), wrong
    assert result.share("background") >= less_chance(background), wrong


def test_it_names_emoji_in_images_that_training_never_shows(catalogue: Catalogue) -> None:
    processor = load_image_processor(Path(resolve_checkpoint("emoji")))
    vlm, tokenizer = emoji().vlm, emoji().tokenizer
    result = score_answers(
        lambda images, texts: answer(vlm, tokenizer, processor, images, texts), catalogue, SAMPLE, only=WHAT
    )
    assert result.share() >= less_chance(0.9), result.failures
