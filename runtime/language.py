"""The engine `vlm` as a language model: it encodes prompts to keys and values, and writes answers token by token.

One session serves both. Keys and values stay on the device between runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from runtime.backends import DeviceTensor, Session, Value
from runtime.manifest import EngineEntry

PAST = "past_kv_"
"""Inputs of this name and a number are the keys and values of an expert group's layers."""


@dataclass(frozen=True)
class LanguageOutput:
    """The outputs of one run."""

    logits: DeviceTensor
    """Logits of each row's last token, `[B, vocabulary]` float32."""
    best_token: DeviceTensor | None
    """The likeliest token of each row, `[B]` int64, -1 where a logit is not finite; None of older bundles."""
    kv: tuple[DeviceTensor, ...]
    """Keys and values so far, one tensor per expert group, `[M, 2, B, Hkv, T, D]`."""


class LanguageModel:
    """Feeds the engine `vlm`. It is not safe to use from several threads at once."""

    def __init__(self, engines: Mapping[str, Session]) -> None:
        self._engines = engines

    def forward(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray,
        position_ids: np.ndarray | None = None,
        image_embeds: Value | None = None,
        past: tuple[Value, ...] | None = None,
    ) -> LanguageOutput:
        """Runs the model over new tokens.

        Args:
            input_ids: `[B, S]` int64, padded on the right.
            attention_mask: True where a token may be attended to, `[B, T]` bool; T = past tokens + S.
            position_ids: M-RoPE positions, `[3, B, S]` int64; by default 0, 1, … for text without a past.
            image_embeds: embeddings of the batch's image tokens in order, `[image tokens, hidden]` float32.
            past: the `kv` of the run before.
        """
        session = self._engines["vlm"]
        rows, tokens = input_ids.shape
        if position_ids is None:
            position_ids = np.broadcast_to(np.arange(tokens), (3, rows, tokens)).astype(np.int64)
        feed: dict[str, Value] = {
            "input_ids": input_ids,
            "image_embeds": no_images(session.entry) if image_embeds is None else image_embeds,
            "position_ids": np.ascontiguousarray(position_ids),
            "attention_mask": attention_mask,
        }
        past = empty_past(session.entry, rows) if past is None else past
        feed |= {f"{PAST}{group}": kv for group, kv in enumerate(past)}
        outputs = session.run(feed)
        kv = tuple(outputs[f"kv_{group}"] for group in range(len(past)))
        return LanguageOutput(outputs["logits"], outputs.get("best_token"), kv)


def no_images(entry: EngineEntry) -> np.ndarray:
    """Returns the single row of zeros that means "no image", `[1, hidden]` float32."""
    return np.zeros((1, int(entry.input("image_embeds").shape[1])), np.float32)


def empty_past(entry: EngineEntry, rows: int) -> tuple[np.ndarray, ...]:
    """Returns keys and values of length 0, `[M, 2, rows, Hkv, 0, D]` per expert group."""
    sizes = {"batch": rows, "past": 0}
    return tuple(
        np.zeros([sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape], spec.dtype)
        for spec in entry.inputs
        if spec.name.startswith(PAST)
    )
