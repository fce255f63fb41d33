"""Every layout of a data set is found, read and split; what is missing is said in one line."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latte.data.batches import ImageTextBatches
from latte.data.images import BadRowError, ImagePolicy
from latte.data.pixel_rows import PixelRows
from latte.data.source import open_data_set
from runtime.errors import InputError
from tests.latte.data.worlds import (
    captions,
    folder_of_classes,
    folder_with_metadata,
    folder_with_texts,
    image_bytes,
    numbers_of,
    parquet_file,
    tar_file,
)

LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "metadata": lambda root: folder_with_metadata(root / "images [1]", 6),
    "texts": lambda root: folder_with_texts(root / "images", 6),
    "parquet folder": lambda root: parquet_file(root / "parquet" / "a.parquet", range(6)).parent,
    "parquet file": lambda root: parquet_file(root / "b.parquet", range(6)),
    "tar": lambda root: tar_file(root / "c.tar", range(6)),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_images_with_all_their_captions(layout: str, streaming: bool, tmp_path: Path) -> None:
    data_set = open_data_set(LAYOUTS[layout](tmp_path), streaming=streaming)
    records = [data_set.reader.read(row, i) for i, row in enumerate(data_set.table)]
    assert [record.image for record in records] == [image_bytes(i) for i in range(6)]
    assert [list(record.captions) for record in records] == [captions(i) for i in range(6)]
    assert len({record.name for record in records}) == 6
    if layout == "metadata":
        assert records[4].questions == (("which number?", "4"),)
    if not streaming:
        assert data_set.captions_of(3) == records[3].captions
        batches = pickle.loads(pickle.dumps(ImageTextBatches(PixelRows(data_set, ImagePolicy(8, 8, 4)))))
        assert sorted(numbers_of(batches.batch(0, range(6), 6))) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("streaming", [False, True])
def test_class_folders_become_prompts(streaming: bool, tmp_path: Path) -> None:
    root = folder_of_classes(tmp_path / "images", ["golden_retriever", "n02123045"], 2)
    plain = open_data_set(root, streaming=streaming)
    prompts = [plain.reader.read(row, 0).captions for row in plain.table]
    assert prompts == [("a photo of golden retriever",)] * 2 + [("a photo of n02123045",)] * 2
    (tmp_path / "names.json").write_text(json.dumps({"golden_retriever": "dog", "n02123045": ["tabby", "cat"]}))
    named = open_data_set(
        root, streaming=streaming, class_names=tmp_path / "names.json", templates=["a {class}", "{class}!"]
    )
    prompts = [named.reader.read(row, 0).captions for row in named.table]
    assert prompts[0] == ("a dog", "dog!")
    assert prompts[3] == ("a tabby", "tabby!", "a cat", "cat!")


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    folder_of_classes(tmp_path / "everything", ["cat", "dog", "horse"], 2)
    (tmp_path / "some" / "dog").mkdir(parents=True)
    (tmp_path / "some" / "cat").symlink_to(tmp_path / "everything" / "cat")
    (tmp_path / "some" / "dog" / "one.png").symlink_to(tmp_path / "everything" / "dog" / "test_0.png")
    (tmp_path / "some" / "dog" / "again").symlink_to(tmp_path / "some")
    data_set = open_data_set(tmp_path / "some")
    assert sorted(data_set.record(row).name for row in range(3)) == ["cat/test_0.png", "cat/test_1.png", "dog/one.png"]
    assert {data_set.captions_of(row) for row in range(3)} == {("a photo of cat",), ("a photo of dog",)}


def test_a_column_of_classes_becomes_prompts(tmp_path: Path) -> None:
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"img": [{"bytes": image_bytes(i), "path": None} for i in range(3)], "label": [0, 1, -1]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    data_set = open_data_set(tmp_path / "a.parquet")
    assert data_set.record(1).captions == ("a photo of dog",)
    with pytest.raises(BadRowError, match="it has no class"):
        data_set.record(2)


def test_splits_are_folders_of_images_and_names_of_other_files(tmp_path: Path) -> None:
    folder_with_metadata(tmp_path / "images" / "train", 4)
    folder_with_metadata(tmp_path / "images" / "val", 2)
    parquet_file(tmp_path / "parquet" / "train-00000-of-00002.parquet", range(3))
    parquet_file(tmp_path / "parquet" / "train-00001-of-00002.parquet", range(3, 5))
    parquet_file(tmp_path / "parquet" / "validation-00000-of-00001.parquet", range(1))
    (tmp_path / "parquet" / "README.md").write_text("A data set.")
    for name, train, validation in (("images", 4, 2), ("parquet", 5, 1)):
        assert len(open_data_set(tmp_path / name)) == train
        assert len(open_data_set(tmp_path / name, "validation")) == validation
        with pytest.raises(InputError, match=r"has no split 'test'; its splits: train, validation"):
            open_data_set(tmp_path / name, "test")
    assert len(open_data_set(f"{tmp_path}/parquet/train-*.parquet")) == 5


def write_plain_images(root: Path) -> None:
    (root / "a.png").write_bytes(image_bytes(0))
    (root / "b.png").write_bytes(image_bytes(1))


def with_columns(**columns: Any) -> Callable[[Path], None]:
    table = pa.table({"image": [image_bytes(0)], **columns})
    return lambda root: pq.write_table(table, root / "a.parquet")


@pytest.mark.parametrize(
    ("write", "options", "expected"),
    [
        (lambda root: None, {}, "contains no images: found no files; expected a folder of images with metadata"),
        (write_plain_images, {}, "has no captions: found 2 .png; expected a folder of images with metadata"),
        (with_columns(n=[1]), {}, r"has no captions: .*its columns: image \(binary\), n \(int64\)"),
        (with_columns(text=[1]), {}, "the column text must contain strings or lists of strings, is int64"),
        (with_columns(text=["a"]), {"caption_column": "words"}, "no column 'words'; its columns: image"),
        (with_columns(text=["a"]), {"image_column": "photo"}, "no column 'photo'; its columns: image"),
        (with_columns(text=["a"]), {"templates": ["a cat"]}, r"must contain \{class\}, got 'a cat'"),
        (lambda root: (root / "a.parquet").write_text("no"), {}, "cannot be read: "),
    ],
)  # fmt: skip
def test_what_is_missing_is_said_in_one_line(
    write: Callable[[Path], None], options: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    write(tmp_path)
    with pytest.raises(InputError, match=expected) as caught:
        open_data_set(tmp_path, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("./nowhere", "there is no data set at ./nowhere; expected a folder"),
        ("nobody/nothing", "there is no folder nobody/nothing, and as a name on the hub .* cannot be read"),
        ("https://localhost/a.zip", "is neither a Parquet file nor a tar"),
        ("https://localhost:1/a.tar", "cannot be read: "),
    ],
)
def test_a_data_set_that_is_not_there_is_refused_in_one_line(spec: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected) as caught:
        open_data_set(spec, streaming=True)
    assert "\n" not in str(caught.value)


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    empty = {"image": pa.array([], pa.binary()), "text": pa.array([], pa.string())}
    pq.write_table(pa.table(empty), tmp_path / "a.parquet")
    for streaming in (False, True):
        with pytest.raises(InputError, match=r"contains no images in its split 'train'|cannot be read"):
            open_data_set(tmp_path, streaming=streaming)


def test_a_class_without_a_name_is_found_at_once(tmp_path: Path) -> None:
    root = folder_of_classes(tmp_path / "images", ["a", "b"], 1)
    (tmp_path / "names.json").write_text('{"a": "apple"}')
    with pytest.raises(InputError, match="1 of 2 classes have no name in --class-names, the first is 'b'"):
        open_data_set(root, class_names=tmp_path / "names.json")
    (tmp_path / "names.json").write_text('{"a": 3}')
    with pytest.raises(InputError, match="the class 'a' must have a name or a list of names, got 3"):
        open_data_set(root, class_names=tmp_path / "names.json")


def test_no_row_reads_a_file_outside_the_data_set(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(image_bytes(1))
    images = tmp_path / "images"
    images.mkdir()
    cells = [{"bytes": None, "path": path} for path in (f"{tmp_path}/secret.png", f"{images}/../secret.png")]
    pq.write_table(pa.table({"image": cells, "text": ["a", "b"]}), images / "a.parquet")
    data_set = open_data_set(images)
    for row in range(2):
        with pytest.raises(BadRowError, match="is outside"):
            data_set.record(row)
    (images / "a.parquet").unlink()
    (images / "a.png").write_bytes(image_bytes(0))
    (images / "metadata.jsonl").write_text('{"file_name": "../secret.png", "text": "a"}')
    with pytest.raises(InputError, match=r"cannot be read: Invalid metadata file_name '../secret.png'"):
        open_data_set(images)


@pytest.mark.parametrize("layout", ["metadata", "texts", "parquet folder"])
def test_the_fingerprint_changes_with_the_files_alone(layout: str, tmp_path: Path) -> None:
    root = LAYOUTS[layout](tmp_path)
    first = open_data_set(root).fingerprint()
    assert open_data_set(root).fingerprint() == first
    if layout == "parquet folder":
        parquet_file(root / "a.parquet", range(1, 7))
    else:
        (root / ("003.txt" if layout == "texts" else "003.png")).write_bytes(b"changed")
    assert open_data_set(root).fingerprint() != first
