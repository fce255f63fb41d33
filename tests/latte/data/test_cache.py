"""The latent cache: the right latents, each encoded once, whatever is killed, damaged, added or exchanged."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from latte.data.batches import Choices, ImageTextBatches
from latte.data.cache import LatentCache
from latte.data.cached_rows import CachedRows
from latte.data.images import ImagePolicy
from latte.data.pixel_rows import PixelRows
from latte.data.source import open_data_set
from latte.data.statistics import ChannelStatistics
from latte.model import LatteFlow
from runtime.errors import InputError, TrainingError
from tests.latte.data.test_batches import folder_with_bad_images
from tests.latte.data.worlds import captions, folder_with_metadata, image_bytes, parquet_file, tar_file
from tests.tiny import tiny_autoencoder

POLICY = ImagePolicy(8, 16, 4)
FIRST = Choices(caption=0, dropout=0, flip=0.9, place=0)


@pytest.fixture
def encoded(model: LatteFlow, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of images in every call of the encoder."""
    calls: list[int] = []
    encode = model.vae.encode

    def counted(pixels: torch.Tensor) -> object:
        calls.append(len(pixels))
        return encode(pixels)

    monkeypatch.setattr(model.vae, "encode", counted)
    return calls


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return folder_with_metadata(tmp_path / "images", 10, (20, 10))


def fill(cache: LatentCache, path: Path, policy: ImagePolicy = POLICY, world: int = 1, **options: int) -> CachedRows:
    data_set = open_data_set(path)
    for rank in range(world):
        cache.fill(data_set, policy, rank=rank, world=world, batch_size=3, **options)
    return cache.rows(data_set, policy)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("crop", ["center", "buckets"])
def test_cached_rows_are_those_that_would_be_encoded(
    crop: str, flip: bool, images: Path, model: LatteFlow, tmp_path: Path
) -> None:
    policy = ImagePolicy(8, 16, 4, crop=crop, flip=flip)  # type: ignore[arg-type]
    rows = fill(LatentCache(tmp_path / "cache", model), images, policy)
    cached = pickle.loads(pickle.dumps(ImageTextBatches(rows, seed=5)))
    plain = ImageTextBatches(PixelRows(open_data_set(images), policy), seed=5)
    for index in range(3):
        expected = plain.batch(index, range(2, 8), 8)
        batch = cached.batch(index, range(2, 8), 8)
        assert batch.names == expected.names
        assert batch.prompts == expected.prompts
        assert batch.pixels is None
        assert batch.latents is not None
        assert expected.pixels is not None
        with torch.no_grad():
            torch.testing.assert_close(batch.latents, model.vae.encode(expected.pixels).latent, atol=2e-5, rtol=1e-4)
        assert batch.token_ids is not None
        assert [list(ids) for ids in batch.token_ids] == model.tokenize(batch.prompts)


def test_training_with_a_cache_reads_no_image(images: Path, model: LatteFlow, tmp_path: Path) -> None:
    batches = ImageTextBatches(fill(LatentCache(tmp_path / "cache", model), images))
    expected = batches.batch(0, range(4), 4).latents
    shutil.rmtree(images)
    again = pickle.loads(pickle.dumps(batches)).batch(0, range(4), 4).latents
    assert torch.equal(again, expected)


def test_nothing_is_encoded_twice(images: Path, model: LatteFlow, tmp_path: Path, encoded: list[int]) -> None:
    cache = LatentCache(tmp_path / "cache", model)
    (images / "003.png").write_bytes(image_bytes(2, (20, 10)))  # the same image twice
    fill(cache, images)
    assert encoded == [3, 3, 3]
    fill(LatentCache(tmp_path / "cache", model), images)
    assert sum(encoded) == 9
    # The same images in another data set, with other captions.
    other = [image_bytes(i, (20, 10)) for i in range(5, 12)]
    rows = fill(cache, parquet_file(tmp_path / "other" / "a.parquet", range(20, 27), other))
    assert sum(encoded) == 11
    assert rows.load(0, 0, FIRST).prompt == captions(20)[0]


def test_a_data_set_that_grows_encodes_what_is_new(
    images: Path, model: LatteFlow, tmp_path: Path, encoded: list[int]
) -> None:
    cache = LatentCache(tmp_path / "cache", model)
    fill(cache, images)
    shutil.rmtree(images)
    folder_with_metadata(images, 13, (20, 10))
    with pytest.raises(TrainingError, match=r"is not in the latent cache .*; fill it first"):
        cache.rows(open_data_set(images), POLICY)
    assert len(fill(cache, images)) == 13
    assert sum(encoded) == 13


