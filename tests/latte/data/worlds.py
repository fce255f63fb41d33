"""Small data sets of plain colours, in every layout: the value of an image's pixels says which it is."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from latte.data.batch import ImageTextBatch

STEP = 5
"""Image i has the grey value STEP * i."""


def image_bytes(number: int, size: tuple[int, int] = (8, 8), file_format: str = "png", **options: Any) -> bytes:
    """Encodes image `number`, of a width and height."""
    buffer = io.BytesIO()
    pixels = np.full((size[1], size[0], 3), STEP * number, np.uint8)
    Image.fromarray(pixels).save(buffer, file_format, **options)
    return buffer.getvalue()


def captions(number: int) -> list[str]:
    return [f"number {number}", f"the image {number}"]


def folder_with_metadata(root: Path, count: int, size: tuple[int, int] = (8, 8)) -> Path:
    root.mkdir(parents=True)
    lines = []
    for i in range(count):
        (root / f"{i:03}.png").write_bytes(image_bytes(i, size))
        questions = [{"question": "which number?", "answer": str(i)}]
        lines.append(json.dumps({"file_name": f"{i:03}.png", "text": captions(i), "questions": questions}))
    (root / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return root


def folder_with_texts(root: Path, count: int) -> Path:
    root.mkdir(parents=True)
    for i in range(count):
        (root / f"{i:03}.png").write_bytes(image_bytes(i))
        (root / f"{i:03}.txt").write_text("\n".join(captions(i)), encoding="utf-8")
    return root


def folder_of_classes(root: Path, classes: Sequence[str], count: int) -> Path:
    for place, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"test_{i}.png").write_bytes(image_bytes(place * count + i))
    return root


def parquet_file(path: Path, numbers: range, images: Sequence[bytes] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": data, "path": None} for data in images or [image_bytes(i) for i in numbers]]
    pq.write_table(pa.table({"image": cells, "captions": [captions(i) for i in numbers]}), path, row_group_size=4)
    return path


def tar_file(path: Path, numbers: range, images: Sequence[bytes] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for place, i in enumerate(numbers):
            members = {
                "png": images[place] if images else image_bytes(i),
                "json": json.dumps({"caption": captions(i)}).encode(),
            }
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{i:03}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def numbers_of(batch: ImageTextBatch) -> list[int]:
    """Reads the numbers of images back from their pixels."""
    assert batch.pixels is not None
    values = batch.pixels.add(1).mul(127.5).mean(dim=(1, 2, 3)) / STEP
    return [round(value) for value in values.tolist()]
