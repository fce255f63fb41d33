"""Prompts to token ids, in the VLM's chat template, with no template engine and no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from runtime.errors import InputError
from runtime.manifest import Manifest, PromptFormat, check_file


class PromptEncoder:
    """Token ids of prompts, as `apply_chat_template` and the tokenizer of transformers give them."""

    def __init__(self, tokenizer: Tokenizer, prompt_format: PromptFormat) -> None:
        self.tokenizer = tokenizer
        self._format = prompt_format

    @classmethod
    def from_bundle(cls, bundle: Path, manifest: Manifest) -> PromptEncoder:
        """Reads the bundle's `tokenizer.json`, once it is known to be unaltered."""
        entry = next(entry for entry in manifest.tokenizer_files if entry.path == "tokenizer.json")
        return cls(Tokenizer.from_file(str(check_file(bundle, entry))), manifest.prompt)

    def tokens(self, prompt: str) -> list[int]:
        """Token ids of one prompt in its template.

        Raises:
            InputError: it is no text, holds a special token, or is longer than the model's limit.
        """
        if not isinstance(prompt, str):
            raise InputError(f"a prompt must be text, got {type(prompt).__name__}")
        refuse_special_tokens("prompt", prompt, self._format)
        text = self._format.before + prompt + self._format.after
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        if len(ids) > self._format.max_tokens:
            raise InputError(
                f"a prompt has {len(ids)} tokens in its chat template, the model's limit is "
                f"{self._format.max_tokens}; shorten it"
            )
        return ids

    def batch(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Prompts side by side: ids `[B, P]` int64 and mask `[B, P]` bool, padded on the right."""
        rows = [self.tokens(prompt) for prompt in prompts]
        width = max(map(len, rows))
        ids = np.full((len(rows), width), self._format.pad_token_id, np.int64)
        mask = np.zeros((len(rows), width), bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            mask[i, : len(row)] = True
        return ids, mask


def refuse_special_tokens(what: str, text: str, prompt_format: PromptFormat) -> None:
    """Raises `InputError` if a text would speak the template's own language."""
    for token in prompt_format.special_tokens:
        if token in text:
            raise InputError(f"a {what} must not hold the model's special token {token}; remove it")
