"""Which emoji are in the world, and what they are called."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latte.emoji.catalogue import SIDES, Catalogue, load_catalogue
from runtime.errors import InputError
from tests.latte.emoji.conftest import FACES, THINGS


def test_flags_keycaps_variants_codes_and_look_alikes_are_left_out(catalogue: Catalogue) -> None:
    assert len(catalogue) == len(FACES) + len(THINGS) + 1
    for name in ("red disc twin", "man cook", "woman running", "keycap 1", "france flag", "squared katakana sa"):
        assert name not in catalogue.names


def test_names_are_plain_and_belong_to_one_emoji(catalogue: Catalogue) -> None:
    assert {"clock face one o'clock", "bald person", "grinning face"} <= set(catalogue.names)
    everything = [name for emoji in catalogue.emoji for name in (emoji.name, *emoji.synonyms)]
    assert len(everything) == len(set(everything))


def test_synonyms_that_are_ambiguous_or_no_words_are_dropped(catalogue: Catalogue) -> None:
    assert catalogue["laughing face"].synonyms == ("lol",)
    assert catalogue["lol"].name == "laughing face"


def test_sprites_have_premultiplied_colours(catalogue: Catalogue) -> None:
    for size, side in SIDES.items():
        sprites = catalogue.sprites[size]
        assert sprites.shape == (len(catalogue), side, side, 4)
        assert sprites.dtype == np.uint8
        assert np.all(sprites[..., :3] <= sprites[..., 3:])


def test_an_unknown_emoji_is_named(catalogue: Catalogue) -> None:
    with pytest.raises(InputError, match="no emoji 'unicycle'"):
        catalogue["unicycle"]


def test_a_folder_without_the_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"emoji\.json cannot be read"):
        load_catalogue(tmp_path)


@pytest.mark.parametrize("name", ["../../../secret.png", "/etc/passwd"])
def test_an_image_outside_the_package_is_refused(tmp_path: Path, package: Path, name: str) -> None:
    copy = shutil.copytree(package, tmp_path / "package")
    entries = json.loads((copy / "emoji.json").read_text())
    entries[0]["image"] = name
    (copy / "emoji.json").write_text(json.dumps(entries))
    with pytest.raises(InputError, match="not a plain file name"):
        load_catalogue(copy)


def test_a_missing_or_wrong_image_is_named(tmp_path: Path, package: Path) -> None:
    copy = shutil.copytree(package, tmp_path / "package")
    image = copy / "img" / "google" / "64" / "1f300.png"
    Image.new("RGBA", (32, 32)).save(image)
    with pytest.raises(InputError, match=r"1f300\.png has 32x32 pixels, expected 64x64"):
        load_catalogue(copy)
    image.unlink()
    with pytest.raises(InputError, match=r"1f300\.png cannot be read"):
        load_catalogue(copy)
