"""What the VLM of `emoji` learns besides conversations: what the emoji that a prompt names look like.

A pretrained VLM knows it. One that is trained from nothing knows a name only by its tokens, and then each expert group
has to learn 1,370 looks by itself, from the few keys and values of its layers: after 5,600 steps no emoji was right.
So the values of every layer learn to tell the look linearly, at the end of a name and at one token from there to the
next name: prompts mostly say the place there, and only there is known which of two emoji is where. The probes are
discarded afterwards.
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
from runtime.errors import InputError

CODE_SIZE = 96
"""Principal components of a look; they explain 95 % of the variance of thumbnails."""
THUMBNAIL = 12
"""Height and width of the thumbnails, in pixels."""
NAMES_PER_PROMPT = 4
"""Emoji that a prompt names around a caption, so that the tokens of the template cost less per name."""
_BEFORE = ("", "a ", "the ", "a large ", "a small ", "a picture of a ", "draw a ", "big ", "tiny ")
_AFTER = ("", " emoji", " on the left", " at the top", " in the middle", " on navy", ", big", " over teal")
_BETWEEN = (", ", "; ", ". ", " and ", "\n")


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
    """Prompts in the chat template that name emoji, padded on the right, and N tokens that tell a look each."""

    input_ids: Tensor
    """`[B, T]` int64."""
    attention_mask: Tensor
    """`[B, T]` int64."""
    rows: Tensor
    """Index of the prompt of each of the tokens, `[N]` int64."""
    places: Tensor
    """Index of each of the tokens in its prompt, `[N]` int64."""
    looks: Tensor
    """`[N, CODE_SIZE]` float32."""


@dataclass(frozen=True)
class EmojiVlmBatch:
    """A batch of conversations and one of prompts."""

    conversations: VlmBatch
    prompts: NamedPrompts


class _AnswersAndLooks(nn.Module):
    """A VLM and its probes as one call: a batch to the logits of answers, and the looks that each layer tells.

    The looks are `[layers, N, CODE_SIZE]`.
    """

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
            position_ids=torch.arange(prompts.input_ids.shape[1], device=prompts.rows.device).expand(
                3, *prompts.input_ids.shape
            ),
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states  # the input of each layer, [B, T, hidden]
        told = [
            probe(_normalised(layer.self_attn.v_proj(layer.input_layernorm(state[prompts.rows, prompts.places]))))
            for layer, probe, state in zip(model.layers, self.probes, states, strict=False)
        ]
        return self.answers(batch.conversations), torch.stack(told)  # [layers, N, CODE_SIZE]


def _normalised(values: Tensor) -> Tensor:
    """Returns values with a root mean square of 1, so that their size changes no error."""
    return F.rms_norm(values, values.shape[-1:])


class EmojiVlmStage(VlmStage):
    """Trains the language model with the answers' cross-entropy, and the error of the looks that its values tell.

    Parts of a batch (processes, accumulated passes) are weighted by their answers' tokens, so the error of the looks is
    averaged over parts nearly, not exactly, as over one batch.
    """

    def __init__(
        self, model: LatteFlow, encoder: ConversationEncoder, conversations: Conversations, catalogue: Catalogue
    ) -> None:
        super().__init__(model.vlm, encoder, conversations)
        self.module = _AnswersAndLooks(model.vlm, self.module)
        self.model = model
        self.catalogue = catalogue
        self.looks = looks_of(catalogue)

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
        tokens: list[list[int]] = []
        places, looks = [], []
        for row, rng in enumerate(rows.generators(2, index)):
            text, mentions, ids = self._fitting_prompt(rng)
            tokens.append(ids)
            ends = self._ends(ids, text)
            for mention in mentions:
                last = int(np.searchsorted(ends, mention.end))
                until = len(ids) if mention.until == len(text) else int(np.searchsorted(ends, mention.until)) + 1
                places += [(row, last), (row, int(rng.integers(last, until)))]
                looks += [self.looks[mention.emoji]] * 2
        input_ids, mask = self.model.pad(tokens)
        of_rows, of_tokens = torch.tensor(places).unbind(1)
        return NamedPrompts(input_ids, mask, of_rows, of_tokens, torch.from_numpy(np.stack(looks)))

    def _fitting_prompt(
        self, rng: np.random.Generator, names: int = NAMES_PER_PROMPT
    ) -> tuple[str, list[Mention], list[int]]:
        """Returns a prompt with its tokens; one in many thousands is too long for the model, and sampled again."""
        text, mentions = sample_prompt(self.catalogue, rng, names)
        try:
            return text, mentions, self.model.tokenize([text])[0]
        except InputError:
            if names == 0:
                raise
            return self._fitting_prompt(rng, names - 1)

    def _ends(self, ids: Sequence[int], text: str) -> np.ndarray:
        """Returns where each token of a prompt ends in its text; those of the template before it end at 0 or below."""
        lengths = [len(self.model.tokenizer.decode([token])) for token in ids]
        whole = self.model.tokenizer.decode(ids)
        return np.cumsum(lengths) - whole.rindex(text)


@dataclass(frozen=True)
class Mention:
    """An emoji that a text names."""

    emoji: int
    """Index in the catalogue."""
    end: int
    """Where the name ends, in characters."""
    until: int
    """Where the text about it ends: before the next name, or with the text."""


def sample_prompt(
    catalogue: Catalogue, rng: np.random.Generator, names: int = NAMES_PER_PROMPT
) -> tuple[str, list[Mention]]:
    """Samples a prompt that names emoji: a caption among `names` phrases that are little more than a name."""
    parts = [_phrase(catalogue, rng) for _ in range(names)]
    parts.insert(int(rng.integers(len(parts) + 1)), _caption(catalogue, rng))
    text, mentions = "", []
    for part, of_part in parts:
        text += choose(rng, _BETWEEN) if text else ""
        mentions += [Mention(one.emoji, one.end + len(text), one.until + len(text)) for one in of_part]
        text += part
    return text, mentions


def _phrase(catalogue: Catalogue, rng: np.random.Generator) -> tuple[str, list[Mention]]:
    emoji = int(rng.integers(len(catalogue)))
    named = choose(rng, _BEFORE) + choose(rng, (catalogue.emoji[emoji].name, *catalogue.emoji[emoji].synonyms))
    text = named + choose(rng, _AFTER)
    return text, [Mention(emoji, len(named), len(text))]


def _caption(catalogue: Catalogue, rng: np.random.Generator) -> tuple[str, list[Mention]]:
    scene = sample_scene(catalogue.names, rng)
    text = caption(scene, catalogue, rng)[0]
    found = []
    for number in (catalogue.index(placed.name) for placed in scene.emoji):
        emoji = catalogue.emoji[number]
        if (span := _find(text, (emoji.name, *emoji.synonyms))) is not None:
            found.append((*span, number))
    found.sort()
    starts = [start for start, *_ in found[1:]]
    untils = [*(len(text[:start].rstrip()) for start in starts), len(text)]
    return text, [Mention(number, end, max(end, until)) for (_, end, number), until in zip(found, untils, strict=True)]


def _find(text: str, names: Sequence[str]) -> tuple[int, int] | None:
    """Returns where the longest of these names is in a text that has it as words, or None."""
    for name in sorted(names, key=len, reverse=True):
        if (found := re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text)) is not None:
            return found.span()
    return None
