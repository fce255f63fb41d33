"""The emoji of the `emoji` world: which ones, what they are called, and what they look like in each size.

The images and names come from the package that `latte.emoji.package.fetch` unpacks: Google's Noto Emoji in 64x64
pixels. A catalogue has its base emoji. Left out are

- flags, keycaps, and the parts that emoji are made of (skin tones, hair);
- variants by gender, direction or family: sequences joined by U+200D that contain a gender sign or an arrow, or begin
  with "man" or "woman". The emoji that they are variants of stays;
- names that are a code: single Chinese characters and syllables of Katakana;
- look-alikes: in the order of their code points' number, then of Unicode, an emoji that differs from an earlier one by
  less than `LOOK_ALIKE` when drawn small.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from runtime.errors import InputError, one_line

SIDES = {"large": 48, "small": 32}
"""Height and width of an emoji of each size, in pixels."""
LOOK_ALIKE = 0.08
"""Root mean square distance of two emoji of 32x32 pixels, in [0, 1], below which only one of them is kept."""
SOURCE_SIDE = 64
"""Height and width of the package's images, in pixels."""
_LEFT_OUT = {"category": ("Flags", "Component"), "subcategory": ("keycap", "flag")}
_JOINER = "200D"
_VARIANT_SIGNS = {"2640", "2642", "27A1"}
_PEOPLE = ("1F468", "1F469")
_CODES = ("cjk unified ideograph", "katakana")
_REWRITTEN = {"person: bald": "bald person", "oclock": "o'clock", "\u2019": "'", ": ": " with ", ", ": " and "}


@dataclass(frozen=True)
class Emoji:
    """An emoji and its names."""

    name: str
    """Its Unicode name in lower case; no other emoji has this name, nor as a synonym."""
    synonyms: tuple[str, ...]
    """Its short names that are unique."""


@dataclass(frozen=True, eq=False)
class Catalogue:
    """All emoji of the world, N of them, in a fixed order."""

    emoji: tuple[Emoji, ...]
    sprites: Mapping[str, np.ndarray]
    """By size: images with alpha, `[N, side, side, 4]` uint8; the colours are multiplied by alpha."""

    def __len__(self) -> int:
        return len(self.emoji)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The name of each emoji."""
        return tuple(emoji.name for emoji in self.emoji)

    @cached_property
    def _indices(self) -> Mapping[str, int]:
        return {name: i for i, emoji in enumerate(self.emoji) for name in (emoji.name, *emoji.synonyms)}

    def index(self, name: str) -> int:
        """Returns the index of the emoji with a name or synonym.

        Raises:
            InputError: there is none.
        """
        if name not in self._indices:
            raise InputError(f"there is no emoji {name!r}; names are those of Unicode, such as {self.names[0]!r}")
        return self._indices[name]

    def __getitem__(self, name: str) -> Emoji:
        """Returns the emoji with a name or synonym; raises like `index`."""
        return self.emoji[self.index(name)]


def load_catalogue(package: Path) -> Catalogue:
    """Reads the catalogue from an unpacked `emoji-datasource-google`, a folder with `emoji.json`, in about a second.

    Raises:
        InputError: the folder is not such a package, or lacks an image.
    """
    entries = sorted(
        (entry for entry in _read_entries(package) if _is_base(entry)),
        key=lambda entry: (entry["unified"].count("-"), entry["sort_order"]),
    )
    images = [_read_image(package, entry["image"]) for entry in entries]
    sprites = {size: np.stack([_resize(image, side) for image in images]) for size, side in SIDES.items()}
    kept = _without_look_alikes(sprites["small"], LOOK_ALIKE)
    names = [_clean(entries[i]["name"]) for i in kept]
    kept = [i for n, i in enumerate(kept) if names.index(names[n]) == n]
    emoji = _with_unique_names([entries[i] for i in kept])
    return Catalogue(tuple(emoji), {size: array[kept] for size, array in sprites.items()})


def _read_entries(package: Path) -> Sequence[Mapping[str, Any]]:
    path = package / "emoji.json"
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read ({one_line(error)}); expected a folder that `latte-flow data emoji` fetched"
        ) from error
    required = {"name", "unified", "image", "short_names", "category", "subcategory", "sort_order"}
    if not isinstance(entries, list) or not all(isinstance(e, dict) and required <= e.keys() for e in entries):
        raise InputError(f"{path} is not the list of emoji of emoji-datasource-google; fetch the package again")
    return entries


def _is_base(entry: Mapping[str, Any]) -> bool:
    codes = entry["unified"].split("-")
    is_variant = _JOINER in codes and (codes[0] in _PEOPLE or not _VARIANT_SIGNS.isdisjoint(codes))
    is_code = any(code in entry["name"].lower() for code in _CODES)
    left_out = entry["category"] in _LEFT_OUT["category"] or entry["subcategory"] in _LEFT_OUT["subcategory"]
    return bool(entry.get("has_img_google")) and not (is_variant or is_code or left_out)


def _read_image(package: Path, name: str) -> Image.Image:
    """Returns an image of the package with its colours multiplied by alpha."""
    if Path(name).name != name:
        raise InputError(
            f"emoji.json names the image {name!r}, which is not a plain file name; fetch the package again"
        )
    path = package / "img" / "google" / "64" / name
    try:
        image = Image.open(path).convert("RGBA").convert("RGBa")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({one_line(error)}); fetch the package again") from error
    if image.size != (SOURCE_SIDE, SOURCE_SIDE):
        raise InputError(f"{path} has {image.size[0]}x{image.size[1]} pixels, expected 64x64; fetch the package again")
    return image


def _resize(image: Image.Image, side: int) -> np.ndarray:
    pixels = np.array(image.resize((side, side), Image.Resampling.LANCZOS))
    pixels[..., :3] = np.minimum(pixels[..., :3], pixels[..., 3:])  # the filter overshoots at edges
    return pixels


def _without_look_alikes(sprites: np.ndarray, threshold: float) -> list[int]:
    """Returns the indices of the sprites that differ from all earlier ones kept.

    The distance of two sprites is the root mean square over their pixels on a black and on a white background.
    """
    pixels = sprites.astype(np.float32) / 255
    on_black = pixels[..., :3].reshape(len(pixels), -1)
    on_white = (pixels[..., :3] + 1 - pixels[..., 3:]).reshape(len(pixels), -1)
    features = np.concatenate([on_black, on_white], axis=1).astype(np.float64) / np.sqrt(2 * on_black.shape[1])
    squares = np.square(features).sum(axis=1)
    distances = squares[:, None] + squares - 2 * features @ features.T  # [N, N]
    kept: list[int] = []
    for i in range(len(sprites)):
        if not kept or distances[i, kept].min() >= threshold**2:
            kept.append(i)
    return kept


def _with_unique_names(entries: Sequence[Mapping[str, Any]]) -> list[Emoji]:
    names = [_clean(entry["name"]) for entry in entries]
    short = [list(dict.fromkeys(re.sub(r"[_\-\s]+", " ", name) for name in entry["short_names"])) for entry in entries]
    count = Counter([*names, *(name for row in short for name in row)])
    return [
        Emoji(name, tuple(s for s in row if s != name and count[s] == 1 and re.fullmatch(r"[a-z ]{3,}", s)))
        for name, row in zip(names, short, strict=True)
    ]


def _clean(name: str) -> str:
    name = name.lower()
    for old, new in _REWRITTEN.items():
        name = name.replace(old, new)
    return " ".join(name.split())
