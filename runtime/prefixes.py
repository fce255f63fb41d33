"""Encoded prompts that are kept, so that a prompt that comes again costs no run of the VLM."""

from __future__ import annotations

from collections import OrderedDict

from runtime.rows import PrefixRow

PREFIX_CACHE_BYTES = 256 * 2**20
"""About 200 prompts of a model of the paper's size, and 1,000 of the shipped one."""


class PrefixCache:
    """The prompts that were used last, by their text.

    Args:
        limit: bytes of all keys and values together; 0 keeps nothing.
    """

    def __init__(self, limit: int = PREFIX_CACHE_BYTES) -> None:
        self._limit = limit
        self._rows: OrderedDict[str, PrefixRow] = OrderedDict()
        self.nbytes = 0
        """Bytes in use."""

    def __len__(self) -> int:
        return len(self._rows)

    def clear(self) -> None:
        """Drops all prompts."""
        self._rows.clear()
        self.nbytes = 0

    def get(self, prompt: str) -> PrefixRow | None:
        """Returns a prompt's keys and values, or None if they are not kept."""
        row = self._rows.get(prompt)
        if row is not None:
            self._rows.move_to_end(prompt)
        return row

    def add(self, prompt: str, row: PrefixRow) -> None:
        """Keeps a prompt, and drops those whose last use is the longest ago until all fit."""
        if prompt in self._rows:
            self.nbytes -= self._rows.pop(prompt).nbytes
        self._rows[prompt] = row
        self.nbytes += row.nbytes
        while self.nbytes > self._limit:
            self.nbytes -= self._rows.popitem(last=False)[1].nbytes
