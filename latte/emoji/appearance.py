"""What the VLM of `emoji` learns besides conversations: what the emoji that a prompt names look like.

A pretrained VLM knows it. One that is trained from nothing knows a name only by its tokens, and then each expert group
has to learn 1,370 looks by itself, from the few keys and values of its layers: after 5,000 steps no emoji was right.
So the values of every layer at the end of a name learn to tell the look linearly. The probes are discarded afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen2VLForConditionalGeneration

from latte.emoji.captions import caption
from latte.emoji.catalogue import Catalogue
from latte.emoji.scenes import choose, sample_scene
from latte.model import LatteFlow
from latte.training.conversations import ConversationEncoder, VlmBatch
from latte.training.stage import Rows
from latte.training.vlm import Conversations, VlmStage

CODE_SIZE = 96
"""Principal components of a look; they explain 95 % of the variance of thumbnails."""
THUMBNAIL = 12
"""Height and width of the thumbnails, in pixels."""
PROMPTS_PER_ROW = 8
"""Prompts with a name for each conversation of a batch."""
SHORT_SHARE = 0.5
"""Share of prompts that are little more than a name."""
_BEFORE = ("", "a ", "the ", "a large ", "a small ", "a picture of a ", "draw a ", "big ", "tiny ")
_AFTER = ("", " emoji", " on the left", " at the top", " in the middle", " on a navy background", ", big", " over teal")


def looks_of(catalogue: Catalogue) -> np.ndarray:
    """Returns the look of each emoji, `[N, CODE_SIZE]` float32: principal components of its thumbnail with alpha.

    They are scaled so that thumbnails have a variance of 1 in all. Where there are fewer emoji than components, the
    others are zero.
    """
    small = [
        np.asarray(Image.fromarray(sprite, "RGBa").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX), np.float32)
        for sprite in catalogue.sprites["large"]
    ]
    flat = np.stack(small).reshape(len(catalogue), -1)
    flat -= flat.mean(axis=0)
    flat /= np.sqrt(np.square(flat).sum(axis=1).mean())
    _, _, components = np.linalg.svd(flat, full_matrices=False)
    looks = np.zeros((len(catalogue), CODE_SIZE), np.float32)
    components = components[:CODE_SIZE]
    looks[:, : len(components)] = flat @ components.T
    return looks


@dataclass(frozen=True)
class NamedPrompts:
    """Prompts in the chat template that name an emoji each, padded on the right."""

    input_ids: Tensor
    """`[B, T]` int64."""
    attention_mask: Tensor
    """`[B, T]` int64."""
    ends: Tensor
    """Place of the last token of the name, `[B]` int64."""
    looks: Tensor
    """`[B, CODE_SIZE]` float32."""


@dataclass(frozen=True)
class EmojiVlmBatch:
    """A batch of conversations and one of prompts."""

    conversations: VlmBatch
    prompts: NamedPrompts


class _AnswersAndLooks(nn.Module):
    """A VLM and its probes as one call: a batch to the logits of answers, and the looks that each layer tells."""

    def __init__(self, vlm: Qwen2VLForConditionalGeneration, answers: nn.Module) -> None:
        super().__init__()
        self.answers = answers
        config: Any = vlm.config.text_config
        width = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
        self.probes = nn.ModuleList(nn.Linear(width, CODE_SIZE) for _ in range(config.num_hidden_layers))

    def forward(self, batch: EmojiVlmBatch) -> tuple[Tensor, Tensor]:
        model: Any = self.answers.vlm.model.language_model  # type: ignore[union-attr]
        prompts = batch.prompts
        states = model(
            input_ids=prompts.input_ids,
            attention_mask=prompts.attention_mask,
            position_ids=torch.arange(prompts.input_ids.shape[1], device=prompts.ends.device).expand(
                3, *prompts.input_ids.shape
            ),
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states  # the input of each layer, [B, T, hidden]
        rows = torch.arange(len(prompts.ends), device=prompts.ends.device)
        told = [
            probe(_normalised(layer.self_attn.v_proj(layer.input_layernorm(state[rows, prompts.ends]))))
            for layer, probe, state in zip(model.layers, self.probes, states, strict=False)
        ]
        return self.answers(batch.conversations), torch.stack(told)  # [layers, B, CODE_SIZE]


def _normalised(values: Tensor) -> Tensor:
    """Returns values with a root mean square of 1, so that their size changes no error."""
    return F.rms_norm(values, values.shape[-1:])


class EmojiVlmStage(VlmStage):
    """Trains the language model with the answers' cross-entropy, and the error of the looks that its values tell."""

    def __init__(
        self, model: LatteFlow, encoder: ConversationEncoder, conversations: Conversations, catalogue: Catalogue
    ) -> None:
        super().__init__(model.vlm, encoder, conversations)
        self.module = _AnswersAndLooks(model.vlm, self.module)
        self.model = model
        self.catalogue = catalogue
        self.looks = looks_of(catalogue)
        one, other = model.tokenize(["a", "b"])
        self.tokens_behind = next(i for i in range(len(one)) if one[-1 - i] != other[-1 - i])

    def batch(self, index: int, rows: Rows) -> EmojiVlmBatch:  # type: ignore[override]
        return EmojiVlmBatch(super().batch(index, rows), self._prompts(index, rows))

    def prepare(self, batch: EmojiVlmBatch, device: torch.device) -> EmojiVlmBatch:  # type: ignore[override]
        prompts = {name: value.to(device) for name, value in vars(batch.prompts).items()}
        return EmojiVlmBatch(super().prepare(batch.conversations, device), replace(batch.prompts, **prompts))

    def weight(self, prepared: EmojiVlmBatch) -> float:  # type: ignore[override]
        return super().weight(prepared.conversations)

    def losses(
        self,
        module: nn.Module,
        prepared: EmojiVlmBatch,  # type: ignore[override]
        step: int,
        rows: Rows,
    ) -> dict[str, Tensor]:
        logits, told = module(prepared)
        error = (told.float() - prepared.prompts.looks).square().sum(dim=-1).mean()
        return {"answers": self.cross_entropy(logits, prepared.conversations), "looks": error}

    def _prompts(self, index: int, rows: Rows) -> NamedPrompts:
        texts, cut, looks = [], [], []
        for rng in rows.generators(2, index):
            for _ in range(PROMPTS_PER_ROW):
                text, end, emoji = sample_prompt(self.catalogue, rng)
                texts.append(text)
                cut.append(text[:end])
                looks.append(self.looks[emoji])
        input_ids, mask = self.model.pad(self.model.tokenize(texts))
        ends = [len(tokens) - self.tokens_behind - 1 for tokens in self.model.tokenize(cut)]
        return NamedPrompts(input_ids, mask, torch.tensor(ends), torch.from_numpy(np.stack(looks)))


def sample_prompt(catalogue: Catalogue, rng: np.random.Generator) -> tuple[str, int, int]:
    """Samples a prompt with the name of an emoji; returns also where the name ends, and the index of the emoji."""
    if rng.random() >= SHORT_SHARE:
        scene = sample_scene(catalogue.names, rng)
        text = caption(scene, catalogue, rng)[0]
        for placed in scene.emoji:
            emoji = catalogue.index(placed.name)
            if (end := _end_of_name(text, (catalogue.emoji[emoji].name, *catalogue.emoji[emoji].synonyms))) is not None:
                return text, end, emoji
    emoji = int(rng.integers(len(catalogue)))
    name = choose(rng, (catalogue.emoji[emoji].name, *catalogue.emoji[emoji].synonyms))
    text = choose(rng, _BEFORE) + name
    return text + choose(rng, _AFTER), len(text), emoji


def _end_of_name(text: str, names: Sequence[str]) -> int | None:
    """Returns where the longest of these names ends in a text that has it as words, or None."""
    for name in sorted(names, key=len, reverse=True):
        if (found := re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text)) is not None:
            return found.end()
    return None
