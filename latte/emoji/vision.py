"""What the vision tower of `emoji` learns: to classify what each of its tokens shows."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from latte.emoji.catalogue import SIDES, Catalogue
from latte.emoji.scenes import BACKGROUNDS, PLACES, SIZES, Scene, draw, sample_busy_scene, sample_scene
from latte.training.stage import Rows

TOKENS_PER_SIDE = 4
"""Rows and columns of tokens of an image, after the tower has merged patches 2x2."""
VISIBLE_SHARE = 0.05
"""Smallest share of an emoji's square that a token must cover to be labelled with the emoji."""
BUSY_SHARE = 0.5
"""Share of busy scenes; the others have one emoji or two, at all places."""


def heads_of(catalogue: Catalogue) -> Mapping[str, int]:
    """Returns the number of classes of each head. All but the background's include "no emoji".

    The tower's rotary positions are relative; classifying the place makes each token carry its absolute position.
    """
    return {
        "emoji": len(catalogue) + 1,
        "size": len(SIZES) + 1,
        "place": len(PLACES) + 1,
        "background": len(BACKGROUNDS),
    }


def token_labels(scene: Scene, catalogue: Catalogue) -> np.ndarray:
    """Returns the labels of the tokens of a scene's image, `[16, 4]` int64, with one column per head.

    A label of 0 means "no emoji", except in the background's column.

    Raises:
        ValueError: the scene leaves something open, so that its image is not known.
    """
    if scene.background is None:
        raise ValueError(f"a scene to label needs a background, got {scene}")
    labels = np.zeros((TOKENS_PER_SIDE, TOKENS_PER_SIDE, 4), np.int64)
    labels[..., 3] = list(BACKGROUNDS).index(scene.background)
    edges = np.arange(TOKENS_PER_SIDE + 1) * 16  # of the tokens, in pixels
    for emoji in scene.emoji:
        covered = [  # of each row and column of tokens, in pixels
            np.clip(np.minimum(edges[1:], window.stop) - np.maximum(edges[:-1], window.start), 0, None)
            for window in emoji.window
        ]
        seen = np.outer(*covered) >= VISIBLE_SHARE * SIDES[str(emoji.size)] ** 2
        labels[seen, :3] = (
            1 + catalogue.index(emoji.name),
            1 + SIZES.index(str(emoji.size)),
            1 + PLACES.index(str(emoji.place)),
        )
    return labels.reshape(TOKENS_PER_SIDE**2, 4)


class LabelledScenes:
    """Scenes for the vision tower, by index, with the labels of their tokens."""

    def __init__(self, catalogue: Catalogue, seed: int = 0) -> None:
        self.catalogue, self.seed = catalogue, seed
        self.heads = heads_of(catalogue)

    def batch(self, index: int, rows: range, total: int) -> tuple[list[np.ndarray], np.ndarray]:
        scenes = []
        for rng in Rows(self.seed, rows, total).generators(0, index):
            sample = sample_busy_scene if rng.random() < BUSY_SHARE else sample_scene
            scenes.append(sample(self.catalogue.names, rng))
        labels = np.concatenate([token_labels(scene, self.catalogue) for scene in scenes])
        return [draw(scene, self.catalogue) for scene in scenes], labels
