"""The judge reads drawings without error, forgives blur, JPEG and noise, and notices what is wrong."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from latte.emoji.catalogue import Catalogue
from latte.emoji.reader import ATTRIBUTES, Reader, judge
from latte.emoji.scenes import Scene, draw, sample_scene


@pytest.fixture(scope="module")
def reader(catalogue: Catalogue) -> Reader:
    return Reader(catalogue)


@pytest.fixture(scope="module")
def drawn(catalogue: Catalogue) -> tuple[list[Scene], np.ndarray]:
    rng = np.random.default_rng(0)
    scenes = [sample_scene(catalogue.names, rng, count=1 + i % 2, held_out=i % 3 == 0) for i in range(150)]
    return scenes, np.stack([draw(scene, catalogue) for scene in scenes])


def as_jpeg(image: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=60)
    return np.asarray(Image.open(file).convert("RGB"))


def blurred(image: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(1)))


def noisy(image: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(image.tobytes()[0]).normal(0, 12, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def tinted(image: np.ndarray) -> np.ndarray:
    return np.clip(image.astype(int) + np.array([6, -6, 6]), 0, 255).astype(np.uint8)


def test_every_drawing_is_read_as_its_scene(reader: Reader, drawn: tuple[list[Scene], np.ndarray]) -> None:
    scenes, images = drawn
    for scene, found in zip(scenes, reader.read(images), strict=True):
        assert found.scene == scene
        assert found.is_clean
        assert judge(scene, found) == dict.fromkeys((*ATTRIBUTES, "all"), True)


@pytest.mark.parametrize("change", [as_jpeg, blurred, noisy, tinted])
def test_a_drawing_that_is_not_quite_exact_is_right(
    reader: Reader, drawn: tuple[list[Scene], np.ndarray], change: object
) -> None:
    scenes, images = drawn
    changed = np.stack([change(image) for image in images])  # type: ignore[operator]
    right = [judge(scene, found)["all"] for scene, found in zip(scenes, reader.read(changed), strict=True)]
    assert np.mean(right) >= 0.98


@pytest.mark.parametrize("attribute", ["emoji", "size", "place", "background"])
def test_a_wrong_attribute_is_noticed(reader: Reader, catalogue: Catalogue, attribute: str) -> None:
    rng = np.random.default_rng(1)
    scene = sample_scene(catalogue.names, rng, count=1)
    (emoji,) = scene.emoji
    wrong = {
        "emoji": replace(scene, emoji=(replace(emoji, name="red disc" if emoji.name != "red disc" else "lol"),)),
        "size": replace(scene, emoji=(replace(emoji, size="small" if emoji.size == "large" else "large"),)),
        "place": replace(scene, emoji=(replace(emoji, place="top" if emoji.place != "top" else "left"),)),
        "background": replace(scene, background="teal" if scene.background != "teal" else "pink"),
    }[attribute]
    verdict = judge(wrong, reader.read(draw(scene, catalogue)[None])[0])
    assert {name for name, right in verdict.items() if not right} == {attribute, "all"}


def test_what_the_prompt_leaves_open_is_not_judged(reader: Reader, catalogue: Catalogue) -> None:
    scene = sample_scene(catalogue.names, np.random.default_rng(2), count=2)
    stated = Scene(tuple(replace(e, size=None, place=None) for e in scene.emoji), None)
    verdict = judge(stated, reader.read(draw(scene, catalogue)[None])[0])
    assert verdict == {"emoji": True, "clean": True, "all": True}


def test_exchanged_emoji_are_at_the_wrong_places(reader: Reader, catalogue: Catalogue) -> None:
    scene = sample_scene(catalogue.names, np.random.default_rng(3), count=2)
    first, second = scene.emoji
    exchanged = replace(scene, emoji=(replace(first, place=second.place), replace(second, place=first.place)))
    verdict = judge(exchanged, reader.read(draw(scene, catalogue)[None])[0])
    assert verdict["emoji"]
    assert not verdict["place"]


def test_a_missing_emoji_and_one_too_many_are_wrong(reader: Reader, catalogue: Catalogue) -> None:
    two = sample_scene(catalogue.names, np.random.default_rng(4), count=2)
    one = replace(two, emoji=two.emoji[:1])
    seen_two, seen_one = reader.read(np.stack([draw(two, catalogue), draw(one, catalogue)]))
    assert not judge(two, seen_one)["emoji"]
    assert not judge(one, seen_two)["emoji"]
    assert judge(one, seen_one)["all"]


def test_a_plain_background_shows_nothing(reader: Reader) -> None:
    found = reader.read(np.full((1, 64, 64, 3), (0, 134, 118), np.uint8))[0]
    assert found.scene == Scene((), "teal")


def test_a_speck_is_not_clean(reader: Reader, catalogue: Catalogue) -> None:
    scene = Scene(sample_scene(catalogue.names, np.random.default_rng(5), count=2).emoji[:1], "teal")
    scene = replace(scene, emoji=(replace(scene.emoji[0], place="top left"),))
    image = draw(scene, catalogue)
    image[50:58, 50:58] = 255
    verdict = judge(scene, reader.read(image[None])[0])
    assert {name for name, right in verdict.items() if not right} == {"clean", "all"}


def test_images_of_another_size_are_refused(reader: Reader) -> None:
    with pytest.raises(ValueError, match="expected RGB images of shape"):
        reader.read(np.zeros((1, 32, 32, 3), np.uint8))
