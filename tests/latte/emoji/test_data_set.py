"""The data set folder, read with Hugging Face `datasets`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from latte.emoji.catalogue import Catalogue
from latte.emoji.data_set import build
from latte.emoji.questions import DESCRIBE
from latte.emoji.scenes import Scene, draw, is_held_out
from runtime.errors import InputError

ROWS = {"train": 60, "test": 20}


@pytest.fixture(scope="module")
def folder(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "emoji"
    build(package, out, ROWS["train"], seed=3, test_count=ROWS["test"])
    return out


@pytest.fixture(scope="module")
def splits(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, object]]]:
    datasets = pytest.importorskip("datasets")
    cache = str(tmp_path_factory.mktemp("cache"))
    loaded = datasets.load_dataset(str(folder), cache_dir=cache)
    return {name: list(split) for name, split in loaded.items()}


def test_datasets_reads_both_splits(splits: dict[str, list[dict[str, object]]]) -> None:
    assert {name: len(rows) for name, rows in splits.items()} == ROWS
    row = splits["train"][0]
    assert set(row) == {"image", "captions", "questions", "scene"}
    assert len(row["captions"]) == 4  # type: ignore[arg-type]


def test_images_show_their_scenes(splits: dict[str, list[dict[str, object]]], catalogue: Catalogue) -> None:
    for rows in splits.values():
        for row in rows:
            scene = Scene.from_json(str(row["scene"]))
            assert np.array_equal(np.asarray(row["image"]), draw(scene, catalogue))
            assert {q["question"] for q in row["questions"]} >= {DESCRIBE}  # type: ignore[attr-defined]


def test_only_the_test_split_is_held_out(splits: dict[str, list[dict[str, object]]]) -> None:
    for name, rows in splits.items():
        assert all(is_held_out(Scene.from_json(str(row["scene"]))) == (name == "test") for row in rows)
    assert {len(Scene.from_json(str(row["scene"])).emoji) for row in splits["test"]} == {1, 2}


def test_the_folder_names_its_source_and_licences(folder: Path, catalogue: Catalogue) -> None:
    readme = (folder / "README.md").read_text()
    assert "emoji-datasource-google" in readme
    assert "Apache License 2.0" in readme
    assert "MIT" in (folder / "LICENSE").read_text()
    assert [emoji["name"] for emoji in json.loads((folder / "emoji.json").read_text())] == list(catalogue.names)


def test_a_larger_data_set_begins_with_the_smaller(
    package: Path, splits: dict[str, list[dict[str, object]]], tmp_path: Path
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    build(package, tmp_path / "small", 10, seed=3, test_count=1)
    table = parquet.read_table(tmp_path / "small" / "data" / "train-00000-of-00001.parquet")
    assert table.column("scene").to_pylist() == [row["scene"] for row in splits["train"][:10]]
    assert table.column("captions").to_pylist() == [row["captions"] for row in splits["train"][:10]]


def test_a_data_set_is_replaced_only_when_asked(folder: Path, package: Path) -> None:
    with pytest.raises(InputError, match="already contains a data set; pass --force"):
        build(package, folder, 1, test_count=1)


def test_counts_must_be_positive(package: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected at least one row in each split"):
        build(package, tmp_path / "out", 0)
    assert not (tmp_path / "out").exists()
