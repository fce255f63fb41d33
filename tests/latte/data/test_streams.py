"""Streams give the same batches to one process, two processes, workers, and a run that goes on."""

from __future__ import annotations

import pickle
import shutil
from collections import Counter
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

import latte.data.pixel_rows
from latte.data.batches import ImageTextBatches
from latte.data.images import ImagePolicy
from latte.data.source import open_data_set
from latte.data.streams import StreamedBatches, batches_of, lanes_of
from runtime.errors import InputError, TrainingError
from tests.latte.data.test_batches import Indexed, folder_with_bad_images, joined
from tests.latte.data.worlds import image_bytes, numbers_of, parquet_file, tar_file

POLICY = ImagePolicy(8, 8, 4)


def streamed(path: Path, policy: ImagePolicy = POLICY, **options: int) -> StreamedBatches:
    batches = batches_of(open_data_set(path, streaming=True), policy, **options)
    assert isinstance(batches, StreamedBatches)
    return batches


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards of six rows."""
    root = tmp_path_factory.mktemp("tars")
    for shard in range(4):
        tar_file(root / f"{shard}.tar", range(shard * 6, shard * 6 + 6))
    return root


@pytest.mark.parametrize("total", [6, 8])
def test_two_processes_see_what_one_sees_and_a_restart_changes_nothing(tars: Path, total: int) -> None:
    whole, first, second = (streamed(tars, seed=3, shuffle_buffer=4) for _ in range(3))
    half = total // 2
    for index in range(8):
        batch = whole.batch(index, range(total), total)
        parts = first.batch(index, range(half), total), second.batch(index, range(half, total), total)
        assert joined(batch) == joined(*parts)
    restarted = pickle.loads(pickle.dumps(whole))
    for index in (7, 2):  # going on, and back
        assert joined(restarted.batch(index, range(total), total)) == joined(whole.batch(index, range(total), total))


def test_each_epoch_has_every_row_once_in_another_order(tars: Path) -> None:
    batches = streamed(tars, shuffle_buffer=4)
    rows = [number for index in range(9) for number in numbers_of(batches.batch(index, range(8), 8))]
    epochs = [rows[start : start + 24] for start in (0, 24, 48)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_a_process_reads_only_the_shards_of_its_rows(tars: Path, tmp_path: Path) -> None:
    shutil.copytree(tars, tmp_path / "tars")
    batches = streamed(tmp_path / "tars")
    for shard in (2, 3):
        (tmp_path / "tars" / f"{shard}.tar").unlink()
    rows = Counter(number // 6 for number in numbers_of(batches.batch(0, range(4), 8)))
    assert rows == {0: 2, 1: 2}


def test_there_are_as_many_lanes_as_the_shards_allow_and_the_batch_divides() -> None:
    assert [lanes_of(*case) for case in ((8, 4), (6, 4), (8, 1), (7, 4), (2, 100))] == [4, 3, 1, 1, 2]


def test_rows_of_other_processes_and_of_the_past_are_not_decoded(tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    render = latte.data.pixel_rows.render
    monkeypatch.setattr(latte.data.pixel_rows, "render", lambda *args: (decoded.append(1), render(*args))[1])
    streamed(tars).batch(5, range(3), 6)
    assert len(decoded) == 3


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_make_the_same_batches(tars: Path, workers: int) -> None:
    loader = DataLoader(Indexed(streamed(tars)), batch_size=None, num_workers=workers, sampler=range(2, 6))
    batches = streamed(tars)
    for index, batch in zip(range(2, 6), loader, strict=True):
        assert joined(batch) == joined(batches.batch(index, range(4), 4))


def test_bad_rows_are_replaced_by_the_next(tmp_path: Path) -> None:
    root = folder_with_bad_images(tmp_path / "images")
    policy = ImagePolicy(32, 32, 8)
    whole = streamed(root, policy, shuffle_buffer=1).batch(0, range(10), 10)
    assert numbers_of(whole) == [0, 2, 2, 4, 4, 6, 6, 8, 8, 9]
    assert [name for name, _ in whole.bad] == ["001.png", "003.png", "005.png", "007.png"]
    part = streamed(root, policy, shuffle_buffer=1).batch(0, range(5, 10), 10)
    assert numbers_of(part) == [6, 6, 8, 8, 9]


def test_a_stream_of_bad_rows_ends_with_one_line(tmp_path: Path) -> None:
    tar_file(tmp_path / "a.tar", range(4), [b"text"] * 4)
    expected = r"32 rows one after another cannot be used, the last is a.tar/\d*.png: it is not an image"
    with pytest.raises(TrainingError, match=expected):
        streamed(tmp_path).batch(0, range(2), 2)


def test_what_a_stream_cannot_do_is_refused(tars: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is streamed, which excludes --crop buckets; give --cache-latents"):
        streamed(tars, ImagePolicy(8, 8, 4, crop="buckets"))
    with pytest.raises(InputError, match="--shuffle-buffer must be at least 1 row, got 0"):
        streamed(tars, shuffle_buffer=0)
    parquet_file(tmp_path / "a.parquet", range(4), [image_bytes(i) for i in range(4)])
    indexed = open_data_set(tmp_path)
    assert isinstance(batches_of(indexed, POLICY), ImageTextBatches)
    with pytest.raises(InputError, match="is not streamed"):
        StreamedBatches(indexed, POLICY)
