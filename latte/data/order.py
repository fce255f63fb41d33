"""The order of rows in training: which row of the data set is row r of the global micro-batch i.

It is a pure function of the seed, so that any process can compute its part, and a resumed run needs no state. Every
bucket is read in epochs, each a permutation of its rows: no row is seen twice before all others of its bucket were seen
once. An epoch does not end with a batch: a batch that reaches the end takes its other rows from the next epoch, so
there is no incomplete batch and no row is left out or filled in.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

BLOCK = 1024
"""Batches are given to buckets in blocks of this many: in each block every bucket has its share, up to one batch."""
ORDER, BUCKETS = 1, 2
"""Tags of the random numbers of this module."""


class RowOrder:
    """Orders rows that belong to buckets.

    Args:
        bucket_of: the bucket of each row, `[N]` integers; -1 for rows that are left out.
        seed: of everything random.
    """

    def __init__(self, bucket_of: np.ndarray, seed: int) -> None:
        self.seed = seed
        self.members = {int(b): np.flatnonzero(bucket_of == b) for b in np.unique(bucket_of[bucket_of >= 0])}
        """The rows of each bucket that has any."""
        self._buckets = list(self.members)
        counts = np.array([len(rows) for rows in self.members.values()], dtype=np.float64)
        self._ends = np.cumsum(counts) / counts.sum()  # each bucket's share of [0, 1]
        self._before = [np.zeros(len(counts), dtype=np.int64)]  # batches of each bucket before each block
        self._epoch = lru_cache(maxsize=2 * len(counts))(self._permutation)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_epoch"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._epoch = lru_cache(maxsize=2 * len(self._buckets))(self._permutation)

    def rows(self, index: int, rows: range, total: int) -> tuple[int, np.ndarray]:
        """Returns the bucket of a global micro-batch, and the data set's rows at some of its places.

        Args:
            index: of the micro-batch.
            rows: places in `range(total)`.
            total: number of rows of the micro-batch over all processes.
        """
        place, earlier = self._bucket(index)
        bucket = self._buckets[place]
        members = self.members[bucket]
        positions = earlier * total + np.asarray(rows)
        epochs, offsets = np.divmod(positions, len(members))
        chosen = [self._epoch(place, int(epoch))[offset] for epoch, offset in zip(epochs, offsets, strict=True)]
        return bucket, members[np.array(chosen, dtype=np.int64)]

    def _permutation(self, place: int, epoch: int) -> np.ndarray:
        count = len(self.members[self._buckets[place]])
        return np.random.default_rng([self.seed, ORDER, place, epoch]).permutation(count)

    def _bucket(self, index: int) -> tuple[int, int]:
        """Returns the place of a batch's bucket in the list of buckets, and how many earlier batches it has."""
        if len(self._buckets) == 1:
            return 0, index
        block, offset = divmod(index, BLOCK)
        while len(self._before) <= block:
            counts = np.bincount(self._block(len(self._before) - 1), minlength=len(self._buckets))
            self._before.append(self._before[-1] + counts)
        places = self._block(block)
        place = int(places[offset])
        return place, int(self._before[block][place] + np.count_nonzero(places[:offset] == place))

    def _block(self, block: int) -> np.ndarray:
        """Returns the buckets of the batches of a block: evenly spaced over the buckets' shares, then shuffled."""
        rng = np.random.default_rng([self.seed, BUCKETS, block])
        points = (np.arange(BLOCK) + rng.random()) / BLOCK
        places = np.minimum(np.searchsorted(self._ends, points, side="right"), len(self._buckets) - 1)
        return rng.permutation(places)
