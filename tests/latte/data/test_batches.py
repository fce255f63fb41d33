"""Batches are pure functions of seed, index and row: over processes, over restarts, over bad images."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from latte.data.batch import BadRows, ImageTextBatch
from latte.data.batches import ImageTextBatches
from latte.data.images import ImagePolicy
from latte.data.order import RowOrder
from latte.data.pixel_rows import PixelRows
from latte.data.source import open_data_set
from runtime.errors import InputError, TrainingError
from tests.latte.data.worlds import captions, folder_with_metadata, image_bytes, numbers_of, parquet_file

POLICY = ImagePolicy(8, 8, 4)


def make_batches(path: Path, policy: ImagePolicy = POLICY, **options: float) -> ImageTextBatches:
    return ImageTextBatches(PixelRows(open_data_set(path), policy), **options)  # type: ignore[arg-type]


def joined(*parts: ImageTextBatch) -> tuple[object, ...]:
    """What two processes have together."""
    pixels = torch.cat([part.pixels for part in parts if part.pixels is not None])
    return (
        tuple(name for part in parts for name in part.names),
        tuple(prompt for part in parts for prompt in part.prompts),
        tuple(item for part in parts for item in part.conversations),
        pixels.numpy().tobytes(),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_with_metadata(tmp_path_factory.mktemp("data") / "images", 10, (12, 8))


@pytest.mark.parametrize("crop", ["center", "random", "buckets"])
def test_two_processes_see_what_one_sees_and_a_restart_changes_nothing(folder: Path, crop: str) -> None:
    policy = ImagePolicy(8, 8, 4, crop=crop, flip=True)  # type: ignore[arg-type]
    batches, restarted = (make_batches(folder, policy, seed=3) for _ in range(2))
    for index in (0, 1, 2, 7):
        whole = batches.batch(index, range(6), 6)
        assert joined(whole) == joined(batches.batch(index, range(3), 6), batches.batch(index, range(3, 6), 6))
        if index == 7:
            assert joined(whole) == joined(restarted.batch(index, range(6), 6))
    assert joined(batches.batch(1, range(6), 6)) != joined(make_batches(folder, policy, seed=4).batch(1, range(6), 6))


def test_each_epoch_has_every_row_once_in_another_order_and_no_batch_is_incomplete(folder: Path) -> None:
    batches = make_batches(folder)
    rows = [number for index in range(10) for number in numbers_of(batches.batch(index, range(4), 4))]
    epochs = [rows[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_captions_are_chosen_and_dropped_at_random(folder: Path) -> None:
    batches = make_batches(folder, caption_dropout=0.25)
    prompts = Counter()
    for index in range(40):
        batch = batches.batch(index, range(10), 10)
        for number, prompt in zip(numbers_of(batch), batch.prompts, strict=True):
            assert prompt in ("", *captions(number))
            prompts[prompt and prompt.split()[0]] += 1
            assert batch.conversations[0][0][0] == "which number?"
    assert prompts[""] == pytest.approx(100, abs=30)
    assert prompts["number"] == pytest.approx(150, abs=40)
    assert "" not in make_batches(folder, caption_dropout=0).batch(0, range(100), 100).prompts


def test_flips_and_random_crops_change_the_pixels(tmp_path: Path) -> None:
    ramp = np.broadcast_to(np.arange(32, dtype=np.uint8)[None, :, None] * 8, (8, 32, 3))
    Image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a ramp")

    def seen(policy: ImagePolicy) -> set[tuple[int, bool]]:
        pixels = make_batches(tmp_path, policy).batch(0, range(64), 64).pixels
        assert pixels is not None
        rows = pixels[:, 0, 0].add(1).mul(127.5).round().int()
        return {(int(row.min()), bool(row[0] > row[-1])) for row in rows}

    assert seen(POLICY) == {(96, False)}
    assert seen(ImagePolicy(8, 8, 4, flip=True)) == {(96, False), (96, True)}
    assert len(seen(ImagePolicy(8, 8, 4, crop="random"))) > 15


def folder_with_bad_images(root: Path) -> Path:
    """Of ten images four are bad: truncated, text, too small, without a caption."""
    folder_with_metadata(root, 10, (64, 64))
    (root / "001.png").write_bytes(image_bytes(1, (64, 64))[:60])
    (root / "003.png").write_bytes(b"text")
    (root / "005.png").write_bytes(image_bytes(5, (3, 3)))
    lines = (root / "metadata.jsonl").read_text().splitlines()
    lines[7] = '{"file_name": "007.png", "text": [" "], "questions": []}'
    (root / "metadata.jsonl").write_text("\n".join(lines))
    return root


@pytest.mark.parametrize("crop", ["center", "buckets"])
def test_bad_images_are_counted_named_once_and_replaced(
    crop: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = ImagePolicy(32, 32, 8, crop=crop)  # type: ignore[arg-type]
    batches = make_batches(folder_with_bad_images(tmp_path / "images"), policy)
    bad = BadRows("images")
    for index in range(4):
        whole = batches.batch(index, range(10), 10)
        assert joined(whole) == joined(batches.batch(index, range(5), 10), batches.batch(index, range(5, 10), 10))
        assert not {1, 3, 5, 7} & set(numbers_of(whole))
        bad.add(whole)
    # Headers alone tell three of the four.
    names = {"001.png"} if crop == "buckets" else {"001.png", "003.png", "005.png", "007.png"}
    assert set(bad.reasons) == names
    assert len(bad) == len(names)
    printed = capsys.readouterr().err
    assert [printed.count(name) for name in sorted(names)] == [1] * len(names)


@pytest.mark.parametrize("crop", ["center", "buckets"])
def test_a_data_set_that_is_mostly_bad_is_refused(crop: str, tmp_path: Path) -> None:
    images = [image_bytes(i, (32, 32)) if i < 4 else b"text" for i in range(10)]
    parquet_file(tmp_path / "a.parquet", range(10), images)
    with pytest.raises(
        InputError, match="6 of 10 rows looked at cannot be used, the first is row 4: it is not an image"
    ):
        make_batches(tmp_path, ImagePolicy(32, 32, 8, crop=crop))  # type: ignore[arg-type]


def test_rows_that_turn_out_to_be_mostly_bad_end_the_training() -> None:
    bad = BadRows("images")
    bad.count(40, [])
    bad.count(0, [(f"{i}.png", "it is not an image") for i in range(40)])
    with pytest.raises(TrainingError, match=r"images: 41 of 81 rows cannot be used, the first is 0.png: it is not an"):
        bad.count(0, [("0.png", "it is not an image")])


def test_a_batch_holds_one_bucket_and_buckets_come_in_proportion() -> None:
    bucket_of = np.array([0] * 50 + [2] * 149 + [-1] * 7 + [5] * 1)
    order = RowOrder(bucket_of, seed=1)
    seen: dict[int, list[int]] = {0: [], 2: [], 5: []}
    for index in range(3000):
        bucket, rows = order.rows(index, range(4), 4)
        assert set(bucket_of[rows]) == {bucket}
        seen[bucket] += rows.tolist()
        if index % 500 == 0:
            parts = [RowOrder(bucket_of, seed=1).rows(index, part, 4)[1] for part in (range(1), range(1, 4))]
            assert np.concatenate(parts).tolist() == rows.tolist()
    for bucket, rows in seen.items():
        members = np.flatnonzero(bucket_of == bucket)
        assert len(rows) / 12000 == pytest.approx(len(members) / 200, abs=0.001)
        for start in range(0, len(rows) - len(members) + 1, len(members)):
            assert sorted(rows[start : start + len(members)]) == members.tolist()


def test_images_go_into_the_bucket_of_their_aspect(tmp_path: Path) -> None:
    images = [image_bytes(i, (128, 64) if i % 2 else (64, 128)) for i in range(12)]
    parquet_file(tmp_path / "a.parquet", range(12), images)
    batches = make_batches(tmp_path, ImagePolicy(32, 32, 8, crop="buckets"))
    shapes = set()
    for index in range(8):
        batch = batches.batch(index, range(4), 4)
        assert batch.pixels is not None
        shapes.add(tuple(batch.pixels.shape[2:]))
        assert len({number % 2 for number in numbers_of(batch)}) == 1
    assert shapes == {(24, 40), (40, 24)}


class Indexed(Dataset):  # type: ignore[type-arg]
    def __init__(self, batches: ImageTextBatches) -> None:
        self.batches = batches

    def __getitem__(self, index: int) -> ImageTextBatch:
        return self.batches.batch(index, range(4), 4)


def test_worker_processes_make_the_same_batches(folder: Path) -> None:
    batches = make_batches(folder)
    loader = DataLoader(Indexed(batches), batch_size=None, num_workers=1, sampler=range(2, 5))
    for index, batch in zip(range(2, 5), loader, strict=True):
        assert joined(batch) == joined(batches.batch(index, range(4), 4))


def test_a_share_of_dropped_captions_beyond_one_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"must be in \[0, 1\], got 1.5"):
        make_batches(folder, caption_dropout=1.5)
