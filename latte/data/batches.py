"""Batches of a data set as a pure function of the seed, the batch's index and the row (see `Batches`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from latte.data.batch import ImageTextBatch, pixels_from_uint8
from latte.data.images import BadRowError, Size
from latte.data.order import RowOrder
from runtime.errors import InputError, TrainingError

CHOICES, SUBSTITUTES = 0, 3
"""Tags of the random numbers of this module."""
CAPTION_DROPOUT = 0.1
"""Share of rows with the empty prompt, which gives guidance its unconditional velocity (arXiv 2207.12598)."""
ATTEMPTS = 32
"""A row that cannot be used is replaced so often before the data set is refused."""


@dataclass(frozen=True)
class Choices:
    """The random choices of a row, each in [0, 1)."""

    caption: float
    dropout: float
    flip: float
    place: float

    @staticmethod
    def draw(seed: int, index: int, rows: range) -> list[Choices]:
        """Draws the choices of some rows of the global micro-batch `index`.

        They are drawn for all rows up to the last, and all of them whatever the settings: a row's choices depend on
        neither. One generator for the batch, because making one for each row would cost more than reading the row.
        """
        draws = np.random.default_rng([seed, CHOICES, index]).random((max(rows, default=-1) + 1, 4))
        return [Choices(*draws[row].tolist()) for row in rows]

    def caption_of(self, count: int) -> int:
        """Returns which of a row's captions is chosen."""
        return int(self.caption * count)

    @property
    def is_flipped(self) -> bool:
        """Whether the image is mirrored, where images are mirrored at all."""
        return self.flip < 0.5


@dataclass(frozen=True)
class Row:
    """A row as it goes into a batch."""

    name: str
    prompt: str
    pixels: np.ndarray | None = None
    """`[height, width, 3]` uint8."""
    latents: np.ndarray | None = None
    """`[C, H, W]` float32."""
    questions: tuple[tuple[str, str], ...] = ()
    token_ids: tuple[int, ...] | None = None
    """Of the prompt."""


class Rows(Protocol):
    """Rows with an index, from a data set or from a latent cache."""

    @property
    def name(self) -> str:
        """What to call the data set in messages."""

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The sizes of the buckets."""

    @property
    def bucket_of(self) -> np.ndarray:
        """The bucket of each row, `[N]`; -1 for rows that are known to be bad."""

    @property
    def empty_prompt(self) -> tuple[int, ...] | None:
        """Token ids of the empty prompt, where they are cached."""

    def name_of(self, row: int) -> str:
        """Returns what to call a row in messages."""

    def substitutes(self, bucket: int) -> np.ndarray:
        """Returns the rows that may replace one that cannot be used."""

    def load(self, row: int, bucket: int, choices: Choices) -> Row:
        """Reads a row in the size of a bucket, with the caption, crop and orientation that its choices select.

        Raises:
            BadRowError: it cannot be used.
        """


class ImageTextBatches:
    """Batches of rows with an index, in the order of `RowOrder`.

    A row that cannot be used is replaced by one drawn with the row's own random numbers.

    Args:
        rows: of a data set or a latent cache.
        seed: of everything random.
        caption_dropout: share of rows with the empty prompt.

    Raises:
        InputError: the share is not in [0, 1], or the data set has no usable row.
    """

    def __init__(self, rows: Rows, *, seed: int = 0, caption_dropout: float = CAPTION_DROPOUT) -> None:
        check_dropout(caption_dropout)
        if not (rows.bucket_of >= 0).any():
            raise InputError(f"{rows.name} has no row that can be used")
        self.rows = rows
        self.seed = seed
        self.caption_dropout = caption_dropout
        self.order = RowOrder(rows.bucket_of, seed)

    @property
    def rows_per_epoch(self) -> int:
        """Number of rows that can be used, as far as is known."""
        return int(sum(map(len, self.order.members.values())))

    def batch(self, index: int, rows: range, total: int) -> ImageTextBatch:
        """Returns this process's part of a global micro-batch.

        Args:
            index: of the micro-batch, from 0.
            rows: this process's part of `range(total)`.
            total: number of rows of the micro-batch over all processes.

        Raises:
            TrainingError: a row cannot be used, and neither can those that were to replace it.
        """
        bucket, numbers = self.order.rows(index, rows, total)
        bad: list[tuple[str, str]] = []
        loaded = []
        for row, number, choices in zip(rows, numbers.tolist(), Choices.draw(self.seed, index, rows), strict=True):
            loaded.append((self._load(number, bucket, choices, (index, row), bad), choices))
        return collate(loaded, self.caption_dropout, self.rows.empty_prompt, bad)

    def _load(
        self, number: int, bucket: int, choices: Choices, where: tuple[int, int], bad: list[tuple[str, str]]
    ) -> Row:
        """Loads a row, or one that replaces it; `where` is its index and row in the batches."""
        rng = None
        for _ in range(ATTEMPTS):
            try:
                return self.rows.load(number, bucket, choices)
            except BadRowError as error:
                bad.append((self.rows.name_of(number), str(error)))
            rng = rng or np.random.default_rng([self.seed, SUBSTITUTES, *where])
            substitutes = self.rows.substitutes(bucket)
            number = int(substitutes[rng.integers(len(substitutes))])
        raise hopeless(self.rows.name, bad)


def hopeless(data_set: str, bad: Sequence[tuple[str, str]]) -> TrainingError:
    """Returns the error for so many bad rows that nothing can replace them."""
    name, reason = bad[-1]
    return TrainingError(
        f"{data_set}: {ATTEMPTS} rows one after another cannot be used, the last is {name}: {reason}; "
        "repair the data set or remove those rows"
    )


def check_dropout(share: float) -> None:
    """Raises `InputError` if the share of dropped captions is not in [0, 1]."""
    if not 0 <= share <= 1:
        raise InputError(f"--caption-dropout must be in [0, 1], got {share}")


def collate(
    loaded: Sequence[tuple[Row, Choices]],
    caption_dropout: float,
    empty_prompt: tuple[int, ...] | None,
    bad: Sequence[tuple[str, str]],
) -> ImageTextBatch:
    """Puts rows of one size together, and drops the captions that their choices drop."""
    is_dropped = [choices.dropout < caption_dropout for _, choices in loaded]
    rows = [row for row, _ in loaded]
    pixels = [row.pixels for row in rows if row.pixels is not None]
    latents = [row.latents for row in rows if row.latents is not None]
    return ImageTextBatch(
        names=tuple(row.name for row in rows),
        prompts=tuple("" if dropped else row.prompt for row, dropped in zip(rows, is_dropped, strict=True)),
        pixels=pixels_from_uint8(pixels) if pixels else None,
        latents=torch.from_numpy(np.stack(latents)) if latents else None,
        conversations=tuple(row.questions for row in rows),
        token_ids=None
        if empty_prompt is None
        else tuple(
            empty_prompt if dropped else row.token_ids or () for row, dropped in zip(rows, is_dropped, strict=True)
        ),
        bad=tuple(dict.fromkeys(bad)),
    )
