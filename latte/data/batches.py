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

CHOICES = 0
"""Tag of the random numbers of a row."""
CAPTION_DROPOUT = 0.1
"""Share of rows with the empty prompt, which gives guidance its unconditional velocity (arXiv 2207.12598)."""
ATTEMPTS = 32
"""A row that cannot be used is replaced so often before the data set is refused."""


@dataclass(frozen=True)
class Row:
    """A row as it goes into a batch."""

    name: str
    captions: tuple[str, ...]
    pixels: np.ndarray | None = None
    """`[height, width, 3]` uint8."""
    latents: np.ndarray | None = None
    """`[C, H, W]` float32."""
    questions: tuple[tuple[str, str], ...] = ()
    token_ids: tuple[tuple[int, ...], ...] | None = None
    """The captions' token ids."""


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
    def flips(self) -> bool:
        """Whether half of the images are mirrored."""

    @property
    def empty_prompt(self) -> tuple[int, ...] | None:
        """Token ids of the empty prompt, where they are cached."""

    def name_of(self, row: int) -> str:
        """Returns what to call a row in messages."""

    def load(self, row: int, bucket: int, place: float, flip: bool) -> Row:
        """Reads a row in the size of a bucket.

        Args:
            place: where a random crop is, in [0, 1).
            flip: mirror the image.

        Raises:
            BadRowError: it cannot be used.
        """


@dataclass(frozen=True)
class Choices:
    """The random choices of a row, each in [0, 1)."""

    caption: float
    dropout: float
    flip: float
    place: float

    @staticmethod
    def of(rng: np.random.Generator) -> Choices:
        """Draws the choices, always all of them, so that no setting changes another one's."""
        return Choices(*rng.random(4).tolist())


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
        for place, number in zip(rows, numbers, strict=True):
            rng = np.random.default_rng([self.seed, CHOICES, index, place])
            choices = Choices.of(rng)
            loaded.append((self._load(int(number), bucket, choices, rng, bad), choices))
        return collate(loaded, self.caption_dropout, self.rows.empty_prompt, bad)

    def _load(
        self, number: int, bucket: int, choices: Choices, rng: np.random.Generator, bad: list[tuple[str, str]]
    ) -> Row:
        members = self.order.members[bucket]
        for _ in range(ATTEMPTS):
            try:
                return self.rows.load(number, bucket, choices.place, self.rows.flips and choices.flip < 0.5)
            except BadRowError as error:
                bad.append((self.rows.name_of(number), str(error)))
            number = int(members[rng.integers(len(members))])
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
        raise InputError(f"the share of dropped captions must be in [0, 1], got {share}")


def collate(
    loaded: Sequence[tuple[Row, Choices]],
    caption_dropout: float,
    empty_prompt: tuple[int, ...] | None,
    bad: Sequence[tuple[str, str]],
) -> ImageTextBatch:
    """Puts rows of one size together, each with the caption that its choices select."""
    prompts: list[str] = []
    token_ids: list[tuple[int, ...]] = []
    for row, choices in loaded:
        chosen = int(choices.caption * len(row.captions))
        is_dropped = choices.dropout < caption_dropout
        prompts.append("" if is_dropped else row.captions[chosen])
        if row.token_ids is not None and empty_prompt is not None:
            token_ids.append(empty_prompt if is_dropped else row.token_ids[chosen])
    rows = [row for row, _ in loaded]
    pixels = [row.pixels for row in rows if row.pixels is not None]
    latents = [row.latents for row in rows if row.latents is not None]
    return ImageTextBatch(
        names=tuple(row.name for row in rows),
        prompts=tuple(prompts),
        pixels=pixels_from_uint8(pixels) if pixels else None,
        latents=torch.from_numpy(np.stack(latents)) if latents else None,
        conversations=tuple(row.questions for row in rows),
        token_ids=tuple(token_ids) if token_ids else None,
        bad=tuple(dict.fromkeys(bad)),
    )
