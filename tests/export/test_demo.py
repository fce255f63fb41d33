"""`latte-flow demo`: the whole way from the shipped checkpoint to images of its prompts, and answers about one."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from export.demo import PROMPTS
from latte.shapes.reader import judge, read_image
from latte.shapes.scenes import Scene, Shape
from runtime.manifest import load_manifest
from runtime.pipeline import LatteFlowPipeline

SHOWN = (
    Scene((Shape("circle", "red", "large", "center"),), "white"),
    Scene((Shape("star", "yellow", "medium", "top right"),), "navy"),
    Scene((Shape("diamond", "cyan", "small", "left"),), "black"),
    Scene((Shape("cross", "purple", "large", "bottom"),), "beige"),
    Scene((Shape("triangle", "green", "small"), Shape("ring", "orange", "large")), "white", "above"),
    Scene((Shape("square", "blue", "large"), Shape("star", "pink", "small")), "grey", "left of"),
    Scene((Shape("cross", "pink", "medium"), Shape("circle", "cyan", "medium")), "black", "below"),
    Scene((Shape("diamond", "green", "large"), Shape("square", "red", "medium")), "beige", "right of"),
)
"""What the demo's prompts state."""
ANSWERS = {
    "describe the image": "a medium yellow star at the top right on a navy background",
    "what colour is the star?": "yellow",
    "where is the star?": "top right",
    "what is the background colour?": "navy",
}


def test_it_prints_where_its_images_are(demo: tuple[Path, str]) -> None:
    folder, out = demo
    for name in ("grid.png", "trajectory.png", "answers.png", "steps.png", "emoji.png"):
        assert str(folder / name) in out
        with Image.open(folder / name) as image:
            assert min(image.size) > 200


@pytest.mark.parametrize("name", ["bundle", "bundle-4step", "bundle-emoji"])
def test_its_bundles_are_verified(demo: tuple[Path, str], name: str) -> None:
    parity = load_manifest(demo[0] / name).parity
    assert parity
    assert all(row.passed for row in parity)


@pytest.mark.parametrize("name", ["bundle", "bundle-4step"])
@pytest.mark.parametrize("index", range(len(PROMPTS)))
def test_it_draws_its_prompts(index: int, demo: tuple[Path, str], name: str) -> None:
    """The same seed draws the same image alone as in the demo's batch."""
    with LatteFlowPipeline.from_pretrained(demo[0] / name) as pipe:
        (image,) = pipe(PROMPTS[index], seed=index, output_type="np").images
    verdict = judge(SHOWN[index], read_image(image))
    assert verdict["all"], (PROMPTS[index], verdict)


def test_it_answers_about_an_image_of_its_own(demo: tuple[Path, str]) -> None:
    for question, answer in ANSWERS.items():
        assert f"{question} {answer}" in demo[1].splitlines()
