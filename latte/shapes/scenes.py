"""The training data of the `shapes` checkpoint: scenes of one or two flat shapes, generated on the fly.

A scene is data (`Scene`). Everything else derives from it: its image (`draw`), captions that state some or all of it
(`caption`), and questions with answers (`questions`). Training never samples a scene that `is_held_out`, so a
checkpoint can be scored on combinations of attributes that it has not seen.
"""

from __future__ import annotations

import zlib
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

DESCRIBE = "describe the image"
"""The question whose answer is `describe(scene)`."""

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


def is_held_out(scene: Scene) -> bool:
    """Returns whether a scene's combination of attributes is kept out of training.

    The combination is (colour, kind, cell) for one shape, and the unordered pair of (colour, kind) for two.
    """
    if len(scene.shapes) == 1:
        shape = scene.shapes[0]
        key = f"{shape.colour} {shape.kind} {shape.cell}"
    else:
        key = " and ".join(sorted(f"{shape.colour} {shape.kind}" for shape in scene.shapes))
    return zlib.crc32(key.encode()) % _HELD_OUT_ONE_IN == 0


def sample_scene(rng: np.random.Generator, *, held_out: bool = False, count: int | None = None) -> Scene:
    """Samples a random scene.

    Args:
        held_out: whether the scene is one of those kept out of training.
        count: number of shapes, 1 or 2; by default 2 with probability 2/3.
    """
    while True:
        scene = _sample_any(rng, count if count is not None else int(rng.integers(3) > 0) + 1)
        if is_held_out(scene) == held_out:
            return scene


def with_another_kind(scene: Scene, rng: np.random.Generator) -> Scene:
    """Returns the scene with the kind of one random shape replaced by another."""
    changed = int(rng.integers(len(scene.shapes)))
    shape = scene.shapes[changed]
    other = replace(shape, kind=_choose(rng, [kind for kind in KINDS if kind != shape.kind]))
    return replace(scene, shapes=(*scene.shapes[:changed], other, *scene.shapes[changed + 1 :]))


def sample_busy_scene(rng: np.random.Generator) -> Scene:
    """Samples a scene of one to nine shapes, none of them held out, for stages that only learn what shapes look like.

    One image of nine shapes teaches as much as nine images. The scene cannot be captioned: shapes may repeat.
    """
    background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    shapes = []
    for cell in rng.permutation(len(CELLS))[: rng.integers(1, len(CELLS) + 1)]:
        while True:
            shape = Shape(
                kind=_choose(rng, KINDS),
                colour=_choose(rng, tuple(COLOURS)),
                size=_choose(rng, tuple(RADII)),
                cell=CELLS[cell],
            )
            if not is_held_out(Scene((shape,), background)):
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


# ---- captions -------------------------------------------------------------------------------------

_PLACES = {"center": ("in the center", "in the middle")}
_ONE_SHAPE = (
    "{article} {size} {colour} {kind} {place} on {background}",
    "{article} {size} {colour} {kind} {place}, {background}",
    "{place} {article} {size} {colour} {kind} on {background}",
    "on {background}, {article} {size} {colour} {kind} {place}",
    "{background} with {article} {size} {colour} {kind} {place}",
)
_TWO_SHAPES = (
    "{first} {relation} {second} on {background}",
    "{first} {relation} {second}, {background}",
    "{first} that is {relation} {second} on {background}",
    "on {background}, {first} {relation} {second}",
    "{background} with {first} {relation} {second}",
)


def describe(scene: Scene) -> str:
    """Returns the canonical caption of a scene, which is the expected answer to `DESCRIBE`.

    It states the attributes that are not None; for two shapes, their relation in place of their cells. All captions
    that state the same have the same canonical form.
    """
    if scene.relation in ("below", "right of"):
        scene = mirrored(scene)
    text = _name(scene.shapes[0])
    if scene.relation is not None:
        text += f" {scene.relation} {_name(scene.shapes[1])}"
    else:
        text += f" {_places(scene.shapes[0].cell)[0]}"
    return _tidy(f"{text} on a {scene.background} background" if scene.background else text)


def mirrored(scene: Scene) -> Scene:
    """Returns the same scene with two related shapes swapped and their relation inverted."""
    if scene.relation is None:
        return scene
    return Scene(scene.shapes[::-1], scene.background, RELATIONS[scene.relation])


