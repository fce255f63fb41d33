"""Rows whose latents and token ids come from a cache: no image is read or decoded."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from latte.data.batches import Choices, Row
from latte.data.images import BadRowError, Size
from latte.data.listing import Listing
from latte.data.shards import Shard, open_shard


class CachedRows:
    """The rows of a data set as its latent cache has them; the same rows in the same order as without the cache.

    Args:
        name: what to call the data set in messages.
        listing: its rows.
        shards: the files of latents.
        places: shard and row of each key, `[N, V, 2]` int32.
        autoencoder: hash of the autoencoder.
        sizes: of the buckets.
        has_buckets: whether rows of a bucket can be replaced by rows of the same bucket only.
    """

    def __init__(
        self,
        name: str,
        listing: Listing,
        shards: Sequence[Path],
        places: np.ndarray,
        autoencoder: str,
        sizes: tuple[Size, ...],
        *,
        has_buckets: bool,
    ) -> None:
        self.name = name
        self.sizes = sizes
        self._has_flips = places.shape[1] == 2
        self.listing = listing
        self._shards = list(shards)
        self._places = places
        self._autoencoder = autoencoder
        self._open: dict[int, Shard] = {}
        self._is_good = listing.reasons.is_null().to_numpy(zero_copy_only=False)
        self._has_buckets = has_buckets
        buckets_with_good_rows = np.unique(listing.buckets[self._is_good])
        self.bucket_of = np.where(np.isin(listing.buckets, buckets_with_good_rows), listing.buckets, np.int16(-1))

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_open": {}}  # mapped files are opened again in each process

    @cached_property
    def empty_prompt(self) -> tuple[int, ...]:
        """Token ids of the empty prompt."""
        return self.listing.tokens_of(0)

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each latent channel over the data set."""
        return self.listing.statistics.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each latent channel over the data set."""
        return self.listing.statistics.std

    def __len__(self) -> int:
        """Number of rows, bad ones included."""
        return len(self.bucket_of)

    def name_of(self, row: int) -> str:
        return str(self.listing.names[row].as_py())

    def substitutes(self, bucket: int) -> np.ndarray:
        if self._has_buckets:
            return np.flatnonzero((self.bucket_of == bucket) & self._is_good)
        return np.arange(len(self))

    def load(self, row: int, bucket: int, choices: Choices) -> Row:
        if not self._is_good[row]:
            raise BadRowError(self.listing.reasons[row].as_py())
        shard, offset = self._places[row, int(self._has_flips and choices.is_flipped)].tolist()
        if shard not in self._open:
            self._open[shard] = open_shard(self._shards[shard], self._autoencoder, verify=False)
        captions = self.listing.captions_of(row)
        caption = captions[choices.caption_of(len(captions))]
        return Row(
            self.name_of(row),
            str(self.listing.prompts[caption].as_py()),
            latents=self._open[shard].latents[offset],
            token_ids=self.listing.tokens_of(caption),
        )
