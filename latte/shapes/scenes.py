"""The training data of the `shapes` checkpoint: scenes of one or two flat shapes, generated on the fly.

A scene is data (`Scene`). Everything else derives from it: its image (`draw`), captions that state some or all of it
(`latte.shapes.captions`), and questions with answers (`latte.shapes.questions`). Training never renders a scene that
`is_held_out`, so a checkpoint can be scored on combinations of attributes that it has not seen.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

IMAGE_SIZE = 64
"""Height and width of an image in pixels."""
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (40, 90, 230),
    "yellow": (245, 215, 40),
    "orange": (245, 140, 30),
    "purple": (140, 50, 190),
    "cyan": (60, 210, 220),
    "pink": (250, 130, 190),
}
BACKGROUNDS = {
    "white": (245, 245, 245),
    "black": (15, 15, 15),
    "grey": (128, 128, 128),
    "navy": (20, 25, 80),
    "beige": (225, 208, 170),
}
KINDS = ("circle", "square", "triangle", "diamond", "star", "ring", "cross")
RADII = {"small": 4.75, "medium": 6.0, "large": 7.5}
"""Radius of a circle of each size, in pixels. The other kinds are inscribed in that circle, or nearly so."""
CELLS = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
CELL_CENTRES = (8, 32, 56)
"""Rows and columns of the cells' centres, in pixels.

