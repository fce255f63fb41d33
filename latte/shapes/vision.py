"""What the vision tower of `shapes` learns: to classify what each of its tokens shows."""

from __future__ import annotations

import numpy as np

from latte.shapes.scenes import BACKGROUNDS, CELLS, COLOURS, KINDS, RADII, Scene, coverage, draw, sample_busy_scene
from latte.training.stage import Rows

TOKENS_PER_SIDE = 4
"""Rows and columns of tokens of an image, after the tower has merged patches 2x2."""
VISIBLE_SHARE = 0.15
"""Smallest share of a shape's area that a token must cover to be labelled with the shape."""
HEADS = {
    "kind": len(KINDS) + 1,
    "colour": len(COLOURS) + 1,
    "size": len(RADII) + 1,
    "cell": len(CELLS) + 1,
    "background": len(BACKGROUNDS),
}
"""Number of classes of each head. All but the background's include "no shape".

The tower's rotary positions are relative; classifying the cell makes each token carry its absolute position.
"""


def token_labels(scene: Scene) -> np.ndarray:
    """Returns the labels of the tokens of a scene's image, `[16, 5]` int64, with one column per head.

    A label of 0 means "no shape", except in the background's column. A token that covers several shapes is labelled
    with the one of which it covers the largest share.

    Raises:
        ValueError: the scene leaves something open, so that its image is not known.
    """
    if scene.background is None:
        raise ValueError(f"a scene to label needs a background, got {scene}")
    labels = np.zeros((TOKENS_PER_SIDE**2, len(HEADS)), np.int64)
    labels[:, 4] = list(BACKGROUNDS).index(scene.background)
    best = np.full(TOKENS_PER_SIDE**2, VISIBLE_SHARE)
    for shape in scene.shapes:
        if shape.size is None or shape.cell is None:
            raise ValueError(f"a shape to label needs a size and a cell, got {shape}")
        mask = coverage(shape.kind, RADII[shape.size], shape.centre)
        side = mask.shape[0] // TOKENS_PER_SIDE
        share = mask.reshape(TOKENS_PER_SIDE, side, TOKENS_PER_SIDE, side).sum(axis=(1, 3)).reshape(-1) / mask.sum()
        seen = share >= best
        best = np.maximum(best, share)
        labels[seen, 0] = 1 + KINDS.index(shape.kind)
        labels[seen, 1] = 1 + list(COLOURS).index(shape.colour)
        labels[seen, 2] = 1 + list(RADII).index(shape.size)
        labels[seen, 3] = 1 + CELLS.index(shape.cell)
    return labels


class LabelledScenes:
    """Scenes for the vision tower, by index, with the labels of their tokens."""

    heads = HEADS

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def batch(self, index: int, rows: range, total: int) -> tuple[list[np.ndarray], np.ndarray]:
        scenes = [sample_busy_scene(rng) for rng in Rows(self.seed, rows, total).generators(0, index)]
        return [draw(scene) for scene in scenes], np.concatenate([token_labels(scene) for scene in scenes])
