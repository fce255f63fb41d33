"""Scenes, their captions and questions, and the scorer that reads them back from pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from latte.shapes.captions import caption, describe, rephrase, short_caption, unseen_phrasing
from latte.shapes.questions import questions
from latte.shapes.reader import judge, read_image
from latte.shapes.scenes import (
    BACKGROUNDS,
    CELLS,
    COLOURS,
    KINDS,
    RADII,
    Scene,
    Shape,
    coverage,
    draw,
    is_held_out,
    mirrored,
    sample_busy_scene,
    sample_scene,
    with_another_kind,
)


def test_the_world_is_as_rich_as_promised() -> None:
    assert set(KINDS) >= {"circle", "square", "triangle", "diamond", "star", "ring", "cross"}
    assert len(COLOURS) >= 8
    assert (len(RADII), len(CELLS), len(BACKGROUNDS)) == (3, 9, 5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", RADII)
def test_the_scorer_reads_every_shape_in_every_cell(kind: str, size: str) -> None:
    for index, cell in enumerate(CELLS):
        colour = list(COLOURS)[index % len(COLOURS)]
        scene = Scene((Shape(kind, colour, size, cell),), "grey")
        verdict = judge(scene, read_image(draw(scene)))
        assert verdict["all"], (scene, verdict)


def test_the_scorer_reads_random_scenes_of_one_and_two_shapes() -> None:
    rng = np.random.default_rng(0)
    for i in range(200):
        scene = sample_scene(rng, held_out=bool(i % 2))
        _, stated = caption(scene, rng)
        assert judge(stated, read_image(draw(scene)))["all"], scene


@pytest.mark.parametrize(
    ("attribute", "wrong"),
    [
        ("colour", Scene((Shape("star", "green", "large", "top"),), "white")),
        ("kind", Scene((Shape("cross", "red", "large", "top"),), "white")),
        ("size", Scene((Shape("star", "red", "small", "top"),), "white")),
        ("position", Scene((Shape("star", "red", "large", "left"),), "white")),
        ("background", Scene((Shape("star", "red", "large", "top"),), "beige")),
    ],
)
def test_the_scorer_finds_the_one_wrong_attribute(attribute: str, wrong: Scene) -> None:
    prompt = Scene((Shape("star", "red", "large", "top"),), "white")
    verdict = judge(prompt, read_image(draw(wrong)))
    assert [name for name, right in verdict.items() if not right] == [attribute, "all"]


def test_the_scorer_finds_a_missing_shape_and_a_wrong_relation() -> None:
    first, second = Shape("star", "red", "large", "top"), Shape("ring", "blue", "small", "bottom")
    prompt = Scene((first, second), "white", "below")
    assert not judge(prompt, read_image(draw(Scene((first,), "white"))))["count"]
    verdict = judge(prompt, read_image(draw(Scene((first, second), "white", "above"))))
    assert [name for name, right in verdict.items() if not right] == ["relation", "all"]


def _specks(image: np.ndarray, _: Scene) -> None:
    rng = np.random.default_rng(1)
    for row, column in rng.integers(0, 62, (54, 2)):
        image[row : row + 2, column : column + 2] = rng.integers(0, 256, 3)


def _ghost(image: np.ndarray, _: Scene) -> None:
    image[:] = image - np.rint(20 * coverage("star", 7.5, (56.0, 56.0))[..., None]).astype(np.uint8)


def _stripes(image: np.ndarray, _: Scene) -> None:
    image[::4] -= 12
    image[1::4] -= 12


def _cut(image: np.ndarray, scene: Scene) -> None:
    assert scene.background is not None
    image[23:32, 23:32] = BACKGROUNDS[scene.background]


@pytest.mark.parametrize("spoil", [_specks, _ghost, _stripes, _cut])
def test_an_image_with_something_else_is_not_right(spoil: Callable[[np.ndarray, Scene], None]) -> None:
    scene = Scene((Shape("square", "red", "large", "center"),), "white")
    image = draw(scene)
    assert judge(scene, read_image(image))["all"]
    spoil(image, scene)
    assert not judge(scene, read_image(image))["all"]


def test_training_renders_nothing_that_is_held_out() -> None:
    """Not in scenes of two, of many, or in those that the loss compares with."""
    rng = np.random.default_rng(0)
    for _ in range(500):
        scene = sample_scene(rng)
        assert not is_held_out(scene)
        assert not is_held_out(with_another_kind(scene, rng))
        assert not is_held_out(sample_busy_scene(rng))


@pytest.mark.parametrize("count", [1, 2])
def test_scored_scenes_are_held_out_and_varied(count: int) -> None:
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng, held_out=True, count=count) for _ in range(300)]
    assert all(is_held_out(scene) for scene in scenes)
    assert {shape.kind for scene in scenes for shape in scene.shapes} == set(KINDS)
    assert {shape.colour for scene in scenes for shape in scene.shapes} == set(COLOURS)


def test_a_short_caption_says_colour_and_kind_only() -> None:
    scene = Scene((Shape("star", "orange", "large", "top left"),), "navy")
    text, stated = short_caption(scene)
    assert text == "an orange star"
    assert judge(stated, read_image(draw(scene)))["all"]
    for other in (replace(scene.shapes[0], colour="blue"), replace(scene.shapes[0], kind="ring")):
        assert not judge(stated, read_image(draw(Scene((other,), "white"))))["all"]


@pytest.mark.parametrize("count", [1, 2])
def test_training_says_no_sentence_that_is_scored_as_unseen(count: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(3):
        scene = sample_scene(rng, count=count)
        unseen = {unseen_phrasing(scene, rng)[0].strip(" .!") for _ in range(200)}
        assert len(unseen) > 8
        said = {rephrase(scene, rng, full=True)[0].strip(" .!") for _ in range(10_000)}
        assert not any(sentence in caption for caption in said for sentence in unseen)


def test_a_rephrased_caption_says_what_it_states() -> None:
    """Every attribute that is stated is in the words, or a synonym of it is."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        text, stated = rephrase(sample_scene(rng), rng)
        assert all(shape.colour in text for shape in stated.shapes), text
        assert stated.background is None or stated.background in text or "gray" in text, text


