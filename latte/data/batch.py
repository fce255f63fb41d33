"""The batch that data sets give to training, and the count of rows that could not be used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from runtime.console import stderr
from runtime.errors import TrainingError

ROWS_BEFORE_REFUSAL = 64
"""So many rows are looked at before a data set is refused because most of its images are bad."""


@dataclass(frozen=True)
class ImageTextBatch:
    """Images of one size with their prompts, B rows."""

    names: tuple[str, ...]
    """Where each row came from, for messages."""
    prompts: tuple[str, ...]
    """The caption chosen for each row, "" where it was dropped."""
    pixels: Tensor | None
    """`[B, 3, height, width]` float32 in [-1, 1]; None where latents are cached."""
    latents: Tensor | None
    """`[B, C, H, W]` float32, as the autoencoder encodes them, not normalised; None without a cache."""
    conversations: tuple[tuple[tuple[str, str], ...], ...] = ()
    """Questions and answers about each image; empty lists where latents are cached."""
    token_ids: tuple[tuple[int, ...], ...] | None = None
    """The prompts' token ids in the chat template, where they are cached."""
    bad: tuple[tuple[str, str], ...] = ()
    """Name and reason of each row that could not be used; other rows are in their places."""


class BadRows:
    """Counts the rows that could not be used, names each once, and refuses a data set in which they are the majority.

    It belongs to the process that reads the batches: those that make them may be many.
    """

    def __init__(self, data_set: str) -> None:
        self.data_set = data_set
        self.reasons: dict[str, str] = {}
        """Why each bad row could not be used, by its name."""
        self._good = 0
        self._bad = 0

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, batch: ImageTextBatch) -> None:
        """Counts the rows of a batch.

        Raises:
            TrainingError: more than half of all rows so far were bad.
        """
        self.count(len(batch.names), batch.bad)

    def count(self, good: int, bad: Sequence[tuple[str, str]]) -> None:
        """Counts good rows and bad ones, the latter as pairs of name and reason.

        Raises:
            TrainingError: more than half of all rows so far were bad.
        """
        self._good += good
        self._bad += len(bad)
        for name, reason in bad:
            if name not in self.reasons:
                self.reasons[name] = reason
                stderr.print(f"left out {name}: {reason}", style="yellow", markup=False, soft_wrap=True)
        if self._good + self._bad >= ROWS_BEFORE_REFUSAL:
            self.check()

    def check(self) -> None:
        """Raises `TrainingError` if more than half of all rows so far were bad, however few they are."""
        if self._bad > self._good:
            name, reason = next(iter(self.reasons.items()))
            raise TrainingError(
                f"{self.data_set}: {self._bad} of {self._good + self._bad} rows cannot be used, the first is {name}: "
                f"{reason}; repair the data set or remove those rows"
            )


def pixels_from_uint8(images: Sequence[np.ndarray]) -> Tensor:
    """Converts B images `[height, width, 3]` uint8 to pixels `[B, 3, height, width]` float32 in [-1, 1]."""
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return stacked.float().div_(127.5).sub_(1)
