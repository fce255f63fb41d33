"""Data sets as what a model can be trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

from latte.data.batch import BadRows, ImageTextBatch
from latte.data.batches import CAPTION_DROPOUT, ImageTextBatches
from latte.data.cache import LatentCache
from latte.data.cached_rows import CachedRows
from latte.data.images import CropName, ImagePolicy
from latte.data.source import ImageTextDataSet
from latte.data.streams import SHUFFLE_BUFFER, StreamedBatches, batches_of
from latte.model import LatteFlow
from latte.training.conversations import Conversation, ConversationEncoder
from latte.training.flow import Batches, FlowBatch, FlowStage
from latte.training.settings import TrainSettings
from latte.training.stage import Rows
from latte.training.vision import LabelledImages
from latte.training.vlm import VlmStage
from latte.training.world import HELD_OUT_SEED, StageName
from runtime.errors import InputError

TURNS = 5
"""Largest number of questions in a conversation."""
SETTINGS: Mapping[StageName, TrainSettings] = {
    "autoencoder": TrainSettings(max_train_steps=20_000, train_batch_size=32, learning_rate=1e-3, ema_decay=0.999),
    "vlm": TrainSettings(max_train_steps=10_000, train_batch_size=16, learning_rate=1e-5, lr_warmup_steps=500),
    "flow": TrainSettings(
        max_train_steps=100_000,
        train_batch_size=32,
        learning_rate=1e-4,
        lr_scheduler="constant",
        lr_warmup_steps=1000,
        ema_decay=0.9999,
    ),
}


@dataclass(frozen=True)
class DataOptions:
    """How images and captions of a data set become batches."""

    resolution: tuple[int, int] | None = None
    """Height and width in pixels; by default the checkpoint's."""
    crop: CropName = "center"
    random_flip: bool = False
    caption_dropout: float = CAPTION_DROPOUT
    shuffle_buffer: int = SHUFFLE_BUFFER
    """Rows among which a stream is shuffled."""
    cache_latents: Path | None = None
    """Folder of a latent cache for the flow layers, which is filled first; None encodes images in each epoch."""
    num_workers: int = 0
    """Processes that read and decode images for the cache."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """Other fields of `ImagePolicy`."""


class DataSetWorld:
    """Images with captions, and maybe with questions, of a data set.

    Args:
        held_out: rows to validate on; without them, rows of `data_set` are taken.
    """

    def __init__(
        self, data_set: ImageTextDataSet, options: DataOptions, seed: int = 0, held_out: ImageTextDataSet | None = None
    ) -> None:
        self.data_set = data_set
        self.held_out = held_out
        self.options = options
        self.seed = seed
        asked = data_set.reader.has_questions
        self.settings = {name: s for name, s in SETTINGS.items() if name != "vlm" or asked}

    @property
    def name(self) -> str:
        return self.data_set.name

    @property
    def identity(self) -> dict[str, str]:
        options, captions = self.options, self.data_set.reader.captions
        said: dict[str, Any] = {
            "world": "data set",
            "resolution": options.resolution,
            "crop": options.crop,
            "random_flip": options.random_flip,
            "caption_dropout": options.caption_dropout,
            "captions": captions.column or captions.kind,
            "templates": list(captions.templates) if captions.kind == "class" else None,
        }
        return {name: str(value) for name, value in said.items()}

    @property
    def num_rows(self) -> int | None:
        return None if self.data_set.streamed else len(self.data_set)

    def images(self, model: LatteFlow) -> Batches:
        return CountedBatches(self.captioned_images(model), self.name)

    def captioned_images(self, model: LatteFlow, *, held_out: bool = False) -> ImageTextBatches | StreamedBatches:
        options = self.options
        return batches_of(
            self.held_out if held_out and self.held_out is not None else self.data_set,
            self._policy(model),
            seed=self.seed + HELD_OUT_SEED * held_out,
            caption_dropout=0 if held_out else options.caption_dropout,
            shuffle_buffer=options.shuffle_buffer,
        )

    def labelled_images(self, model: LatteFlow) -> LabelledImages:
        raise InputError(f"{self.name} has no labels of tokens, so it cannot train a vision tower")

    def vlm_stage(self, model: LatteFlow, encoder: ConversationEncoder) -> VlmStage:
        options = self.options
        batches = batches_of(
            self.data_set.asking(), self._policy(model), seed=self.seed, shuffle_buffer=options.shuffle_buffer
        )
        counted = CountedBatches(batches, self.name)
        return VlmStage(model.vlm, encoder, DataSetConversations(counted, self.seed))

    def flow_stage(self, model: LatteFlow) -> DataSetFlowStage:
        folder = self.options.cache_latents
        if folder is None:
            return DataSetFlowStage(model, self.captioned_images(model), self.name)
        rows = self._cached_rows(model, folder)
        batches = ImageTextBatches(rows, seed=self.seed, caption_dropout=self.options.caption_dropout)
        return DataSetFlowStage(model, batches, self.name)

    def _cached_rows(self, model: LatteFlow, folder: Path) -> CachedRows:
        """Fills the cache, all processes together, and returns its rows."""
        processes, policy = PartialState(), self._policy(model)
        model.vae.to(processes.device)
        cache = LatentCache(folder, model)
        cache.fill(
            self.data_set,
            policy,
            rank=processes.process_index,
            world=processes.num_processes,
            num_workers=self.options.num_workers,
        )
        processes.wait_for_everyone()
        return cache.rows(self.data_set, policy)

    def _policy(self, model: LatteFlow) -> ImagePolicy:
        config, options = model.config, self.options
        factor = config.vae_scale_factor
        height, width = options.resolution or tuple(factor * side for side in config.latent_size)
        return ImagePolicy(height, width, factor, options.crop, options.random_flip, **options.more)


class DataSetFlowStage(FlowStage):
    """Trains the flow layers on a data set, whose bad rows it counts."""

    def __init__(self, model: LatteFlow, batches: Batches, name: str) -> None:
        super().__init__(model, batches)
        self.bad_rows = BadRows(name)

    def prepare(self, batch: ImageTextBatch, device: torch.device) -> FlowBatch:  # type: ignore[override]
        self.bad_rows.add(batch)
        return super().prepare(batch, device)


class CountedBatches:
    """Batches of which bad rows are named and counted as they are made, in each process that makes them."""

    def __init__(self, batches: ImageTextBatches | StreamedBatches, name: str) -> None:
        self.batches = batches
        self.bad_rows = BadRows(name)

    def batch(self, index: int, rows: range, total: int) -> ImageTextBatch:
        batch = self.batches.batch(index, rows, total)
        self.bad_rows.add(batch)
        return batch


class DataSetConversations:
    """Conversations about the images of a data set."""

    def __init__(self, batches: CountedBatches, seed: int) -> None:
        self.batches, self.seed = batches, seed

    def batch(self, index: int, rows: range, total: int) -> list[Conversation]:
        drawn = self.batches.batch(index, rows, total)
        assert drawn.pixels is not None
        images = drawn.pixels.add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        generators = Rows(self.seed, rows, total).generators(2, index)
        return [
            Conversation(_some(pairs, rng), image)
            for pairs, image, rng in zip(drawn.conversations, images, generators, strict=True)
        ]


def _some(pairs: tuple[tuple[str, str], ...], rng: np.random.Generator) -> tuple[tuple[str, str], ...]:
    return tuple(pairs[i] for i in rng.permutation(len(pairs))[:TURNS])
