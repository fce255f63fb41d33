"""Rows whose images are decoded each time they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from latte.data.batches import Choices, Row
from latte.data.images import BadRowError, ImagePolicy, Size, check_enlargement, render, upright_size
from latte.data.source import ImageTextDataSet, Record, RowReader
from runtime.errors import InputError

PROBES = 32
"""So many rows are read when a data set is opened, to refuse one that is mostly bad at once."""


class PixelRows:
    """The rows of a data set, as pixels of the sizes of a policy.

    With buckets, the headers of all images are read first, which `datasets` remembers in its cache.

    Raises:
        InputError: the data set is streamed, or more than half of its rows cannot be used.
    """

    empty_prompt = None

    def __init__(self, data_set: ImageTextDataSet, policy: ImagePolicy) -> None:
        if data_set.streamed:
            raise InputError(f"{data_set.name} is streamed, so its rows have no index; read it as a stream")
        self.data_set = data_set
        self.policy = policy
        if policy.crop == "buckets":
            self.bucket_of = self._read_headers()
        else:
            self._probe()
            self.bucket_of = np.zeros(len(data_set), dtype=np.int16)

    @property
    def name(self) -> str:
        return self.data_set.name

    @property
    def sizes(self) -> tuple[Size, ...]:
        return self.policy.sizes

    def name_of(self, row: int) -> str:
        return self.data_set.name_of(row)

    def substitutes(self, bucket: int) -> np.ndarray:
        # An image of any aspect ratio can be cropped to the bucket's: a bucket may have a single image, and that bad.
        return np.flatnonzero(self.bucket_of >= 0)

    def load(self, row: int, bucket: int, choices: Choices) -> Row:
        return load_pixels(self.data_set.record(row), self.policy, self.sizes[bucket], choices)

    def _probe(self) -> None:
        bad = []
        probes = np.unique(np.linspace(0, len(self.data_set) - 1, PROBES).astype(int)).tolist()
        for row, choices in zip(probes, Choices.draw(0, 0, range(len(probes))), strict=True):
            try:
                self.load(row, 0, choices)
            except BadRowError as error:
                bad.append((self.name_of(row), str(error)))
        refuse_majority(self.name, bad, len(probes))

    def _read_headers(self) -> np.ndarray:
        headers = self.data_set.table.map(
            read_header,
            with_indices=True,
            fn_kwargs={"reader": self.data_set.reader, "policy": self.policy},
            remove_columns=self.data_set.table.column_names,
            desc="read image sizes",
        )
        bad = [(self.name_of(row), str(reason)) for row, reason in enumerate(headers["reason"]) if reason is not None]
        refuse_majority(self.name, bad, len(self.data_set))
        return np.array(headers["bucket"], dtype=np.int16)


def load_pixels(record: Record, policy: ImagePolicy, size: Size, choices: Choices) -> Row:
    """Decodes a record's image in a size, see `Rows.load`."""
    pixels = render(record.image, policy, size, choices.place if policy.crop == "random" else 0.5)
    if policy.flip and choices.is_flipped:
        pixels = pixels[:, ::-1]
    prompt = record.captions[choices.caption_of(len(record.captions))]
    return Row(record.name, prompt, pixels, questions=record.questions)


def read_header(row: Mapping[str, Any], number: int, reader: RowReader, policy: ImagePolicy) -> dict[str, Any]:
    """Returns the bucket of a row by the size in its image's header, or -1 and the reason why it cannot be used."""
    try:
        upright = upright_size(reader.read(row, number).image)
        bucket = policy.bucket_of(*upright)
        check_enlargement(upright, policy, policy.sizes[bucket])
    except BadRowError as error:
        return {"bucket": -1, "reason": str(error)}
    return {"bucket": bucket, "reason": None}


def refuse_majority(data_set: str, bad: list[tuple[str, str]], looked_at: int) -> None:
    """Raises `InputError` if more than half of the rows looked at are bad, given as names and reasons."""
    if 2 * len(bad) > looked_at:
        name, reason = bad[0]
        raise InputError(
            f"{data_set}: {len(bad)} of {looked_at} rows looked at cannot be used, the first is {name}: {reason}; "
            "repair the data set or remove those rows"
        )
