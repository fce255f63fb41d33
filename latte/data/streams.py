"""Batches of a streamed data set, as pure a function of seed, index and row as with an index, by reading in order.

The shards of the stream are dealt to lanes, whose number depends on the batch and on the shards, not on the processes.
Each lane shuffles its rows through a buffer of `datasets`, epoch after epoch, and row r of every batch comes from the
same lane. So a process reads the lanes of its own rows only, two processes see what one sees, and going on at batch i
reads what comes before it without decoding an image.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from latte.data.batch import ImageTextBatch
from latte.data.batches import (
    ATTEMPTS,
    CAPTION_DROPOUT,
    Choices,
    ImageTextBatches,
    Row,
    check_dropout,
    collate,
    hopeless,
)
from latte.data.images import BadRowError, ImagePolicy
from latte.data.pixel_rows import PixelRows, load_pixels
from latte.data.source import ImageTextDataSet
from runtime.errors import InputError, TrainingError

SHUFFLE_BUFFER = 1000
"""Rows among which a stream is shuffled. Their encoded images are in memory, once for each lane."""


def batches_of(
    data_set: ImageTextDataSet,
    policy: ImagePolicy,
    *,
    seed: int = 0,
    caption_dropout: float = CAPTION_DROPOUT,
    shuffle_buffer: int = SHUFFLE_BUFFER,
) -> ImageTextBatches | StreamedBatches:
    """Returns the batches of a data set, with an index or streamed, without a cache.

    Raises:
        InputError: a value is out of range, or most rows cannot be used.
    """
    if not data_set.streamed:
        return ImageTextBatches(PixelRows(data_set, policy), seed=seed, caption_dropout=caption_dropout)
    return StreamedBatches(data_set, policy, seed=seed, caption_dropout=caption_dropout, shuffle_buffer=shuffle_buffer)


class StreamedBatches:
    """Batches of a stream, to be asked for in order: an earlier batch than the last begins the stream again.

    A row that cannot be used is replaced by the next one of its lane, which is then seen twice. Every process that
    makes batches reads the stream for itself, so several workers read it several times.

    Args:
        data_set: a streamed one.
        policy: how images become pixels; without buckets, since a batch would have to wait for one to fill up.
        seed: of everything random.
        caption_dropout: share of rows with the empty prompt.
        shuffle_buffer: rows among which a lane is shuffled; 1 keeps their order.

    Raises:
        InputError: the data set is not streamed, or a value is out of range.
    """

    def __init__(
        self,
        data_set: ImageTextDataSet,
        policy: ImagePolicy,
        *,
        seed: int = 0,
        caption_dropout: float = CAPTION_DROPOUT,
        shuffle_buffer: int = SHUFFLE_BUFFER,
    ) -> None:
        check_dropout(caption_dropout)
        if not data_set.streamed:
            raise InputError(
                f"{data_set.name} is not streamed; open it with --streaming, or read its rows by their index"
            )
        if policy.crop == "buckets":
            raise InputError(
                f"{data_set.name} is streamed, which excludes --crop buckets; give --cache-latents, or another crop"
            )
        if shuffle_buffer < 1:
            raise InputError(f"--shuffle-buffer must be at least 1 row, got {shuffle_buffer}")
        self.data_set = data_set
        self.policy = policy
        self.seed = seed
        self.caption_dropout = caption_dropout
        self.shuffle_buffer = shuffle_buffer
        self._lanes: dict[tuple[int, int], _Lane] = {}

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_lanes": {}}  # each process reads for itself

    def batch(self, index: int, rows: range, total: int) -> ImageTextBatch:
        """Returns this process's part of a global micro-batch, see `ImageTextBatches.batch`.

        Raises:
            TrainingError: a row cannot be used, and neither can those after it.
        """
        lanes = lanes_of(total, self.data_set.table.num_shards)
        rows_of_lane = total // lanes
        bad: list[tuple[str, str]] = []
        loaded = []
        for row, choices in zip(rows, Choices.draw(self.seed, index, rows), strict=True):
            number, offset = divmod(row, rows_of_lane)
            lane = self._lane(lanes, number)
            lane.go_to(index * rows_of_lane)
            loaded.append((self._load(lane, index * rows_of_lane + offset, choices, bad), choices))
        return collate(loaded, self.caption_dropout, None, bad)

    def _lane(self, lanes: int, number: int) -> _Lane:
        if (lanes, number) not in self._lanes:
            table = self.data_set.table.shard(lanes, number) if lanes > 1 else self.data_set.table
            if self.shuffle_buffer > 1:
                table = table.shuffle(seed=self.seed, buffer_size=self.shuffle_buffer)
            self._lanes[lanes, number] = _Lane(self.data_set.name, table)
        return self._lanes[lanes, number]

    def _load(self, lane: _Lane, position: int, choices: Choices, bad: list[tuple[str, str]]) -> Row:
        size = self.policy.sizes[0]
        for substitute in range(position, position + ATTEMPTS):
            cells = lane.at(substitute)
            reader = self.data_set.reader
            try:
                return load_pixels(reader.read(cells, substitute), self.policy, size, choices)
            except BadRowError as error:
                bad.append((reader.name(cells, substitute), str(error)))
        raise hopeless(self.data_set.name, bad)


def lanes_of(total: int, shards: int) -> int:
    """Returns the number of lanes: the largest divisor of the batch that the shards are enough for."""
    return max(lanes for lanes in range(1, min(total, shards) + 1) if total % lanes == 0)


class _Lane:
    """The rows of some shards, epoch after epoch, by their position."""

    def __init__(self, name: str, table: Any) -> None:
        self.name = name
        self.table = table
        self._restart()

    def go_to(self, position: int) -> None:
        """Forgets the rows before a position, and begins again if it has been passed."""
        if position < self._start:
            self._restart()
        while self._start < position:
            if self._ahead:
                self._ahead.popleft()
            else:
                next(self._rows)
            self._start += 1

    def at(self, position: int) -> Mapping[str, Any]:
        """Returns the row at a position, not before that of `go_to`."""
        while self._start + len(self._ahead) <= position:
            self._ahead.append(next(self._rows))
        return self._ahead[position - self._start]

    def _restart(self) -> None:
        self._start = 0
        self._ahead: deque[Mapping[str, Any]] = deque()
        self._rows = self._epochs()

    def _epochs(self) -> Iterator[Mapping[str, Any]]:
        epoch = 0
        while True:
            self.table.set_epoch(epoch)
            is_empty = True
            # Iterating over the table itself would deal its shards to the workers of a DataLoader, and lose rows.
            for cells in self.table.iter(batch_size=1):
                is_empty = False
                yield {name: values[0] for name, values in cells.items()}
            if is_empty:
                raise TrainingError(f"{self.name}: a shard of the stream has no rows; remove empty files")
            epoch += 1