def test_noise_is_no_right_image() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert not judge(Scene((Shape("star", "red", "large", "top"),), "white"), read_image(noise))["all"]


def test_training_scenes_and_held_out_scenes_do_not_meet() -> None:
    rng = np.random.default_rng(0)
    assert not any(is_held_out(sample_scene(rng)) for _ in range(500))
    assert all(is_held_out(sample_scene(rng, held_out=True)) for _ in range(500))
    busy = [sample_busy_scene(rng) for _ in range(200)]
    assert not any(is_held_out(Scene((shape,), scene.background)) for scene in busy for shape in scene.shapes)


def test_another_kind_changes_one_kind_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        scene = sample_scene(rng)
        other = with_another_kind(scene, rng)
        changed = [a for a, b in zip(scene.shapes, other.shapes, strict=True) if a != b]
        assert len(changed) == 1
        assert {replace(s, kind="circle") for s in scene.shapes} == {replace(s, kind="circle") for s in other.shapes}
        assert (scene.background, scene.relation) == (other.background, other.relation)


def test_a_full_caption_states_everything_and_reads_as_english() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        scene = sample_scene(rng)
        text, stated = caption(scene, rng, full=True)
        words = text.replace(",", "").split()
        assert f"{scene.background} background" in text
        for shape in stated.shapes:
            assert {shape.kind, shape.colour, shape.size} <= set(words)
        assert "  " not in text
        assert " a orange" not in f" {text}"
        assert not text.startswith(("with", "on ,", ","))
        assert not text.endswith((",", " on", " with"))


def test_a_scene_has_one_canonical_description_from_either_side() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        scene = sample_scene(rng, count=2)
        assert describe(scene) == describe(mirrored(scene))


def test_answers_are_true() -> None:
    upper, lower = Shape("star", "red", "large", "top"), Shape("ring", "blue", "small", "bottom")
    scene = Scene((upper, lower), "white", "above")
    rng = np.random.default_rng(0)
    answers = dict(pair for _ in range(100) for pair in questions(scene, rng))
    assert answers["what colour is the star?"] == "red"
    assert answers["how many shapes are there?"] == "two"
    assert answers["what is above the ring?"] == "a red star"
    assert answers["what is below the star?"] == "a blue ring"
    assert answers["is the star below the ring?"] == "no"
    assert answers["is the ring below the star?"] == "yes"
    assert answers["where is the ring?"] == "bottom"
