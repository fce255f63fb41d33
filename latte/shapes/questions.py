"""Questions about a scene, with their answers."""

from __future__ import annotations

import numpy as np

from latte.shapes.scenes import COLOURS, KINDS, RELATIONS, Scene, Shape, choose, mirrored

DESCRIBE = "describe the image"
"""The question whose answer is `captions.describe(scene)`."""


def questions(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Returns questions with answers, in random phrasing, about the attributes of a scene that are not None."""
    asked: list[tuple[str, str]] = [
        (choose(rng, ["how many shapes are there?", "how many shapes are in the image?"]), _NUMBERS[len(scene.shapes)])
    ]
    if scene.background is not None:
        asked.append(
            (choose(rng, ["what colour is the background?", "what is the background colour?"]), scene.background)
        )
    for shape in scene.shapes:
        asked += _about(shape, rng)
    present = {shape.kind for shape in scene.shapes}
    kind = choose(rng, sorted(present) if rng.random() < 0.5 else [k for k in KINDS if k not in present])
    asked.append((f"is there a {kind}?", _yes(kind in present)))
    asked += relation_questions(scene, rng)
    return asked


def _about(shape: Shape, rng: np.random.Generator) -> list[tuple[str, str]]:
    asked = [
        (f"what colour is the {shape.kind}?", shape.colour),
        (choose(rng, [f"what shape is {shape.colour}?", f"what is the {shape.colour} shape?"]), shape.kind),
    ]
    if shape.size is not None:
        asked.append((choose(rng, [f"what size is the {shape.kind}?", f"how big is the {shape.kind}?"]), shape.size))
    if shape.cell is not None:
        asked.append((f"where is the {shape.kind}?", shape.cell))
    colour = shape.colour if rng.random() < 0.5 else choose(rng, [c for c in COLOURS if c != shape.colour])
    asked.append((f"is the {shape.kind} {colour}?", _yes(colour == shape.colour)))
    return asked


def relation_questions(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Returns questions with answers about the relation of two shapes, seen from either; none without a relation."""
    relation = scene.relation
    if relation is None:
        return []
    if rng.random() < 0.5:
        scene, relation = mirrored(scene), RELATIONS[relation]
    first, second = scene.shapes
    asked = relation if rng.random() < 0.5 else RELATIONS[relation]
    return [
        (f"what is {relation} the {second.kind}?", f"a {first.colour} {first.kind}"),
        (f"is the {first.kind} {asked} the {second.kind}?", _yes(asked == relation)),
    ]


_NUMBERS = {1: "one", 2: "two"}


def _yes(true: bool) -> str:
    return "yes" if true else "no"