def caption(scene: Scene, rng: np.random.Generator, *, full: bool = False) -> tuple[str, Scene]:
    """Returns a random caption of a scene, and the scene as stated: attributes that the caption omits are None.

    Args:
        full: state every attribute, except the cells of two shapes, which their relation implies.
    """
    if rng.random() < 0.5:
        scene = mirrored(scene)
    keeps_background = full or rng.random() < 0.9
    shapes = tuple(
        replace(
            shape,
            size=shape.size if full or rng.random() < 0.85 else None,
            cell=shape.cell if len(scene.shapes) == 1 and (full or rng.random() < 0.9) else None,
        )
        for shape in scene.shapes
    )
    stated = Scene(shapes, scene.background if keeps_background else None, scene.relation)
    templates = _ONE_SHAPE if len(shapes) == 1 else _TWO_SHAPES
    first = shapes[0]
    template = templates[rng.integers(len(templates))]
    text = template.format(
        article="a",
        size=first.size or "",
        colour=first.colour,
        kind=first.kind,
        place=_choose(rng, _places(first.cell)) if first.cell else "",
        background=f"a {stated.background} background" if stated.background else "",
        relation=stated.relation if stated.relation in ("above", "below") else f"to the {stated.relation}",
        first=_name(shapes[0]),
        second=_name(shapes[-1]),
    )
    return _tidy(text), stated


def _name(shape: Shape) -> str:
    return f"a {shape.size or ''} {shape.colour} {shape.kind}"


def _places(cell: str | None) -> tuple[str, ...]:
    if cell is None:
        return ("",)
    return _PLACES.get(cell, (f"at the {cell}", f"in the {cell}" if " " in cell else f"on the {cell}"))


def _tidy(text: str) -> str:
    """Removes the gaps that omitted attributes leave in a filled template."""
    text = " ".join(text.split()).replace("a orange", "an orange")
    for left, right in ((" ,", ","), ("on , ", ""), ("on, ", "")):
        text = text.replace(left, right)
    text = text.removeprefix("with ").strip(" ,")
    return text.removesuffix(" on").strip(" ,")


def _choose(rng: np.random.Generator, options: tuple[str, ...] | list[str]) -> str:
    return options[int(rng.integers(len(options)))]


# ---- questions ------------------------------------------------------------------------------------


def questions(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Returns questions with answers, in random phrasing, about the attributes of a scene that are not None."""
    asked: list[tuple[str, str]] = [
        (_choose(rng, ["how many shapes are there?", "how many shapes are in the image?"]), _NUMBERS[len(scene.shapes)])
    ]
    if scene.background is not None:
        asked.append(
            (_choose(rng, ["what colour is the background?", "what is the background colour?"]), scene.background)
        )
    for shape in scene.shapes:
        asked += _about(shape, rng)
    present = {shape.kind for shape in scene.shapes}
    kind = _choose(rng, sorted(present) if rng.random() < 0.5 else [k for k in KINDS if k not in present])
    asked.append((f"is there a {kind}?", _yes(kind in present)))
    asked += relation_questions(scene, rng)
    return asked


def _about(shape: Shape, rng: np.random.Generator) -> list[tuple[str, str]]:
    asked = [
        (f"what colour is the {shape.kind}?", shape.colour),
        (_choose(rng, [f"what shape is {shape.colour}?", f"what is the {shape.colour} shape?"]), shape.kind),
    ]
    if shape.size is not None:
        asked.append((_choose(rng, [f"what size is the {shape.kind}?", f"how big is the {shape.kind}?"]), shape.size))
    if shape.cell is not None:
        asked.append((f"where is the {shape.kind}?", shape.cell))
    colour = shape.colour if rng.random() < 0.5 else _choose(rng, [c for c in COLOURS if c != shape.colour])
    asked.append((f"is the {shape.kind} {colour}?", _yes(colour == shape.colour)))
    return asked


def relation_questions(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Returns questions with answers about the relation of two shapes, seen from either; none without a relation."""
    if scene.relation is None:
        return []
    if rng.random() < 0.5:
        scene = mirrored(scene)
    assert scene.relation is not None
    first, second = scene.shapes
    relation = scene.relation if rng.random() < 0.5 else RELATIONS[scene.relation]
    return [
        (f"what is {scene.relation} the {second.kind}?", f"a {first.colour} {first.kind}"),
        (f"is the {first.kind} {relation} the {second.kind}?", _yes(relation == scene.relation)),
    ]


_NUMBERS = {1: "one", 2: "two"}


def _yes(true: bool) -> str:
    return "yes" if true else "no"
