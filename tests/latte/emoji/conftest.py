"""A package of the form of `emoji-datasource-google`, with a few emoji that are drawn here."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from latte.emoji.catalogue import Catalogue, load_catalogue
from latte.emoji.package import NAME, VERSION, fetch

FACES = ("GRINNING FACE", "WINKING FACE", "CRYING FACE", "CLOCK FACE ONE OCLOCK", "PERSON: BALD", "FRENCH FRIES")
THINGS = tuple(f"{colour} {kind}" for colour in ("RED", "GREEN", "WHITE", "BLACK") for kind in ("DISC", "BOX", "WEDGE"))


def entry(name: str, unified: str, order: int, **other: object) -> dict[str, object]:
    """Returns an emoji as emoji.json has it."""
    return {
        "name": name,
        "unified": unified,
        "image": f"{unified.lower()}.png",
        "short_names": [name.lower().replace(" ", "_").replace(":", "")],
        "category": "Objects",
        "subcategory": "tool",
        "sort_order": order,
        "has_img_google": True,
        **other,
    }


ENTRIES = [
    *(entry(name, f"1F{i:03X}", i) for i, name in enumerate((*FACES, *THINGS), 0x300)),
    entry("LAUGHING FACE", "1F3F0", 2000, short_names=["lol", "+1", "red_disc", "face2"]),
    entry("RED DISC TWIN", "1F3F1", 3000),  # looks like RED DISC
    entry("MAN COOK", "1F468-200D-1F373", 3001),
    entry("WOMAN RUNNING", "1F3C3-200D-2640-FE0F", 3002),
    entry("SQUARED KATAKANA SA", "1F202", 3003),
    entry("KEYCAP 1", "0031-FE0F-20E3", 3004, subcategory="keycap"),
    entry("FRANCE FLAG", "1F1EB-1F1F7", 3005, category="Flags"),
    entry("NO IMAGE", "1F3F2", 3006, has_img_google=False),
]


def drawing(name: str) -> Image.Image:
    """Returns the image of an emoji, 64x64 with alpha."""
    image = Image.new("RGBA", (64, 64))
    pen = ImageDraw.Draw(image)
    colour, _, kind = name.removesuffix(" TWIN").partition(" ")
    fill = {"RED": (220, 30, 30), "GREEN": (40, 170, 60), "WHITE": (250, 250, 250), "BLACK": (20, 20, 20)}.get(colour)
    if kind == "DISC":
        pen.ellipse((6, 6, 58, 58), fill=fill)
    elif kind == "BOX":
        pen.rectangle((8, 8, 56, 56), fill=fill)
    elif kind == "WEDGE":
        pen.polygon([(32, 4), (60, 60), (4, 60)], fill=fill)
    else:  # something of its own for every other name
        rng = np.random.default_rng(list(name.encode()))
        for _ in range(6):
            x, y, w, h = (int(v) for v in rng.integers(2, 30, 4))
            shade = tuple(int(v) for v in rng.integers(0, 256, 3))
            pen.ellipse((x, y, x + w + 8, y + h + 8), fill=shade)
        pen.ellipse((20, 20, 50, 50), fill=tuple(int(v) for v in rng.integers(0, 256, 3)))
    return image


@pytest.fixture(scope="session")
def tarball(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as `npm pack` writes it."""
    root = tmp_path_factory.mktemp("npm")
    images = root / "package" / "img" / "google" / "64"
    images.mkdir(parents=True)
    for emoji in ENTRIES:
        if emoji["has_img_google"]:
            drawing(str(emoji["name"])).save(images / str(emoji["image"]))
    (root / "package" / "package.json").write_text(json.dumps({"name": NAME, "version": VERSION}))
    (root / "package" / "emoji.json").write_text(json.dumps(ENTRIES))
    (root / "package" / "LICENSE").write_text("The MIT License")
    (root / "package" / "index.js").write_text("not wanted")
    path = root / f"{NAME}-{VERSION}.tgz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(root / "package", "package")
    return path


@pytest.fixture(scope="session")
def package(tarball: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked package."""
    return fetch(tmp_path_factory.mktemp("emoji") / "package", tarball)


@pytest.fixture(scope="session")
def catalogue(package: Path) -> Catalogue:
    return load_catalogue(package)
