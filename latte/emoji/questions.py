"""Questions about a scene of emoji, with their answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from latte.emoji.captions import article_of, at
from latte.emoji.scenes import RELATIONS, Placed, Scene, choose

DESCRIBE = "describe the image"
"""The question whose answer is `captions.describe(scene)`."""
WHAT = "what is this?"
"""The question whose answer is the name of the emoji, or the names of both."""
_NUMBERS = {1: "one", 2: "two"}


def questions(scene: Scene, names: Sequence[str], rng: np.random.Generator) -> list[tuple[str, str]]:
    """Returns questions with answers, in random phrasing, about the attributes of a scene that are not None.

    Args:
        names: the names of all emoji, to ask for one that is not there.
    """
    present = [emoji.name for emoji in scene.emoji]
    asked = [
        (WHAT if rng.random() < 0.7 else choose(rng, _WHAT[len(present)]), " and ".join(_in_order(scene))),
        (choose(rng, ("how many emoji are there?", "how many emoji are in the image?")), _NUMBERS[len(present)]),
    ]
    if scene.background is not None:
        asked.append(
            (choose(rng, ("what colour is the background?", "what is the background colour?")), scene.background)
        )
    for emoji in scene.emoji:
        asked += _about(emoji, rng, alone=len(present) == 1)
    asked += _relation(scene, rng)
    other = choose(rng, present if rng.random() < 0.5 else names)
    asked.append((f"is there {article_of(other)} {other}?", "yes" if other in present else "no"))
    return asked


def _in_order(scene: Scene) -> list[str]:
    """Returns the names as a viewer reads them, by place, or in alphabetical order where places are left open."""
    names = [emoji.name for emoji in scene.emoji]
    return sorted(names) if any(emoji.place is None for emoji in scene.emoji) else names


_WHAT = {
    1: ("which emoji is this?", "what does the image show?", "what is in the image?"),
    2: ("which emoji are these?", "what does the image show?", "what is in the image?"),
}


def _about(emoji: Placed, rng: np.random.Generator, *, alone: bool) -> list[tuple[str, str]]:
    asked = []
    if emoji.place is not None:
        asked.append((f"what is {at(emoji.place)}?", emoji.name))
        asked.append(
            ("where is it?" if alone and rng.random() < 0.3 else f"where is the {emoji.name}?", at(emoji.place))
        )
    if alone and emoji.size is not None:
        it = "it" if rng.random() < 0.3 else f"the {emoji.name}"
        asked.append((choose(rng, (f"what size is {it}?", f"how big is {it}?")), emoji.size))
    return asked


def _relation(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str]]:
    if len(scene.emoji) != 2:
        return []
    first, second = scene.emoji
    relation = RELATIONS.get((str(first.place), str(second.place)))
    if relation is None:
        return []
    if rng.random() < 0.5:
        first, second, relation = second, first, {"above": "below", "left of": "right of"}[relation]
    return [(f"what is {relation} the {second.name}?", first.name)]
