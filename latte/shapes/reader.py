"""Reads the scene in an image of the `shapes` world from its pixels, and judges it by a prompt.

A shape's colour is the nearest named colour, its kind and size are those of the rendered mask with the best overlap,
and its cell is the nearest to that mask's centre. The reader does not use the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import numpy as np
from scipy import ndimage

from latte.shapes.captions import describe
from latte.shapes.scenes import (
    BACKGROUNDS,
    CELL_CENTRES,
    CELLS,
    COLOURS,
    IMAGE_SIZE,
    KINDS,
    RADII,
    Scene,
    Shape,
    coverage,
    relation_of,
)

FOREGROUND_DISTANCE = 45.0
"""Euclidean RGB distance from the background, in levels of 0 to 255, above which a pixel belongs to a shape."""
MINIMUM_AREA = 16
"""Smallest area of a shape in pixels; the smallest rendered shape covers about 30."""
MINIMUM_OVERLAP = 0.5
"""Intersection over union below which a blob has no known kind."""
MAXIMUM_RESIDUAL = 5.0
"""Largest root mean square of what the scene does not explain, in levels; in good samples it is below 2.7."""
MAXIMUM_LOCAL_RESIDUAL = 25.0
"""Largest root mean square of it in any window of 7x7 pixels, in levels; in good samples it is below 19."""
_WINDOW = 7
_HALF = 12
"""Half the side of a mask, in pixels."""
_SEARCH = 3
"""How far the best mask is searched from the middle of a blob, in pixels."""


@dataclass(frozen=True)
class FoundShape:
    """A shape as read from pixels."""

    kind: str | None
    """None if no known kind overlaps enough."""
    colour: str
    size: str | None
    """None if the kind is None."""
    cell: str
    centre: tuple[float, float]
    """(row, column) in pixels."""
    overlap: float
    """Intersection over union with the best mask, in [0, 1]."""


@dataclass(frozen=True)
class FoundScene:
    """A scene as read from pixels."""

    background: str
    shapes: tuple[FoundShape, ...]
    residual: float
    """Root mean square of what the shapes and the background do not explain, in levels of 0 to 255.

    The pixels at the outlines of the shapes do not count.
    """
    local_residual: float
    """The same in the window of 7x7 pixels where it is largest."""

    @property
    def is_clean(self) -> bool:
        """Whether the image shows nothing but the shapes on the background."""
        return self.residual <= MAXIMUM_RESIDUAL and self.local_residual <= MAXIMUM_LOCAL_RESIDUAL


def read_image(image: np.ndarray) -> FoundScene:
    """Reads an image, `[64, 64, 3]` uint8.

    Raises:
        ValueError: the image has another shape.
    """
    if image.shape != (IMAGE_SIZE, IMAGE_SIZE, 3):
        raise ValueError(f"expected an RGB image of shape {(IMAGE_SIZE, IMAGE_SIZE, 3)}, got {image.shape}")
    pixels = image.astype(np.float32)
    edge = np.ones(image.shape[:2], bool)
    edge[1:-1, 1:-1] = False
    background = np.median(pixels[edge], axis=0)
    distance = np.linalg.norm(pixels - background, axis=-1)
    labels, count = ndimage.label(distance > FOREGROUND_DISTANCE)
    shapes = []
    for label in range(1, count + 1):
        blob = labels == label
        if blob.sum() >= MINIMUM_AREA:
            shapes.append(_read_shape(pixels, background, distance, blob))
    return FoundScene(_nearest(background, BACKGROUNDS), tuple(shapes), *_residuals(pixels, background, shapes))


def _residuals(pixels: np.ndarray, background: np.ndarray, shapes: Sequence[FoundShape]) -> tuple[float, float]:
    """Returns the root mean square of what the found scene does not explain: overall, and in the worst window."""
    explained = np.broadcast_to(background, pixels.shape).copy()
    inner = np.ones(pixels.shape[:2], bool)
    for shape in shapes:
        if shape.kind is None or shape.size is None:
            continue
        mask = coverage(shape.kind, RADII[shape.size], shape.centre)
        colour = np.median(pixels[mask > 0.95], axis=0)
        explained += mask[..., None] * (colour - explained)
        inner &= ~ndimage.binary_dilation(mask > 0.02) | ndimage.binary_erosion(mask > 0.98)
    squared = np.square(pixels - explained).sum(axis=-1) * inner
    share = ndimage.uniform_filter(inner.astype(np.float64), _WINDOW, mode="constant")
    local = ndimage.uniform_filter(squared.astype(np.float64), _WINDOW, mode="constant") / np.maximum(share, 1e-9)
    return float(np.sqrt(squared.sum() / inner.sum())), float(np.sqrt(local[share >= 0.4].max()))


def _read_shape(pixels: np.ndarray, background: np.ndarray, distance: np.ndarray, blob: np.ndarray) -> FoundShape:
    core = blob & (distance >= 0.8 * distance[blob].max())
    colour = np.median(pixels[core], axis=0)
    direction = colour - background
    alpha = np.clip((pixels - background) @ direction / (direction @ direction), 0, 1)
    alpha *= ndimage.binary_dilation(blob, iterations=2)
    rows, columns = np.nonzero(blob)
    middle = ((rows.min() + rows.max()) / 2, (columns.min() + columns.max()) / 2)
    overlap, kind, size, centre = _best_mask(alpha, middle)
    known = overlap >= MINIMUM_OVERLAP
    cell = CELLS[3 * _nearest_cell(centre[0]) + _nearest_cell(centre[1])]
    return FoundShape(
        kind if known else None, _nearest(colour, COLOURS), size if known else None, cell, centre, overlap
    )


def _best_mask(alpha: np.ndarray, middle: tuple[float, float]) -> tuple[float, str, str, tuple[float, float]]:
    """Finds the rendered mask that overlaps most, shifted by whole pixels around `middle`.

    Args:
        alpha: how much each pixel belongs to the shape, `[64, 64]` float32 in [0, 1].
        middle: (row, column) in pixels.

    Returns:
        its overlap, kind, size and centre.
    """
    names, masks = _masks()
    padded = np.pad(alpha, _HALF + _SEARCH + 1)
    best = (-1.0, "", "", (0.0, 0.0))
    total = alpha.sum()
    for row in range(int(middle[0]) - _SEARCH, int(middle[0]) + _SEARCH + 1):
        for column in range(int(middle[1]) - _SEARCH, int(middle[1]) + _SEARCH + 1):
            top, left = row + _SEARCH + 2, column + _SEARCH + 2
            window = padded[top : top + 2 * _HALF, left : left + 2 * _HALF]
            intersection = np.minimum(masks, window).sum(axis=(1, 2))
            union = masks.sum(axis=(1, 2)) + total - intersection
            index = int(np.argmax(intersection / union))
            if intersection[index] / union[index] > best[0]:
                kind, size = names[index]
                best = (float(intersection[index] / union[index]), kind, size, (row + 1.0, column + 1.0))
    return best


@lru_cache(maxsize=1)
def _masks() -> tuple[list[tuple[str, str]], np.ndarray]:
    """Returns (kind, size) and mask, `[n, 24, 24]` float32, of every kind in every size, centred on a pixel corner."""
    names = [(kind, size) for kind in KINDS for size in RADII]
    middle = IMAGE_SIZE // 2
    window = slice(middle - _HALF, middle + _HALF)
    drawn = [coverage(kind, RADII[size], (middle, middle)) for kind, size in names]
    return names, np.stack([mask[window, window] for mask in drawn])


def _nearest(colour: np.ndarray, names: Mapping[str, tuple[int, int, int]]) -> str:
    return min(names, key=lambda name: float(np.linalg.norm(colour - np.asarray(names[name], np.float32))))


def _nearest_cell(coordinate: float) -> int:
    return int(np.argmin([abs(coordinate - centre) for centre in CELL_CENTRES]))


def describe_found(found: FoundScene) -> str:
    """Returns the canonical caption of an image, as `describe` does.

    Where no such caption exists, such as for three shapes, returns the number of shapes and the background instead.
    """
    shapes = [Shape(shape.kind, shape.colour, shape.size, shape.cell) for shape in found.shapes if shape.kind]
    relation = _relation(found.shapes) if len(found.shapes) == 2 else None
    if len(shapes) != len(found.shapes) or len(shapes) not in (1, 2) or (len(shapes) == 2 and relation is None):
        known = f", {len(shapes)} of them of a known kind," if len(shapes) < len(found.shapes) else ""
        return f"{len(found.shapes)} shapes{known} on a {found.background} background"
    return describe(Scene(tuple(shapes), found.background, relation))


# ---- judging an image by its prompt ----------------------------------------------------------------

ATTRIBUTES = ("count", "background", "colour", "kind", "size", "position", "relation", "nothing else")


def judge(stated: Scene, found: FoundScene) -> dict[str, bool]:
    """Returns for each attribute that a prompt states whether the image has it right, and `all` for all of them.

    "nothing else" is whether the image shows only what was found, without specks, stripes or faint shapes. Two shapes
    are matched in the order that fits best. An attribute of two shapes is right only if it is right for both. With a
    wrong number of shapes, only the background can be right.

    Args:
        stated: the scene that the prompt states.
        found: the scene in the image.
    """
    if len(found.shapes) != len(stated.shapes):
        verdict = {"count": False, **dict.fromkeys(_stated_attributes(stated), False), "nothing else": found.is_clean}
        if "background" in verdict:
            verdict["background"] = found.background == stated.background
        return {**verdict, "all": False}
    verdicts = [_judge_in_order(stated, found, order) for order in permutations(found.shapes)]
    best = max(verdicts, key=lambda verdict: sum(verdict.values()))
    return {**best, "all": all(best.values())}


def _stated_attributes(stated: Scene) -> list[str]:
    present = {
        "background": stated.background is not None,
        "colour": True,
        "kind": True,
        "size": any(shape.size is not None for shape in stated.shapes),
        "position": any(shape.cell is not None for shape in stated.shapes),
        "relation": stated.relation is not None,
    }
    return [name for name in ATTRIBUTES if present.get(name)]


def _judge_in_order(stated: Scene, found: FoundScene, order: Sequence[FoundShape]) -> dict[str, bool]:
    pairs = list(zip(stated.shapes, order, strict=True))
    values = {
        "background": found.background == stated.background,
        "colour": all(shape.colour == seen.colour for shape, seen in pairs),
        "kind": all(shape.kind == seen.kind for shape, seen in pairs),
        "size": all(shape.size in (None, seen.size) for shape, seen in pairs),
        "position": all(shape.cell in (None, seen.cell) for shape, seen in pairs),
        "relation": stated.relation is not None and stated.relation == _relation(order),
    }
    named = {name: values[name] for name in _stated_attributes(stated)}
    return {"count": True, **named, "nothing else": found.is_clean}


def _relation(order: Sequence[FoundShape]) -> str | None:
    first, second = (CELLS.index(shape.cell) for shape in order[:2])
    return relation_of(first, second)
