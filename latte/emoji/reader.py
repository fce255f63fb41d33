"""Reads the scene in an image of the `emoji` world from its pixels, and judges it by a prompt.

The background is the named colour that most pixels are near. An emoji is the nearest of all in pixels, in every size
and at every place: the one whose drawing leaves the least squared error in the whole image. The reader does not use
the model.

Cost: with D = image − background and R = sprite − alpha · background, drawing a sprite at a window w lowers the squared
error by 2 D_w·R − |R|². D_w·R is a product of the window's pixels with all sprites: for 1,370 emoji, 9 places and both
sizes 0.33 GFLOP an image, and 73 MB of sprites to read for each batch of images.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import ndimage

from latte.emoji.catalogue import Catalogue
from latte.emoji.scenes import BACKGROUNDS, IMAGE_SIZE, PLACES, Placed, Scene, draw

BACKGROUND_DISTANCE = 32.0
"""Largest Euclidean RGB distance of a pixel from a background that it counts for, in levels of 0 to 255."""
MAXIMUM_LOCAL_RESIDUAL = 64.0
"""Largest mean of what the scene does not explain in any window of 7x7 pixels, in levels.

Blurred edges and noise cancel out in a mean: of good drawings as JPEG of quality 60, the worst window has 38 in 95 % of
images and 61 at most; with a wrong emoji at least 125, with a speck of 8x8 pixels at least 96.
"""
ATTRIBUTES = ("emoji", "size", "place", "background", "clean")
"""What `judge` judges, besides "all"."""
_WINDOW = 7
_MINIMUM_GAIN = 2.0
"""Smallest decrease of the squared error, with pixels in [0, 1], for which an emoji counts as being there.

The faintest, a small white square on pink, lowers it by 3.2.
"""
_APART = [
    (i, j)
    for i, j in combinations(range(9), 2)
    if abs(i // 3 - j // 3) == 2 or abs(i % 3 - j % 3) == 2  # two small emoji there do not overlap
]


@dataclass(frozen=True)
class FoundScene:
    """A scene as read from pixels."""

    scene: Scene
    """The emoji in the order of their places; none if nothing is there."""
    local_residual: float
    """Length of the mean difference from the scene's drawing, RGB, in the window where it is largest, in levels."""

    @property
    def is_clean(self) -> bool:
        """Whether the image shows nothing but the emoji on the background."""
        return self.local_residual <= MAXIMUM_LOCAL_RESIDUAL


class Reader:
    """Reads images. It holds all sprites as matrices, 73 MB."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        self._sprites = {size: _Sprites.of(sprites) for size, sprites in catalogue.sprites.items()}

    def read(self, images: np.ndarray) -> list[FoundScene]:
        """Reads images, `[B, 64, 64, 3]` uint8.

        Raises:
            ValueError: the images have another shape.
        """
        if images.ndim != 4 or images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
            raise ValueError(f"expected RGB images of shape (B, {IMAGE_SIZE}, {IMAGE_SIZE}, 3), got {images.shape}")
        pixels = images.astype(np.float32)
        found = [_background(image) for image in pixels]
        colours = np.stack([colour for _, colour in found]) / 255  # [B, 3]
        difference = pixels / 255 - colours[:, None, None]  # D, [B, 64, 64, 3]
        gains = {size: sprites.gains(difference, colours, size) for size, sprites in self._sprites.items()}
        return [
            self._result(pixels[i], name, colour, {size: gain[i] for size, gain in gains.items()})
            for i, (name, colour) in enumerate(found)
        ]

    def _result(
        self, pixels: np.ndarray, background: str, colour: np.ndarray, gains: dict[str, np.ndarray]
    ) -> FoundScene:
        emoji = tuple(Placed(self.catalogue.names[index], size, PLACES[place]) for size, place, index in _best(gains))
        scene = Scene(emoji, background)
        difference = pixels - draw(scene, self.catalogue, colour)
        local = ndimage.uniform_filter(difference, (_WINDOW, _WINDOW, 0), mode="nearest")
        return FoundScene(scene, float(np.linalg.norm(local, axis=-1).max()))


@dataclass(frozen=True, eq=False)
class _Sprites:
    """All sprites of a size, as the matrices that `gains` needs; P is a sprite's colours times alpha, a its alpha."""

    matrix: np.ndarray
    """P and a, `[4 * side * side, N]` float32 in [0, 1]."""
    colour_square: np.ndarray
    """Sum of P², `[N]`."""
    colour_alpha: np.ndarray
    """Sum of P·a for each colour, `[N, 3]`."""
    alpha_square: np.ndarray
    """Sum of a², `[N]`."""

    @classmethod
    def of(cls, sprites: np.ndarray) -> _Sprites:
        values = sprites.astype(np.float32) / 255  # [N, side, side, 4]
        colour, alpha = values[..., :3], values[..., 3]
        return cls(
            np.ascontiguousarray(values.reshape(len(values), -1).T),
            np.square(colour).sum(axis=(1, 2, 3)),
            (colour * alpha[..., None]).sum(axis=(1, 2)),
            np.square(alpha).sum(axis=(1, 2)),
        )

    def gains(self, difference: np.ndarray, colours: np.ndarray, size: str) -> np.ndarray:
        """Returns how much each sprite lowers the squared error at each place, `[B, 9, N]` float32.

        Args:
            difference: the image minus its background, `[B, 64, 64, 3]` float32 in [-1, 1].
            colours: the backgrounds, `[B, 3]` float32 in [0, 1].
            size: the size of the sprites.
        """
        windows = np.stack([difference[(slice(None), *Placed("", size, place).window)] for place in PLACES], axis=1)
        shade = (windows * colours[:, None, None, None]).sum(axis=-1, keepdims=True)
        features = np.concatenate([windows, -shade], axis=-1)  # [B, 9, side, side, 4]
        product = features.reshape(-1, len(self.matrix)) @ self.matrix  # D·R, [B*9, N]
        norm = (
            self.colour_square
            - 2 * colours @ self.colour_alpha.T
            + np.square(colours).sum(axis=1, keepdims=True) * self.alpha_square
        )  # |R|², [B, N]
        return 2 * product.reshape(len(colours), len(PLACES), -1) - norm[:, None]