def test_another_crop_or_autoencoder_makes_other_latents(
    images: Path, model: LatteFlow, tmp_path: Path, encoded: list[int]
) -> None:
    first = fill(LatentCache(tmp_path / "cache", model), images)
    fill(LatentCache(tmp_path / "cache", model), images, ImagePolicy(8, 8, 4))
    assert sum(encoded) == 20
    other = LatteFlow(model.config, model.flow, model.vlm, tiny_autoencoder(seed=1), model.tokenizer)
    second = fill(LatentCache(tmp_path / "cache", other), images)
    assert first.mean != second.mean
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert fill(LatentCache(tmp_path / "cache", model), images).mean == first.mean


@pytest.mark.parametrize("flip", [False, True])
def test_statistics_are_those_of_all_latents(flip: bool, images: Path, model: LatteFlow, tmp_path: Path) -> None:
    rows = fill(LatentCache(tmp_path / "cache", model), images, ImagePolicy(8, 16, 4, flip=flip), world=2)
    variants = (0.9, 0.1)[: 1 + flip]
    latents = np.stack([rows.load(row, 0, replace(FIRST, flip=v)).latents for row in range(10) for v in variants])
    values = latents.astype(np.float64)
    np.testing.assert_allclose(rows.mean, values.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(rows.std, values.std(axis=(0, 2, 3)), rtol=1e-12)


def test_statistics_keep_their_digits_where_the_mean_is_large() -> None:
    latents = (1e4 + np.random.default_rng(0).standard_normal((64, 3, 4, 4))).astype(np.float32)
    merged = ChannelStatistics.empty(3)
    for part in np.split(latents, [1, 7, 40]):
        merged = merged.merged(ChannelStatistics.of(part))
    np.testing.assert_allclose(merged.mean, latents.astype(np.float64).mean(axis=(0, 2, 3)), rtol=1e-14)
    np.testing.assert_allclose(merged.std, latents.astype(np.float64).std(axis=(0, 2, 3)), rtol=1e-12)


def test_two_processes_fill_what_one_fills(images: Path, model: LatteFlow, tmp_path: Path, encoded: list[int]) -> None:
    one = fill(LatentCache(tmp_path / "one", model), images)
    two = fill(LatentCache(tmp_path / "two", model), images, world=2)
    assert sum(encoded) == 20
    assert one.mean == pytest.approx(two.mean, rel=1e-6)
    for index in range(3):
        parts = [ImageTextBatches(rows).batch(index, range(8), 8) for rows in (one, two)]
        assert parts[0].prompts == parts[1].prompts
        assert parts[0].token_ids == parts[1].token_ids
        torch.testing.assert_close(parts[0].latents, parts[1].latents, atol=2e-5, rtol=1e-4)
    many = fill(LatentCache(tmp_path / "many", model), images, world=12)  # two of them have nothing to do
    assert many.mean == pytest.approx(one.mean, rel=1e-6)
    assert sum(encoded) == 30
    # Another number of processes uses what is there.
    fill(LatentCache(tmp_path / "two", model), images, world=3)
    assert sum(encoded) == 30


def test_half_of_the_processes_are_not_enough(images: Path, model: LatteFlow, tmp_path: Path) -> None:
    cache, data_set = LatentCache(tmp_path / "cache", model), open_data_set(images)
    cache.fill(data_set, POLICY, rank=1, world=2)
    with pytest.raises(TrainingError, match="fill it first"):
        cache.rows(data_set, POLICY)


def test_bad_images_are_replaced_as_without_a_cache(
    model: LatteFlow, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folder_with_bad_images(tmp_path / "images")
    policy = ImagePolicy(32, 32, 4)
    rows = fill(LatentCache(tmp_path / "cache", model), root, policy)
    printed = capsys.readouterr().err
    assert [printed.count(f"left out {name}") for name in ("001.png", "003.png", "005.png", "007.png")] == [1] * 4
    plain = ImageTextBatches(PixelRows(open_data_set(root), policy))
    for index in range(4):
        expected, batch = (source.batch(index, range(8), 8) for source in (plain, ImageTextBatches(rows)))
        assert batch.names == expected.names
        assert batch.bad == expected.bad


def test_a_damaged_shard_is_named_and_made_again(
    images: Path, model: LatteFlow, tmp_path: Path, encoded: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    cache = LatentCache(tmp_path / "cache", model, rows_per_shard=3)
    expected = fill(cache, images)
    shards = sorted((cache.folder / "shards").iterdir())
    assert len(shards) == 4
    lost = 0
    for shard in shards[:3]:
        with safe_open(shard, "np") as file:
            lost += len(file.get_tensor("keys"))
    content = bytearray(shards[0].read_bytes())
    content[-5] ^= 1
    shards[0].write_bytes(content)
    shards[1].write_bytes(shards[1].read_bytes()[:-20])
    shards[2].unlink()
    again = fill(cache, images)
    printed = capsys.readouterr().err
    assert f"the shard {shards[0]} is damaged (its content does not have the hash" in printed
    assert f"the shard {shards[1]} is damaged (" in printed
    assert sum(encoded) == 10 + lost
    assert again.mean == pytest.approx(expected.mean, rel=1e-6)


def test_a_prompt_that_is_too_long_is_found_before_anything_is_encoded(
    model: LatteFlow, tmp_path: Path, encoded: list[int]
) -> None:
    root = folder_with_metadata(tmp_path / "images", 10, (20, 10))
    lines = (root / "metadata.jsonl").read_text().splitlines()
    for row in (4, 8):
        lines[row] = lines[row].replace(f"the image {row}", f"row {row} " + "of a very long story " * 30)
    (root / "metadata.jsonl").write_text("\n".join(lines))
    expected = r"2 captions are too long, the first in 004.png, 'row 4 of a very long story .*: a prompt has \d+ tokens"
    with pytest.raises(InputError, match=expected):
        fill(LatentCache(tmp_path / "cache", model), root)
    assert not encoded


def test_random_crops_and_a_full_disk_are_refused_before_anything_is_encoded(
    images: Path, model: LatteFlow, tmp_path: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = LatentCache(tmp_path / "cache", model)
    with pytest.raises(InputError, match="--crop random cannot be cached"):
        fill(cache, images, ImagePolicy(8, 16, 4, crop="random"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(InputError, match=r"the latents of 10 images need 0.1 GB and .* has 0.0 GB free; make room"):
        fill(cache, images)
    assert not encoded


def test_a_folder_that_cannot_be_written_to_is_refused(model: LatteFlow, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(InputError, match="cannot write to"):
        LatentCache(tmp_path / "cache", model)


def test_a_disk_that_fills_up_ends_with_one_line_and_nothing_half_written(
    images: Path, model: LatteFlow, tmp_path: Path
) -> None:
    import resource

    cache, data_set = LatentCache(tmp_path / "cache", model), open_data_set(images)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, limits[1]))
        with pytest.raises(TrainingError, match=r"cannot write latents to .*; make room"):
            cache.fill(data_set, POLICY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list((cache.folder / "shards").iterdir())


def test_workers_fill_the_same_cache(images: Path, model: LatteFlow, tmp_path: Path, encoded: list[int]) -> None:
    one = fill(LatentCache(tmp_path / "one", model), images)
    two = fill(LatentCache(tmp_path / "two", model), images, num_workers=2)
    assert encoded[:4] == encoded[4:]
    assert one.mean == two.mean


def test_a_stream_is_cached_and_then_has_an_index(model: LatteFlow, tmp_path: Path, encoded: list[int]) -> None:
    for shard in range(3):
        tar_file(tmp_path / "tars" / f"{shard}.tar", range(shard * 4, shard * 4 + 4))
    stream = open_data_set(tmp_path / "tars", streaming=True)
    policy = ImagePolicy(8, 8, 4)
    names = []
    for world in (1, 2):
        cache = LatentCache(tmp_path / "cache", model)
        for rank in range(world):
            cache.fill(stream, policy, rank=rank, world=world)
        rows = cache.rows(stream, policy)
        assert len(rows) == 12
        names.append([rows.name_of(row) for row in range(12)])
    assert names[0] == names[1]
    assert sum(encoded) == 12
    assert len(set(ImageTextBatches(rows).batch(0, range(12), 12).names)) == 12


SLOW_FILL = """
import sys, time
from pathlib import Path
from latte.checkpoint import load_checkpoint
from latte.data.cache import LatentCache
from latte.data.images import ImagePolicy
from latte.data.source import open_data_set
model = load_checkpoint(sys.argv[1])
encode = model.vae.encode
model.vae.encode = lambda pixels: (time.sleep(0.3), encode(pixels))[1]
cache = LatentCache(Path(sys.argv[3]), model, rows_per_shard=3)
cache.fill(open_data_set(sys.argv[2], cache_dir=Path(sys.argv[4])), ImagePolicy(8, 16, 4), batch_size=1)
"""


@pytest.fixture
def killed(images: Path, checkpoint: Path, tmp_path: Path) -> Path:
    """A cache whose filling was killed after its first shards."""
    arguments = [checkpoint, images, tmp_path / "cache", tmp_path / "datasets"]
    process = subprocess.Popen([sys.executable, "-c", SLOW_FILL, *map(str, arguments)], start_new_session=True)
    deadline = time.monotonic() + 90
    while not list((tmp_path / "cache").glob("*/shards/*.safetensors")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    return tmp_path / "cache"


def test_a_cache_that_was_killed_goes_on(
    killed: Path, images: Path, model: LatteFlow, encoded: list[int], tmp_path: Path
) -> None:
    there = 0
    for path in killed.glob("*/shards/*.safetensors"):
        with safe_open(path, "np") as file:
            there += len(file.get_tensor("keys"))
    assert 3 <= there < 10
    rows = fill(LatentCache(killed, model), images)
    assert sum(encoded) == 10 - there
    whole = fill(LatentCache(tmp_path / "whole", model), images)
    assert rows.mean == pytest.approx(whole.mean, rel=1e-6)
