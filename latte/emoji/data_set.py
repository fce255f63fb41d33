"""Writes the emoji world as a data set that Hugging Face `datasets` reads: images with captions and questions.

    OUT/
    ├── README.md               what it is, where it comes from, its licences; names the splits for `datasets`
    ├── LICENSE                 of the package that the images come from
    ├── emoji.json              the names and synonyms of all emoji
    └── data/
        ├── train-00000-of-00010.parquet
        └── test-00000-of-00001.parquet     combinations that training never shows

Every row is a pure function of (seed, split, row): a larger data set begins with the smaller one.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from latte.emoji.captions import caption, describe
from latte.emoji.catalogue import Catalogue, load_catalogue
from latte.emoji.package import SOURCE
from latte.emoji.questions import DESCRIBE, questions
from latte.emoji.scenes import HELD_OUT_ONE_IN, draw, sample_scene
from runtime.console import progress_bar
from runtime.errors import InputError, MissingExtraError
from runtime.files import check_replaceable, replaced_directory

TRAIN_COUNT = 100_000
TEST_COUNT = 2_000
CAPTIONS_PER_IMAGE = 4
"""The first caption states everything; the others may leave things open."""
SHARD_ROWS = 10_000
ROW_GROUP = 500
"""Rows of a Parquet row group, the unit that a reader loads."""
_SPLITS = {"train": 0, "test": 1}


def build(
    package: Path,
    out: Path,
    count: int = TRAIN_COUNT,
    seed: int = 0,
    *,
    test_count: int = TEST_COUNT,
    force: bool = False,
) -> None:
    """Writes a data set folder with a progress bar. The folder appears when it is complete.

    The columns are `image` (PNG), `captions` (list of strings), `questions` (list of {"question", "answer"}) and
    `scene` (JSON, see `Scene.to_json`). The test split has one emoji and two in turn.

    Args:
        package: the folder that `latte.emoji.package.fetch` made.
        out: the folder to write.
        count: number of rows to train on.
        seed: of all random choices.
        test_count: number of held-out rows.
        force: replace a data set that is there.

    Raises:
        InputError: the package or a number cannot be used, or `out` has other content.
        MissingExtraError: `datasets` is not installed.
    """
    if count < 1 or test_count < 1 or seed < 0:
        raise InputError(
            f"expected at least one row in each split and a seed from 0, got {count}, {test_count}, {seed}"
        )
    check_replaceable(out, "emoji.json", "data set", force=force)
    schema = _schema()
    catalogue = load_catalogue(package)
    with replaced_directory(out) as folder, progress_bar() as progress:
        (folder / "data").mkdir()
        for split, rows in (("train", count), ("test", test_count)):
            task = progress.add_task(f"draw {split}", total=rows)
            for shard, start in enumerate(range(0, rows, SHARD_ROWS)):
                name = f"{split}-{shard:05d}-of-{-(-rows // SHARD_ROWS):05d}.parquet"
                indices = range(start, min(rows, start + SHARD_ROWS))
                for written in _write_shard(folder / "data" / name, schema, catalogue, split, seed, indices):
                    progress.advance(task, written)
        shutil.copyfile(package / "LICENSE", folder / "LICENSE")
        (folder / "README.md").write_text(_readme(len(catalogue), count, test_count, seed), encoding="utf-8")
        emoji = [{"name": emoji.name, "synonyms": emoji.synonyms} for emoji in catalogue.emoji]
        (folder / "emoji.json").write_text(json.dumps(emoji, indent=1) + "\n", encoding="utf-8")


def make_row(catalogue: Catalogue, split: str, seed: int, row: int) -> dict[str, Any]:
    """Returns one row of the data set.

    Args:
        split: "train" or "test".
        row: its index in the split.
    """
    rng = np.random.default_rng([seed, _SPLITS[split], row])
    scene = sample_scene(
        catalogue.names, rng, held_out=split == "test", count=None if split == "train" else 1 + row % 2
    )
    captions = [caption(scene, catalogue, rng, full=i == 0)[0] for i in range(CAPTIONS_PER_IMAGE)]
    asked = [*questions(scene, catalogue.names, rng), (DESCRIBE, describe(scene))]
    file = io.BytesIO()
    Image.fromarray(draw(scene, catalogue)).save(file, "PNG")
    return {
        "image": {"bytes": file.getvalue(), "path": None},
        "captions": captions,
        "questions": [{"question": question, "answer": answer} for question, answer in asked],
        "scene": scene.to_json(),
    }


def _schema() -> Any:
    """Returns the Arrow schema; its metadata tells `datasets` that `image` is an image."""
    try:
        from datasets import Features, Image, List, Value
    except ImportError as error:
        raise MissingExtraError(
            "datasets is not installed; install it with: pip install 'latte-flow[train]'"
        ) from error
    features = {
        "image": Image(),
        "captions": List(Value("string")),
        "questions": List({"question": Value("string"), "answer": Value("string")}),
        "scene": Value("string"),
    }
    return Features(features).arrow_schema


def _write_shard(
    path: Path, schema: Any, catalogue: Catalogue, split: str, seed: int, rows: Sequence[int]
) -> Iterator[int]:
    """Writes a Parquet file; yields the number of rows after each row group."""
    import pyarrow
    import pyarrow.parquet

    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for start in range(0, len(rows), ROW_GROUP):
            group = [make_row(catalogue, split, seed, row) for row in rows[start : start + ROW_GROUP]]
            writer.write_table(pyarrow.Table.from_pylist(group, schema=schema))
            yield len(group)


def _readme(emoji: int, count: int, test_count: int, seed: int) -> str:
    return f"""---
license: apache-2.0
language: en
task_categories: [text-to-image, visual-question-answering]
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*.parquet
  - split: test
    path: data/test-*.parquet
---

# Emoji on plain backgrounds

{count:,} images of 64x64 pixels to train on and {test_count:,} to test with, of {emoji:,} emoji: one large or small,
or two small ones, on a plain background. Drawn with seed {seed}.

- `image`: PNG.
- `captions`: {CAPTIONS_PER_IMAGE} phrasings; the first states everything, the others may leave things open.
- `questions`: question and answer pairs about the image.
- `scene`: what the image shows, as JSON.

Held out: one in {HELD_OUT_ONE_IN} combinations of (emoji, size, place, background), and one in {HELD_OUT_ONE_IN}
unordered pairs of emoji. No image of `train` contains one, every image of `test` does.

Source: {SOURCE}. `LICENSE` is the package's.
"""
