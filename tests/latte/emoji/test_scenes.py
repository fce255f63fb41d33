"""Scenes of emoji, what is held out, their captions and questions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from latte.emoji.captions import caption, describe, unseen_phrasing
from latte.emoji.catalogue import Catalogue
from latte.emoji.questions import WHAT, questions
from latte.emoji.scenes import (
    BACKGROUNDS,
    PLACES,
    SIZES,
    Placed,
    Scene,
    draw,
    is_held_out,
    is_held_out_emoji,
    is_held_out_pair,
    sample_busy_scene,
    sample_scene,
    with_another_emoji,
)

ONE = Scene((Placed("grinning face", "large", "top left"),), "teal")
TWO = Scene((Placed("red disc", "small", "left"), Placed("green box", "small", "right")), "navy")
DIAGONAL = Scene((Placed("red disc", "small", "top left"), Placed("green box", "small", "bottom right")), "navy")


def scenes(catalogue: Catalogue, count: int, *, held_out: bool = False) -> list[Scene]:
    rng = np.random.default_rng(0)
    return [sample_scene(catalogue.names, rng, held_out=held_out) for _ in range(count)]


def test_training_never_shows_a_held_out_combination(catalogue: Catalogue) -> None:
    """Not alone, not beside another emoji, not in a busy scene, and not in a scene with an emoji exchanged."""
    rng = np.random.default_rng(1)
    seen = scenes(catalogue, 1500)
    seen += [with_another_emoji(scene, catalogue.names, rng) for scene in seen[:200]]
    seen += [sample_busy_scene(catalogue.names, rng) for _ in range(500)]
    for scene in seen:
        names = [emoji.name for emoji in scene.emoji]
        assert not any(is_held_out_emoji(emoji, scene.background) for emoji in scene.emoji)
        assert not any(is_held_out_pair(a, b) for i, a in enumerate(names) for b in names[:i])


def test_what_is_scored_was_held_out(catalogue: Catalogue) -> None:
    for scene in scenes(catalogue, 300, held_out=True):
        assert is_held_out(scene)
        if len(scene.emoji) == 2:
            assert is_held_out_pair(scene.emoji[0].name, scene.emoji[1].name)


def test_a_tenth_of_all_combinations_is_held_out(catalogue: Catalogue) -> None:
    """The rule is a fixed hash of names, so these counts never change; 10 % of 3,420 are 342."""
    combinations = [
        is_held_out_emoji(Placed(name, size, place), background)
        for name in catalogue.names
        for size in SIZES
        for place in PLACES
        for background in BACKGROUNDS
    ]
    assert 0.085 < np.mean(combinations) < 0.115
    assert is_held_out_pair("a", "b") == is_held_out_pair("b", "a")


def test_a_scene_that_is_held_out_gets_no_other_emoji(catalogue: Catalogue) -> None:
    scene = sample_scene(catalogue.names, np.random.default_rng(0), held_out=True)
    with pytest.raises(ValueError, match="training may render"):
        with_another_emoji(scene, catalogue.names, np.random.default_rng(0))


def test_an_image_is_background_wherever_there_is_no_emoji(catalogue: Catalogue) -> None:
    image = draw(TWO, catalogue)
    covered = np.zeros((64, 64), bool)
    for emoji in TWO.emoji:
        covered[emoji.window] = True
    assert np.all(image[~covered] == BACKGROUNDS["navy"])
    assert tuple(image[32, 16]) == (220, 30, 30)


def test_a_scene_survives_json() -> None:
    assert Scene.from_json(TWO.to_json()) == TWO
    with pytest.raises(ValueError, match="expected the JSON of a scene"):
        Scene.from_json('{"emoji": 3}')


@pytest.mark.parametrize(
    ("scene", "text"),
    [
        (ONE, "large grinning face at the top left on a teal background"),
        (TWO, "red disc left of green box on a navy background"),
        (DIAGONAL, "red disc at the top left and green box at the bottom right on a navy background"),
        (replace(ONE, background=None), "large grinning face at the top left"),
        (Scene((Placed("lol", None, None),), None), "lol"),
        (Scene(tuple(replace(e, size=None, place=None) for e in TWO.emoji), None), "green box and red disc"),
    ],
)
def test_the_canonical_caption(scene: Scene, text: str) -> None:
    assert describe(scene) == text


def test_captions_say_what_they_state_and_nothing_else(catalogue: Catalogue) -> None:
    rng = np.random.default_rng(2)
    for scene in scenes(catalogue, 400):
        text, stated = caption(scene, catalogue, rng)
        assert text == " ".join(text.split()).strip(",:")
        for emoji in scene.emoji:
            known = catalogue[emoji.name]
            name = next(name for name in (known.name, *known.synonyms) if name in text)
            text = text.replace(name, "")  # it may have the name of a colour
        assert (stated.background is not None) == (f"{scene.background}" in text)


def test_full_captions_state_everything(catalogue: Catalogue) -> None:
    rng = np.random.default_rng(3)
    for scene in scenes(catalogue, 100):
        for stated in (caption(scene, catalogue, rng, full=True)[1], unseen_phrasing(scene, rng)[1]):
            assert stated.background == scene.background
            assert [e.place for e in stated.emoji] == [e.place for e in scene.emoji]
            assert len(scene.emoji) == 2 or stated == scene


def test_answers_are_those_of_the_scene(catalogue: Catalogue) -> None:
    rng = np.random.default_rng(4)
    asked: dict[str, set[str]] = {}
    for _ in range(60):
        for question, answer in questions(TWO, catalogue.names, rng):
            asked.setdefault(question, set()).add(answer)
    assert all(len(answers) == 1 for answers in asked.values())
    assert asked[WHAT] == {"red disc and green box"}
    assert asked["what is on the left?"] == {"red disc"}
    assert asked["what is right of the red disc?"] == {"green box"}
    assert asked["where is the green box?"] == {"on the right"}
    assert asked["what colour is the background?"] == {"navy"}
    assert asked["how many emoji are there?"] == {"two"}
    assert asked["is there a red disc?"] == {"yes"}
    alone = dict(questions(ONE, catalogue.names, np.random.default_rng(6)))
    assert "large" in alone.values()
    assert "at the top left" in alone.values()


def test_names_have_an_order_that_the_scene_determines(catalogue: Catalogue) -> None:
    """The places give the order; a caption that leaves them open may name either emoji first."""
    open_scene = Scene(tuple(replace(emoji, place=None) for emoji in TWO.emoji), "navy")
    for scene, expected in ((TWO, "red disc and green box"), (open_scene, "green box and red disc")):
        for seed in range(5):
            assert expected in dict(questions(scene, catalogue.names, np.random.default_rng(seed))).values()