def _best(gains: dict[str, np.ndarray]) -> list[tuple[str, int, int]]:
    """Returns the size, place and index of each emoji of the best explanation: of none, one, or two small ones.

    Args:
        gains: by size, `[9, N]`.
    """
    best: tuple[float, list[tuple[str, int, int]]] = (_MINIMUM_GAIN, [])
    for size, gain in gains.items():
        place, index = (int(i) for i in np.unravel_index(gain.argmax(), gain.shape))
        if gain[place, index] > best[0]:
            best = (float(gain[place, index]), [(size, place, index)])
    small = gains["small"]
    nearest = small.argmax(axis=1)  # [9]
    gain_at = small[np.arange(len(small)), nearest]
    for first, second in _APART:
        together = float(gain_at[first] + gain_at[second])
        if min(gain_at[first], gain_at[second]) > _MINIMUM_GAIN and together > best[0]:
            best = (together, [("small", place, int(nearest[place])) for place in (first, second)])
    return best[1]


def _background(pixels: np.ndarray) -> tuple[str, np.ndarray]:
    """Returns the background of an image, its name and its colour, RGB in [0, 255].

    Args:
        pixels: `[64, 64, 3]` float32 in [0, 255].
    """
    flat = pixels.reshape(-1, 3)
    named = np.array(list(BACKGROUNDS.values()), np.float32)
    distances = np.square(flat[:, None] - named).sum(axis=-1)  # [pixels, backgrounds]
    near = distances < BACKGROUND_DISTANCE**2
    chosen = int(near.sum(axis=0).argmax())
    if not near[:, chosen].any():
        edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        colour = np.median(edge, axis=0)
        return list(BACKGROUNDS)[int(np.square(named - colour).sum(axis=1).argmin())], colour
    return list(BACKGROUNDS)[chosen], np.median(flat[near[:, chosen]], axis=0)


def judge(stated: Scene, found: FoundScene) -> dict[str, bool]:
    """Judges what was read from an image by the scene that its prompt states.

    Args:
        stated: the scene; attributes that are None are not judged.

    Returns:
        Whether each of `ATTRIBUTES` that is stated is right, and `all`. The emoji are right if the image shows these
        and no other. The image is clean if nothing else is in it.
    """
    wanted, seen = stated.emoji, found.scene.emoji
    verdict = {
        "emoji": sorted(e.name for e in wanted) == sorted(e.name for e in seen),
        "clean": found.is_clean,
    }
    if all(emoji.size is not None for emoji in wanted):
        verdict["size"] = sorted(str(e.size) for e in wanted) == sorted(str(e.size) for e in seen)
    if all(emoji.place is not None for emoji in wanted):
        by_name = verdict["emoji"]  # else the places count, whichever emoji is there
        verdict["place"] = {(e.name if by_name else "", e.place) for e in wanted} == {
            (e.name if by_name else "", e.place) for e in seen
        }
    if stated.background is not None:
        verdict["background"] = stated.background == found.scene.background
    verdict["all"] = all(verdict.values())
    return verdict
