"""What a latent cache knows of one data set: for every row its latents' keys and its captions' token ids.

A listing has a part for each process that made it, a folder `<rank>-of-<world>` that is written whole:

rows.parquet         row, name, reason (null unless it is bad), bucket, keys (one, or two with flips), prompts (indices)
prompts.parquet      every caption once, with its token ids; the first is the empty prompt
statistics.json      count, mean and squared deviations of each channel over the part's rows
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from latte.data.shards import KEY_BYTES
from latte.data.statistics import ChannelStatistics
from runtime.errors import InputError, TrainingError, one_line
from runtime.files import replaced_directory, write_text

PART = re.compile(r"(\d+)-of-(\d+)")


class ListingPart:
    """The rows of one process, while they are being listed.

    Args:
        tokenize: splits prompts into token ids, as `LatteFlow.tokenize` does.
    """

    def __init__(self, tokenize: Callable[[Sequence[str]], list[list[int]]]) -> None:
        self._tokenize = tokenize
        self._captions = {"": 0}
        self._token_ids = tokenize([""])
        self._rows: list[dict[str, Any]] = []

    def caption(self, text: str, name: Callable[[], str]) -> int:
        """Returns the index of a caption, which is split into tokens when it is new.

        Args:
            name: what to call its row in messages.

        Raises:
            InputError: it is too long.
        """
        index = self._captions.get(text)
        if index is None:
            try:
                self._token_ids += self._tokenize([text])
            except InputError as error:
                raise InputError(f"{name()}, {textwrap.shorten(text, 60)!r}: {error}") from error
            index = self._captions[text] = len(self._captions)
        return index

    def add(
        self, row: int, name: str, reason: str | None, bucket: int, keys: Sequence[bytes], captions: Sequence[str]
    ) -> None:
        """Lists a row.

        Raises:
            InputError: a caption is too long.
        """
        prompts = [self.caption(caption, lambda: name) for caption in captions]
        cells = {"row": row, "name": name, "reason": reason, "bucket": bucket, "keys": list(keys), "prompts": prompts}
        self._rows.append(cells)

    def keys(self) -> np.ndarray:
        """Returns the keys of all rows, `[N, 32]` uint8."""
        keys = b"".join(key for row in self._rows for key in row["keys"])
        return np.frombuffer(keys, np.uint8).reshape(-1, KEY_BYTES)

    def write(self, folder: Path, rank: int, world: int, statistics: ChannelStatistics) -> None:
        """Writes the part into a listing's folder.

        Raises:
            TrainingError: there is no space.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        types = pa.schema(
            [
                ("row", pa.int64()),
                ("name", pa.string()),
                ("reason", pa.string()),
                ("bucket", pa.int16()),
                ("keys", pa.list_(pa.binary(KEY_BYTES))),
                ("prompts", pa.list_(pa.int32())),
            ]
        )
        prompts = {"prompt": pa.array(list(self._captions), pa.string())}
        prompts["token_ids"] = pa.array(self._token_ids, pa.list_(pa.int32()))
        values = {"count": statistics.count, "means": statistics.means.tolist()}
        try:
            with replaced_directory(folder / f"{rank}-of-{world}") as part:
                pq.write_table(pa.Table.from_pylist(self._rows, types), part / "rows.parquet")
                pq.write_table(pa.table(prompts), part / "prompts.parquet")
                write_text(
                    part / "statistics.json", json.dumps({**values, "deviations": statistics.deviations.tolist()})
                )
        except OSError as error:
            raise TrainingError(
                f"cannot write to {folder}: {one_line(error)}; make room or name another folder"
            ) from error


