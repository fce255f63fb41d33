"""The training data of the `emoji` world: scenes of one or two emoji on a plain background.

A scene is data (`Scene`). Everything else derives from it: its image (`draw`), captions that state some or all of it
(`latte.emoji.captions`), and questions with answers (`latte.emoji.questions`). Training never renders a scene that
`is_held_out`, so a model can be scored on combinations that it has not seen.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from latte.emoji.catalogue import SIDES, Catalogue

IMAGE_SIZE = 64
"""Height and width of an image in pixels."""
BACKGROUNDS = {
    "pink": (255, 180, 228),
    "peach": (236, 182, 150),
    "mint": (156, 246, 184),
    "lavender": (184, 170, 255),
    "blue": (116, 172, 255),
    "navy": (12, 20, 108),
    "green": (4, 98, 40),
    "purple": (78, 20, 138),
    "maroon": (96, 8, 26),
    "teal": (0, 134, 118),
}
"""The colour of each background, RGB. They were chosen so that no emoji vanishes on them, which rules out greys."""
SIZES = tuple(SIDES)
PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
OFFSETS = {"large": (0, 8, 16), "small": (0, 16, 32)}
"""Rows and columns of the emoji's upper left corner at the places, in pixels.

They are multiples of 8 because the autoencoder makes one latent of each 8x8 pixels: an emoji then has the same latents
at every place, and the flow layers learn each emoji once instead of once per place.
"""
PLACES_OF_TWO = (("top", "bottom"), ("left", "right"), ("top left", "bottom right"), ("top right", "bottom left"))
"""The places of two emoji, which are both small and do not touch."""
RELATIONS = {("top", "bottom"): "above", ("left", "right"): "left of"}
"""Where the first of two emoji is relative to the second, by their places."""
HELD_OUT_ONE_IN = 10


@dataclass(frozen=True)
class Placed:
    """An emoji somewhere. In a scene that a caption states, None marks an attribute that the caption omits."""

    name: str
    size: str | None
    place: str | None

    @property
    def window(self) -> tuple[slice, slice]:
        """The rows and columns of the image that it fills.

        Raises:
            ValueError: the size or the place is None.
        """
        if self.size is None or self.place is None:
            raise ValueError(f"an emoji to draw needs a size and a place, got {self}")
        row, column = (OFFSETS[self.size][i] for i in divmod(PLACES.index(self.place), 3))
        return slice(row, row + SIDES[self.size]), slice(column, column + SIDES[self.size])


@dataclass(frozen=True)
class Scene:
    """One emoji, or two that are small and differ, on a background."""

    emoji: tuple[Placed, ...]
    background: str | None

    def to_json(self) -> str:
        """Returns the scene as JSON."""
        emoji = [{"name": e.name, "size": e.size, "place": e.place} for e in self.emoji]
        return json.dumps({"emoji": emoji, "background": self.background})

    @classmethod
    def from_json(cls, text: str) -> Scene:
        """Returns a scene that `to_json` wrote.

        Raises:
            ValueError: the text is not such a scene.
        """
        try:
            data: Mapping[str, Any] = json.loads(text)
            emoji = tuple(Placed(e["name"], e["size"], e["place"]) for e in data["emoji"])
            return cls(emoji, data["background"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"expected the JSON of a scene, got {text[:80]!r}") from error


def is_held_out(scene: Scene) -> bool:
    """Returns whether a scene contains a combination that training never renders.

    One (emoji, size, place, background) in ten is held out, whether the emoji is alone or not, and so is one unordered
    pair of emoji in ten. A scene is held out if one of its emoji is, or two of them together are.
    """
    names = [emoji.name for emoji in scene.emoji]
    return any(is_held_out_emoji(emoji, scene.background) for emoji in scene.emoji) or any(
        is_held_out_pair(first, second) for i, first in enumerate(names) for second in names[:i]
    )


def is_held_out_emoji(emoji: Placed, background: str | None) -> bool:
    """Returns whether training never renders this emoji in this size, at this place, on this background."""
    return _is_one_in_ten(f"{emoji.name}, {emoji.size}, {emoji.place}, {background}")


def is_held_out_pair(first: str, second: str) -> bool:
    """Returns whether training never renders these two emoji in one image, by their names in any order."""
    return _is_one_in_ten(" and ".join(sorted((first, second))))


def _is_one_in_ten(key: str) -> bool:
    return zlib.crc32(key.encode()) % HELD_OUT_ONE_IN == 0


def sample_scene(
    names: Sequence[str],
    rng: np.random.Generator,
    *,
    held_out: bool = False,
    count: int | None = None,
    size: str | None = None,
) -> Scene:
    """Samples a random scene.

    Args:
        names: the emoji to choose from.
        held_out: whether the scene is one that training never renders: a held-out emoji, or a held-out pair of emoji.
        count: number of emoji, 1 or 2; by default one as often as two.
        size: of the emoji if there is one; by default large as often as small. Two are always small.
    """
    while True:
        scene = _sample_any(names, rng, count if count is not None else int(rng.integers(1, 3)), size)
        if not held_out and not is_held_out(scene):
            return scene
        # Two emoji are scored on the pair, whatever their places.
        if held_out and (
            is_held_out(scene) if len(scene.emoji) == 1 else is_held_out_pair(*(e.name for e in scene.emoji))
        ):
            return scene


def sample_busy_scene(names: Sequence[str], rng: np.random.Generator) -> Scene:
    """Samples a scene that is not held out, for stages that only learn what emoji look like.

    Half the scenes have one emoji, half have four small ones in the corners, which teach as much as four images.
    """
    if rng.random() < 0.5:
        return sample_scene(names, rng, count=1)
    background = choose(rng, tuple(BACKGROUNDS))
    emoji: list[Placed] = []
    for place in ("top left", "top right", "bottom left", "bottom right"):
        while True:
            placed = Placed(choose(rng, names), "small", place)
            if not is_held_out(Scene((*emoji, placed), background)):
                emoji.append(placed)
                break
    return Scene(tuple(emoji), background)


def with_another_emoji(scene: Scene, names: Sequence[str], rng: np.random.Generator) -> Scene:
    """Returns the scene with one random emoji replaced by another, and still not held out.

    Raises:
        ValueError: the scene is held out itself.
    """
    if is_held_out(scene):
        raise ValueError(f"expected a scene that training may render, got {scene}")
    changed = int(rng.integers(len(scene.emoji)))
    present = {emoji.name for emoji in scene.emoji}
    while True:
        other = replace(scene.emoji[changed], name=choose(rng, names))
        result = replace(scene, emoji=(*scene.emoji[:changed], other, *scene.emoji[changed + 1 :]))
        if other.name not in present and not is_held_out(result):
            return result


def _sample_any(names: Sequence[str], rng: np.random.Generator, count: int, size: str | None) -> Scene:
    background = choose(rng, tuple(BACKGROUNDS))
    if count == 1:
        return Scene((Placed(choose(rng, names), size or choose(rng, SIZES), choose(rng, PLACES)),), background)
    places = PLACES_OF_TWO[rng.integers(len(PLACES_OF_TWO))]
    first = int(rng.integers(len(names)))
    second = (first + 1 + int(rng.integers(len(names) - 1))) % len(names)
    emoji = (Placed(names[first], "small", places[0]), Placed(names[second], "small", places[1]))
    return Scene(emoji, background)


def choose(rng: np.random.Generator, options: Sequence[str]) -> str:
    """Returns one of the options at random."""
    return options[int(rng.integers(len(options)))]


def draw(scene: Scene, catalogue: Catalogue, colour: np.ndarray | None = None) -> np.ndarray:
    """Returns the image of a scene, `[64, 64, 3]` uint8.

    Args:
        colour: of the background, RGB in [0, 255], if it is not quite the named one.

    Raises:
        InputError: the catalogue has no such emoji.
        ValueError: the background, or a size or place, is None.
    """
    if scene.background is None:
        raise ValueError("a scene without a background cannot be drawn")
    image = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint16)
    image[:] = BACKGROUNDS[scene.background] if colour is None else colour
    for emoji in scene.emoji:
        rows, columns = emoji.window
        sprite = catalogue.sprites[str(emoji.size)][catalogue.index(emoji.name)].astype(np.uint16)
        behind = image[rows, columns] * (255 - sprite[..., 3:])
        image[rows, columns] = sprite[..., :3] + (behind + 127) // 255
    return np.minimum(image, 255).astype(np.uint8)
