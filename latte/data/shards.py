"""Shards of a latent cache: safetensors files of latents with their keys, written whole and read by memory mapping.

    latents   [N, C, H, W] float32, as the autoencoder encodes them
    keys      [N, 32] uint8, the SHA-256 that says what each row of latents is of

The metadata have the autoencoder's hash, and the SHA-256 of the bytes of keys and latents. Safetensors rather than
Parquet, because a row is one slice of the mapped file: reading it decodes nothing and copies a few kilobytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from latte.data.statistics import ChannelStatistics
from runtime.errors import TrainingError, one_line

FORMAT = "latte-flow latents 1"
KEY_BYTES = 32
ROWS_AT_ONCE = 1024
"""Latents whose statistics are computed at once."""
KeyIndex = dict[bytes, tuple[int, int]]
"""Shard and row of each key."""


class DamagedShardError(Exception):
    """A shard that cannot be used; the message is the reason."""


@dataclass(frozen=True)
class Shard:
    """An open shard. Its arrays are views of the mapped file, which stays open without a file descriptor."""

    path: Path
    keys: np.ndarray
    """`[N, 32]` uint8."""
    latents: np.ndarray
    """`[N, C, H, W]` float32."""


def write_shard(folder: Path, keys: Sequence[bytes], latents: np.ndarray, autoencoder: str) -> Path:
    """Writes a shard under a temporary name, then renames it.

    Args:
        keys: N keys of 32 bytes.
        latents: `[N, C, H, W]` float32.
        autoencoder: hash of the autoencoder.

    Raises:
        TrainingError: there is no space, or the folder cannot be written to.
    """
    key_array = np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), KEY_BYTES)
    latents = np.ascontiguousarray(latents)  # an autoencoder's output may be channels-last, which safetensors mistakes
    metadata = {"format": FORMAT, "autoencoder": autoencoder, "sha256": _hash(key_array, latents)}
    path = folder / f"{uuid.uuid4().hex}.safetensors"
    temporary = folder / f".{path.name}.tmp"
    try:
        save_file({"latents": latents, "keys": key_array}, temporary, metadata)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise TrainingError(
            f"cannot write latents to {folder}: {one_line(error)}; make room or name another folder, "
            "what is written there is kept"
        ) from error
    return path


def open_shard(path: Path, autoencoder: str, *, verify: bool) -> Shard:
    """Maps a shard into memory.

    Args:
        autoencoder: the hash that it must have.
        verify: read all of it and compare its hash.

    Raises:
        DamagedShardError: it cannot be read, or is not what it should be.
    """
    try:
        with safe_open(path, framework="np") as file:  # checks the header against the file's length
            metadata = file.metadata() or {}
        with path.open("rb") as raw:
            header_length = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(header_length))
        size = path.stat().st_size
        mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
        arrays = {}
        for name, dtype in (("keys", np.uint8), ("latents", np.float32)):
            start, end = (8 + header_length + offset for offset in header[name]["data_offsets"])
            arrays[name] = mapped[start:end].view(dtype).reshape(header[name]["shape"])
    except (OSError, RuntimeError, SafetensorError, KeyError, ValueError) as error:
        raise DamagedShardError(one_line(error)) from error
    keys, latents = arrays["keys"], arrays["latents"]
    if metadata.get("format") != FORMAT or metadata.get("autoencoder") != autoencoder:
        raise DamagedShardError("it is of another format or another autoencoder")
    if keys.ndim != 2 or keys.shape[1] != KEY_BYTES or latents.ndim != 4 or len(latents) != len(keys):
        raise DamagedShardError(f"its arrays have the shapes {keys.shape} and {latents.shape}")
    if verify and metadata.get("sha256") != _hash(keys, latents):
        raise DamagedShardError("its content does not have the hash that it was written with")
    return Shard(path, keys, latents)


def index_of(shards: Sequence[Shard]) -> KeyIndex:
    """Returns where each key is: the index of its shard, and its row there."""
    return {key: (number, row) for number, shard in enumerate(shards) for row, key in enumerate(_split(shard.keys))}


def find_keys(keys: np.ndarray, index: KeyIndex) -> np.ndarray | None:
    """Returns where keys `[..., 32]` are, as shard and row `[..., 2]` int32; None if one is missing.

    Keys of zeros, of rows without latents, are at -1.
    """
    none = bytes(KEY_BYTES)
    places = [(-1, -1) if key == none else index.get(key) for key in _split(keys)]
    if None in places:
        return None
    return np.array(places, np.int32).reshape(*keys.shape[:-1], 2)


def statistics_of(places: np.ndarray, shards: Sequence[Shard], channels: int) -> ChannelStatistics:
    """Returns the statistics of the latents at places `[..., 2]`, each counted as often as it is there."""
    flat = places.reshape(-1, 2)
    flat = flat[np.lexsort((flat[:, 1], flat[:, 0]))]  # in the order of the files
    statistics = ChannelStatistics.empty(channels)
    for number, shard in enumerate(shards):
        rows = flat[flat[:, 0] == number, 1]
        for start in range(0, len(rows), ROWS_AT_ONCE):
            statistics = statistics.merged(ChannelStatistics.of(shard.latents[rows[start : start + ROWS_AT_ONCE]]))
    return statistics


def _hash(keys: np.ndarray, latents: np.ndarray) -> str:
    digest = hashlib.sha256(keys.data)
    digest.update(latents.data)
    return digest.hexdigest()


def _split(keys: np.ndarray) -> list[bytes]:
    """Returns keys `[..., 32]` as bytes."""
    data = keys.tobytes()
    return [data[start : start + KEY_BYTES] for start in range(0, len(data), KEY_BYTES)]