They are multiples of 8 because the autoencoder makes one latent of each 8x8 pixels: a shape then looks alike to it in
every cell, and the flow layers learn each shape once instead of once per cell.
"""
OPPOSITE_CELLS = (("top", "bottom"), ("left", "right"))
"""The cells of two shapes. A caption of two shapes states only their relation, which implies the cells."""
RELATIONS = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
"""The inverse of each relation."""

_HELD_OUT_ONE_IN = 7
_SUPERSAMPLING = 8


@dataclass(frozen=True)
class Shape:
    """A shape. In a scene that a caption states, None marks an attribute that the caption omits."""

    kind: str
    colour: str
    size: str | None = None
    cell: str | None = None

    @property
    def centre(self) -> tuple[float, float]:
        """The centre, (row, column) in pixels.

        Raises:
            ValueError: the shape has no cell.
        """
        if self.cell is None:
            raise ValueError(f"the {self.colour} {self.kind} has no cell, so it has no centre")
        row, column = divmod(CELLS.index(self.cell), 3)
        return float(CELL_CENTRES[row]), float(CELL_CENTRES[column])


@dataclass(frozen=True)
class Scene:
    """Shapes on a background. Two shapes that have a relation differ in kind and in colour."""

    shapes: tuple[Shape, ...]
    background: str | None
    relation: str | None = None
    """Where the first shape is relative to the second; None unless there are two shapes."""


def mirrored(scene: Scene) -> Scene:
    """Returns the same scene with two related shapes swapped and their relation inverted."""
    if scene.relation is None:
        return scene
    return Scene(scene.shapes[::-1], scene.background, RELATIONS[scene.relation])


def is_held_out(scene: Scene) -> bool:
    """Returns whether a scene contains a combination of attributes that training never renders.

    One (colour, kind, cell) in seven is held out, whether the shape is alone or not, and so is one unordered pair of
    (colour, kind) in seven. A scene is held out if one of its shapes is, or two of its shapes together are.
    """
    shapes = scene.shapes
    return any(_is_held_out_shape(shape) for shape in shapes) or any(
        _is_held_out_pair(first, second) for i, first in enumerate(shapes) for second in shapes[:i]
    )


def _is_held_out_shape(shape: Shape) -> bool:
    return _is_one_in_seven(f"{shape.colour} {shape.kind} {shape.cell}")


def _is_held_out_pair(first: Shape, second: Shape) -> bool:
    return _is_one_in_seven(" and ".join(sorted(f"{shape.colour} {shape.kind}" for shape in (first, second))))


@lru_cache(maxsize=8192)
def _is_one_in_seven(key: str) -> bool:
    return zlib.crc32(key.encode()) % _HELD_OUT_ONE_IN == 0


def sample_scene(rng: np.random.Generator, *, held_out: bool = False, count: int | None = None) -> Scene:
    """Samples a random scene.

    Args:
        held_out: whether the scene is one that training never renders: a held-out shape, or a held-out pair of shapes.
        count: number of shapes, 1 or 2; by default 2 with probability 2/3.
    """
    while True:
        scene = _sample_any(rng, count if count is not None else int(rng.integers(3) > 0) + 1)
        if not held_out and not is_held_out(scene):
            return scene
        # Two shapes are scored on the pair, whatever their places.
        if held_out and (is_held_out(scene) if len(scene.shapes) == 1 else _is_held_out_pair(*scene.shapes)):
            return scene


def with_another_kind(scene: Scene, rng: np.random.Generator) -> Scene:
    """Returns the scene with the kind of one random shape replaced by another, and still not held out.

    Where every other kind would be held out, returns the scene itself.
    """
    changed = int(rng.integers(len(scene.shapes)))
    shape = scene.shapes[changed]
    others = []
    for kind in KINDS:
        shapes = (*scene.shapes[:changed], replace(shape, kind=kind), *scene.shapes[changed + 1 :])
        if kind != shape.kind and not is_held_out(replace(scene, shapes=shapes)):
            others.append(replace(scene, shapes=shapes))
    return others[int(rng.integers(len(others)))] if others else scene


def sample_busy_scene(rng: np.random.Generator) -> Scene:
    """Samples a scene of one to nine shapes that is not held out, for stages that only learn what shapes look like.

    One image of nine shapes teaches as much as nine images. The scene cannot be captioned: shapes may repeat.
    """
    background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    shapes: list[Shape] = []
    for cell in rng.permutation(len(CELLS))[: rng.integers(1, len(CELLS) + 1)]:
        while True:
            shape = Shape(
                kind=choose(rng, KINDS),
                colour=choose(rng, tuple(COLOURS)),
                size=choose(rng, tuple(RADII)),
                cell=CELLS[cell],
            )
            if not _is_held_out_shape(shape) and not any(_is_held_out_pair(shape, other) for other in shapes):
                shapes.append(shape)
                break
    return Scene(tuple(shapes), background)


def _sample_any(rng: np.random.Generator, count: int) -> Scene:
    kinds = rng.permutation(len(KINDS))
    colours = rng.permutation(len(COLOURS))
    cells = _sample_cells(rng, count)
    shapes = tuple(
        Shape(
            kind=KINDS[kinds[i]],
            colour=list(COLOURS)[colours[i]],
            size=list(RADII)[rng.integers(len(RADII))],
            cell=CELLS[cells[i]],
        )
        for i in range(count)
    )
    background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    return Scene(shapes, background, relation_of(cells[0], cells[1]) if count == 2 else None)


def _sample_cells(rng: np.random.Generator, count: int) -> tuple[int, ...]:
    if count == 1:
        return (int(rng.integers(len(CELLS))),)
    names = OPPOSITE_CELLS[rng.integers(len(OPPOSITE_CELLS))]
    return tuple(CELLS.index(names[i]) for i in rng.permutation(2))


def relation_of(first: int, second: int) -> str | None:
    """Returns where cell `first` is relative to cell `second`, or None unless they share either a row or a column.

    Args:
        first: index into `CELLS`.
        second: index into `CELLS`.
    """
    rows, columns = first // 3 - second // 3, first % 3 - second % 3
    if bool(rows) == bool(columns):
        return None
    if rows:
        return "above" if rows < 0 else "below"
    return "left of" if columns < 0 else "right of"


def choose(rng: np.random.Generator, options: Sequence[str]) -> str:
    """Returns one of the options at random."""
    return options[int(rng.integers(len(options)))]


# ---- images -------------------------------------------------------------------------------------


def draw(scene: Scene) -> np.ndarray:
    """Returns the image of a scene, `[64, 64, 3]` uint8.

    Raises:
        ValueError: the background, or a size or cell, is None.
    """
    if scene.background is None:
        raise ValueError("a scene without a background cannot be drawn")
    image = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
    image[:] = BACKGROUNDS[scene.background]
    for shape in scene.shapes:
        if shape.size is None:
            raise ValueError(f"the {shape.colour} {shape.kind} has no size, so it cannot be drawn")
        mask = coverage(shape.kind, RADII[shape.size], shape.centre)[..., None]
        image += mask * (np.asarray(COLOURS[shape.colour], np.float32) - image)
    return np.rint(image).astype(np.uint8)


@lru_cache(maxsize=4096)
def coverage(kind: str, radius: float, centre: tuple[float, float]) -> np.ndarray:
    """Returns the share of each pixel that a shape covers, `[64, 64]` float32 in [0, 1], read-only.

    Args:
        radius: in pixels.
        centre: (row, column) in pixels.

    Raises:
        ValueError: the kind is unknown.
    """
    side = IMAGE_SIZE * _SUPERSAMPLING
    canvas = Image.new("L", (side, side))
    pen = ImageDraw.Draw(canvas)
    row, column = centre

    def disc(r: float, fill: int) -> None:
        pen.ellipse([(v * _SUPERSAMPLING) for v in (column - r, row - r, column + r, row + r)], fill=fill)

    if kind in ("circle", "ring"):
        disc(radius, 255)
        if kind == "ring":
            disc(radius * 0.55, 0)
    else:
        outline = _outline(kind) * radius + (column, row)
        pen.polygon([(float(x), float(y)) for x, y in outline * _SUPERSAMPLING], fill=255)
    array = np.asarray(canvas, np.float32).reshape(IMAGE_SIZE, _SUPERSAMPLING, IMAGE_SIZE, _SUPERSAMPLING)
    mask = array.mean(axis=(1, 3)) / 255
    mask.flags.writeable = False
    return mask


def _outline(kind: str) -> np.ndarray:
    """Returns the corners of a kind's polygon of radius 1 around the origin, `[n, 2]`: x to the right, y down."""
    if kind == "square":
        return np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.86
    if kind == "diamond":
        return np.array([(0, -1.08), (0.8, 0), (0, 1.08), (-0.8, 0)])
    if kind == "triangle":
        return np.array([(0, -1.0), (1.05, 0.85), (-1.05, 0.85)])
    if kind == "cross":
        a, b = 0.34, 1.0
        quarter = [(a, -b), (a, -a), (b, -a)]
        corners = [(x, y) for x, y in quarter]
        for _ in range(3):
            quarter = [(-y, x) for x, y in quarter]
            corners += quarter
        return np.array(corners)
    if kind == "star":
        angles = np.arange(10) * np.pi / 5 - np.pi / 2
        radii = np.where(np.arange(10) % 2 == 0, 1.12, 0.46)
        return np.stack([np.cos(angles) * radii, np.sin(angles) * radii], axis=1)
    raise ValueError(f"unknown kind of shape {kind!r}; known are {', '.join(KINDS)}")
