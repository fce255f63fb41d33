"""Prompts to keys and values, without computing twice what prompts have in common."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from runtime.backends import to_host
from runtime.chat import ChatProcessor
from runtime.language import LanguageModel
from runtime.rows import PrefixRow, row_of

PREFIX_CACHE_BYTES = 256 * 2**20
"""About 200 prompts of a model of the paper's size, and 1,000 of the shipped one."""


Tokens = tuple[int, ...]
NO_HEAD: tuple[Tokens, tuple[np.ndarray, ...]] = ((), ())


class PrefixCache:
    """The prompts that were used last, by their tokens in the chat template, which may have today's date.

    Args:
        limit: bytes of all keys and values together; 0 keeps nothing.
    """

    def __init__(self, limit: int = PREFIX_CACHE_BYTES) -> None:
        self._limit = limit
        self._rows: OrderedDict[Tokens, PrefixRow] = OrderedDict()
        self.nbytes = 0
        """Bytes in use."""

    def __len__(self) -> int:
        return len(self._rows)

    def clear(self) -> None:
        """Drops all prompts."""
        self._rows.clear()
        self.nbytes = 0

    def get(self, prompt: Tokens) -> PrefixRow | None:
        """Returns a prompt's keys and values, or None if they are not kept."""
        row = self._rows.get(prompt)
        if row is not None:
            self._rows.move_to_end(prompt)
        return row

    def add(self, prompt: Tokens, row: PrefixRow) -> None:
        """Keeps a prompt, and drops those whose last use is the longest ago until all fit."""
        if prompt in self._rows:
            self.nbytes -= self._rows.pop(prompt).nbytes
        self._rows[prompt] = row
        self.nbytes += row.nbytes
        while self.nbytes > self._limit:
            self.nbytes -= self._rows.popitem(last=False)[1].nbytes


class PromptEncoder:
    """Runs the VLM over prompts. Those that were used last are kept, and so is what the chat template begins with.

    Args:
        cache_bytes: memory for encoded prompts; 0 keeps none.
        shares_head: whether the engine takes several new tokens after a past, which plans of TensorRT do not.
    """

    def __init__(self, chat: ChatProcessor, language: LanguageModel, cache_bytes: int, *, shares_head: bool) -> None:
        self.cache = PrefixCache(cache_bytes)
        self._chat = chat
        self._language = language
        self._shares_head = shares_head

    def __call__(self, prompts: Sequence[str]) -> list[PrefixRow]:
        """Returns the keys and values of each prompt. Those that are not kept go through the VLM together.

        Raises:
            InputError: a prompt cannot be encoded.
        """
        tokens = {prompt: tuple(self._chat.prompt_tokens(prompt)) for prompt in dict.fromkeys(prompts)}
        rows = {ids: row for ids in tokens.values() if (row := self.cache.get(ids)) is not None}
        missing = [ids for ids in dict.fromkeys(tokens.values()) if ids not in rows]
        # Apart by whether they begin with the head, so that how a prompt is encoded does not depend on the others.
        begins = self._begins_with_head
        for has_head, group in itertools.groupby(sorted(missing, key=begins), begins):
            part = list(group)
            for ids, row in zip(part, self._encode(part, *(self._head if has_head else NO_HEAD)), strict=True):
                rows[ids] = row
                self.cache.add(ids, row)
        return [rows[tokens[prompt]] for prompt in prompts]

    def forget(self) -> None:
        """Drops everything that is kept: the VLM has other weights."""
        self.cache.clear()
        self.__dict__.pop("_head", None)

    def _begins_with_head(self, ids: Tokens) -> bool:
        head, _ = self._head
        return bool(head) and ids[: len(head)] == head

    def _encode(self, tokens: Sequence[Tokens], head: Tokens, head_kv: tuple[np.ndarray, ...]) -> list[PrefixRow]:
        ids, mask = self._chat.pad(tokens)
        new = ids[:, len(head) :]
        positions = np.broadcast_to(np.arange(len(head), ids.shape[1]), (3, *new.shape))
        past = tuple(np.repeat(kv, len(ids), axis=2) for kv in head_kv) or None
        groups = [to_host(kv) for kv in self._language.forward(new, mask, positions, past=past).kv]
        return [row_of(groups, i, of_row) for i, of_row in enumerate(mask)]

    @cached_property
    def _head(self) -> tuple[Tokens, tuple[np.ndarray, ...]]:
        """The tokens before a prompt in the chat template, and their keys and values, `[M, 2, 1, Hkv, T, D]`."""
        head = self._chat.prompt_head() if self._shares_head else []
        kv = self._language.forward(*self._chat.pad([head])).kv if head else ()
        return tuple(head), tuple(to_host(group) for group in kv)
