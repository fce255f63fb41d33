"""Data sets as what a model can be trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from latte.data.batch import BadRows, ImageTextBatch
from latte.data.batches import CAPTION_DROPOUT, ImageTextBatches
from latte.data.images import CropName, ImagePolicy
from latte.data.pixel_rows import PixelRows
from latte.data.source import ImageTextDataSet
from latte.model import LatteFlow
from latte.training.conversations import Conversation
from latte.training.flow import Batches, FlowBatch, FlowStage
from latte.training.settings import TrainSettings
from latte.training.stage import Rows
from latte.training.vision import LabelledImages
from latte.training.world import StageName
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
    more: Mapping[str, Any] = field(default_factory=dict)
    """Other fields of `ImagePolicy`."""


class DataSetWorld:
    """Images with captions, and maybe with questions, of a data set."""

    def __init__(self, data_set: ImageTextDataSet, options: DataOptions, seed: int = 0) -> None:
        self.data_set = data_set
        self.options = options
        self.seed = seed
        asked = data_set.reader.has_questions
        self.settings = {name: s for name, s in SETTINGS.items() if name != "vlm" or asked}

    @property
    def name(self) -> str:
        return self.data_set.name

    def images(self, model: LatteFlow) -> Batches:
        return self._batches(model)

    def labelled_images(self, model: LatteFlow) -> LabelledImages:
        raise InputError(f"{self.name} has no labels of tokens, so it cannot train a vision tower")

    def conversations(self, model: LatteFlow) -> DataSetConversations:
        return DataSetConversations(self._batches(model), self.seed)

    def flow_stage(self, model: LatteFlow) -> DataSetFlowStage:
        return DataSetFlowStage(model, self._batches(model), self.name)

    def _batches(self, model: LatteFlow) -> ImageTextBatches:
        config, options = model.config, self.options
        factor = config.vae_scale_factor
        height, width = options.resolution or tuple(factor * side for side in config.latent_size)
        policy = ImagePolicy(height, width, factor, options.crop, options.random_flip, **options.more)
        rows = PixelRows(self.data_set, policy)
        return ImageTextBatches(rows, seed=self.seed, caption_dropout=options.caption_dropout)


class DataSetFlowStage(FlowStage):
    """Trains the flow layers on a data set, whose bad rows it counts."""

    def __init__(self, model: LatteFlow, batches: Batches, name: str) -> None:
        super().__init__(model, batches)
        self.bad_rows = BadRows(name)

    def prepare(self, batch: ImageTextBatch, device: torch.device) -> FlowBatch:  # type: ignore[override]
        self.bad_rows.add(batch)
        return super().prepare(batch, device)


class DataSetConversations:
    """Conversations about the images of a data set."""

    def __init__(self, batches: ImageTextBatches, seed: int) -> None:
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