@dataclass(frozen=True)
class Listing:
    """All rows of a data set, N, with flat arrays so that worker processes share them."""

    names: Any
    """Arrow strings, [N]."""
    reasons: Any
    """Arrow strings, [N]; null for good rows."""
    buckets: np.ndarray
    """`[N]` int16, -1 where it is not known."""
    keys: np.ndarray
    """`[N, V, 32]` uint8: V is 2 with flips, else 1; zeros for bad rows."""
    prompts: Any
    """Arrow strings, all captions once."""
    token_ids: np.ndarray
    """Token ids of all captions one after another, int32."""
    token_ends: np.ndarray
    """Where the token ids of each caption begin, and of the last one end."""
    captions: np.ndarray
    """Indices of the captions of all rows one after another, int32."""
    caption_ends: np.ndarray
    """Where the captions of each row begin, and of the last one end."""
    statistics: ChannelStatistics

    def captions_of(self, row: int) -> list[int]:
        """Returns the indices of a row's captions."""
        indices: list[int] = self.captions[self.caption_ends[row] : self.caption_ends[row + 1]].tolist()
        return indices

    def tokens_of(self, caption: int) -> tuple[int, ...]:
        """Returns a caption's token ids."""
        return tuple(self.token_ids[self.token_ends[caption] : self.token_ends[caption + 1]].tolist())


def complete_parts(folder: Path) -> list[Path]:
    """Returns the parts of a listing if all are there, of the newest if it was made more than once; otherwise none."""
    by_world: dict[int, list[Path]] = {}
    for path in folder.glob("*-of-*"):
        if match := PART.fullmatch(path.name):
            by_world.setdefault(int(match[2]), []).append(path)
    complete = [parts for world, parts in by_world.items() if len(parts) == world]
    newest = max(complete, key=lambda parts: max(part.stat().st_mtime_ns for part in parts), default=[])
    return sorted(newest, key=lambda part: int(part.name.partition("-")[0]))


def read_listing(parts: Sequence[Path], variants: int, *, by_name: bool = False) -> Listing:
    """Reads the parts of a listing.

    Args:
        variants: number of keys of a good row, V.
        by_name: order the rows by name, for streams, whose rows have no index.

    Raises:
        TrainingError: a file cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables: list[Any] = []
    prompts: list[Any] = []
    statistics: list[ChannelStatistics] = []
    try:
        for part in parts:
            rows = pq.read_table(part / "rows.parquet")
            known = pq.read_table(part / "prompts.parquet")
            lists = rows["prompts"].combine_chunks()
            indices = pa.array(lists.values.to_numpy() + np.int32(sum(len(earlier) for earlier in prompts)))
            moved = pa.ListArray.from_arrays(lists.offsets, indices)
            tables.append(rows.set_column(rows.column_names.index("prompts"), "prompts", moved))
            prompts.append(known)
            values = json.loads((part / "statistics.json").read_text(encoding="utf-8"))
            statistics.append(
                ChannelStatistics(values["count"], np.array(values["means"]), np.array(values["deviations"]))
            )
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise TrainingError(f"{part} cannot be read: {one_line(error)}; fill the cache again") from error
    order = [("name", "ascending"), ("row", "ascending")] if by_name else [("row", "ascending")]
    table = pa.concat_tables(tables).sort_by(order).combine_chunks()
    texts = pa.concat_tables(prompts).combine_chunks()
    key_lists = table["keys"].combine_chunks()
    has_keys = np.diff(key_lists.offsets.to_numpy()) > 0
    keys = np.zeros((len(table), variants, KEY_BYTES), np.uint8)
    stored = b"".join(key_lists.values.to_pylist())
    keys[has_keys] = np.frombuffer(stored, np.uint8).reshape(-1, variants, KEY_BYTES)
    tokens, captions = texts["token_ids"].combine_chunks(), table["prompts"].combine_chunks()
    total = statistics[0]
    for other in statistics[1:]:
        total = total.merged(other)
    return Listing(
        names=table["name"].combine_chunks(),
        reasons=table["reason"].combine_chunks(),
        buckets=table["bucket"].to_numpy(),
        keys=keys,
        prompts=texts["prompt"].combine_chunks(),
        token_ids=tokens.values.to_numpy(),
        token_ends=tokens.offsets.to_numpy(),
        captions=captions.values.to_numpy(),
        caption_ends=captions.offsets.to_numpy(),
        statistics=total,
    )
