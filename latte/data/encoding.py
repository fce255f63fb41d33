"""The work of filling a latent cache: images are read, cropped and hashed by workers, and encoded in batches."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderDC
from torch.utils.data import Dataset, IterableDataset

from latte.data.batch import BadRows, pixels_from_uint8
from latte.data.images import BadRowError, ImagePolicy, Size, check_enlargement, render, upright_size
from latte.data.listing import ListingPart
from latte.data.shards import write_shard
from latte.data.source import ImageTextDataSet

SECONDS_PER_SHARD = 60
"""A shard is written after this time even if it is not full, so that a process that is killed loses little."""


@dataclass(frozen=True)
class Prepared:
    """A row ready to be encoded."""

    row: int
    name: str
    captions: tuple[str, ...] = ()
    reason: str | None = None
    """Why it is bad."""
    bucket: int = -1
    keys: tuple[bytes, ...] = ()
    """One, or two with flips: of the image as it is, and mirrored."""
    images: tuple[np.ndarray | None, ...] = ()
    """`[height, width, 3]` uint8 for each key; None where its latents are cached."""


@dataclass(frozen=True)
class Preparation:
    """Prepares rows for encoding; picklable, so that worker processes can have it.

    Args:
        known: keys whose latents are cached.
    """

    data_set: ImageTextDataSet
    policy: ImagePolicy
    known: Container[bytes]

    def __call__(self, cells: Mapping[str, Any], row: int) -> Prepared:
        """Reads a row, and decodes its image if its latents are not cached."""
        reader, policy = self.data_set.reader, self.policy
        name = reader.name(cells, row)
        # As without a cache, only buckets leave out the rows whose headers are bad: all others are replaced when drawn.
        bucket = -1 if policy.crop == "buckets" else 0
        try:
            record = reader.read(cells, row)
            upright = upright_size(record.image)
            if policy.crop == "buckets":
                fitting = policy.bucket_of(*upright)
                check_enlargement(upright, policy, policy.sizes[fitting])
                bucket = fitting
            size = policy.sizes[bucket]
            keys = keys_of(record.image, upright, policy, size)
            images: list[np.ndarray | None] = [None] * len(keys)
            if not all(key in self.known for key in keys):
                pixels = render(record.image, policy, size)
                for variant, key in enumerate(keys):
                    if key not in self.known:
                        images[variant] = pixels[:, ::-1] if variant else pixels
        except BadRowError as error:
            return Prepared(row, name, reason=str(error), bucket=bucket)
        return Prepared(row, name, record.captions, None, bucket, keys, tuple(images))


def keys_of(image: bytes, upright: tuple[int, int], policy: ImagePolicy, size: Size) -> tuple[bytes, ...]:
    """Returns the keys of an image's latents: hashes of its bytes and of what is done to its pixels.

    Raises:
        BadRowError: the image is too small.
    """
    box = check_enlargement(upright, policy, size)
    content = hashlib.sha256(image).hexdigest()
    return tuple(
        hashlib.sha256(repr((content, box, size, policy.background, flip)).encode()).digest()
        for flip in (False, True)[: 1 + policy.flip]
    )


class PreparedRows(Dataset[Prepared]):
    """Rows with an index, prepared."""

    def __init__(self, preparation: Preparation, rows: range) -> None:
        self.preparation = preparation
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Prepared:
        row = self.rows[place]
        return self.preparation(self.preparation.data_set.table[row], row)


class PreparedStream(IterableDataset[Prepared]):
    """Rows of a stream, prepared; each worker takes its part."""

    def __init__(self, preparation: Preparation, rank: int, world: int) -> None:
        self.preparation = preparation
        self.rank = rank
        self.world = world

    def __iter__(self) -> Iterator[Prepared]:
        from datasets.distributed import split_dataset_by_node

        # `datasets` itself splits the shards of a stream, or its rows, among ranks and then among workers.
        table = split_dataset_by_node(self.preparation.data_set.table, self.rank, self.world)
        for row, cells in enumerate(table):
            yield self.preparation(cells, row)


class Encoder:
    """Encodes images in batches of one size and writes their latents in shards.

    Args:
        vae: the autoencoder, on its device and in its dtype.
        folder: for the shards.
        autoencoder: hash of the autoencoder.
        batch_size: images encoded at once.
        rows_per_shard: a shard has at most this many rows, rounded up to a batch.
    """

    def __init__(
        self, vae: AutoencoderDC, folder: Path, autoencoder: str, *, batch_size: int, rows_per_shard: int
    ) -> None:
        self.vae = vae
        self.folder = folder
        self.autoencoder = autoencoder
        self.batch_size = batch_size
        self.rows_per_shard = rows_per_shard
        self.written: list[Path] = []
        """The shards so far."""
        self._queues: dict[Size, list[tuple[bytes, np.ndarray]]] = {}
        self._encoded: dict[Size, list[tuple[list[bytes], np.ndarray]]] = {}
        self._last_write = time.monotonic()

    def add(self, key: bytes, image: np.ndarray) -> None:
        """Queues an image, `[height, width, 3]` uint8."""
        size = (image.shape[0], image.shape[1])
        queue = self._queues.setdefault(size, [])
        queue.append((key, image))
        if len(queue) >= self.batch_size:
            self._encode(size)
            rows = sum(len(keys) for keys, _ in self._encoded[size])
            if rows >= self.rows_per_shard:
                self._write(size)
            elif time.monotonic() - self._last_write > SECONDS_PER_SHARD:
                self.finish()

    def finish(self) -> None:
        """Encodes what is queued, and writes all latents that are not written yet."""
        for size in [size for size, queue in self._queues.items() if queue]:
            self._encode(size)
        for size in list(self._encoded):
            self._write(size)

    @torch.no_grad()
    def _encode(self, size: Size) -> None:
        queue = self._queues.pop(size)
        pixels = pixels_from_uint8([image for _, image in queue]).to(self.vae.device, self.vae.dtype)
        latents = self.vae.encode(pixels).latent.float().cpu().numpy()
        self._encoded.setdefault(size, []).append(([key for key, _ in queue], latents))

    def _write(self, size: Size) -> None:
        parts = self._encoded.pop(size)
        keys = [key for part, _ in parts for key in part]
        latents = np.concatenate([part for _, part in parts])
        self.written.append(write_shard(self.folder, keys, latents, self.autoencoder))
        self._last_write = time.monotonic()


def encode_all(rows: Iterable[Prepared], encoder: Encoder, part: ListingPart, data_set: str) -> None:
    """Encodes prepared rows and lists them.

    Raises:
        InputError: a caption is too long.
        TrainingError: most rows are bad, or a shard cannot be written.
    """
    bad = BadRows(data_set)
    queued: set[bytes] = set()  # images that are in the data set more than once
    for prepared in rows:
        if prepared.reason is None:
            bad.count(1, [])
            for key, image in zip(prepared.keys, prepared.images, strict=True):
                if image is not None and key not in queued:
                    queued.add(key)
                    encoder.add(key, image)
        else:
            bad.count(0, [(prepared.name, prepared.reason)])
        part.add(prepared.row, prepared.name, prepared.reason, prepared.bucket, prepared.keys, prepared.captions)
    encoder.finish()
    bad.check()
