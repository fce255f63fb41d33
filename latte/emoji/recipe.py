"""The training recipe of `emoji`: what its stages are trained on, their settings, and the untrained model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from latte.checkpoint import assemble
from latte.emoji.appearance import EmojiVlmStage
from latte.emoji.autoencoder import BusyScenes, emoji_autoencoder
from latte.emoji.captions import caption
from latte.emoji.catalogue import Catalogue, load_catalogue
from latte.emoji.scenes import draw, sample_scene
from latte.emoji.vision import LabelledScenes
from latte.emoji.vlm import EmojiConversations, emoji_tokenizer, emoji_vlm, texts_of
from latte.model import LatteFlow
from latte.shapes.autoencoder import Images, to_pixels
from latte.shapes.vlm import small_image_processor
from latte.training.conversations import ConversationEncoder
from latte.training.flow import FlowStage
from latte.training.settings import TrainSettings
from latte.training.stage import Rows
from latte.training.world import HELD_OUT_SEED, StageName

NUM_GROUPS = 2
"""Number of expert groups, K."""
MAX_PROMPT_TOKENS = 128
LATENT_SIZE = (8, 8)
"""Height and width in latents."""
PROMPT_DROPOUT = 0.1
"""Share of rows with the empty prompt, which gives guidance its unconditional velocity (arXiv 2207.12598)."""

ONE_LARGE_SHARE = 0.4
"""Share of the flow layers' scenes that have one large emoji, besides those that chance makes so: a large emoji has 36
latents to learn, a small one 16, and scenes at random show five small ones for each large one."""


def untrained(catalogue: Catalogue, seed: int = 0) -> tuple[LatteFlow, Qwen2VLImageProcessorPil]:
    """Builds the model before its training, with its image processor. The tokenizer is trained."""
    torch.manual_seed(seed)
    tokenizer = emoji_tokenizer(texts_of(catalogue))
    model = assemble(
        emoji_vlm(tokenizer),
        emoji_autoencoder(),
        tokenizer,
        num_groups=NUM_GROUPS,
        latent_size=LATENT_SIZE,
        max_prompt_tokens=MAX_PROMPT_TOKENS,
    )
    return model, small_image_processor()


class CaptionedScenes:
    """Scenes with a prompt each, for the flow layers, by index."""

    def __init__(self, catalogue: Catalogue, seed: int = 0) -> None:
        self.catalogue, self.seed = catalogue, seed

    def batch(self, index: int, rows: range, total: int) -> Images:
        images, prompts = [], []
        for rng in Rows(self.seed, rows, total).generators(0, index):
            if rng.random() < ONE_LARGE_SHARE:
                scene = sample_scene(self.catalogue.names, rng, count=1, size="large")
            else:
                scene = sample_scene(self.catalogue.names, rng)
            prompt = caption(scene, self.catalogue, rng)[0]
            prompts.append("" if rng.random() < PROMPT_DROPOUT else prompt)
            images.append(draw(scene, self.catalogue))
        return Images(to_pixels(np.stack(images)), prompts=tuple(prompts))


class Emoji:
    """The world of scenes of one or two emoji, which are drawn as they are needed."""

    name = "emoji"
    num_rows = None
    identity: ClassVar[Mapping[str, str]] = {"world": name}
    settings: ClassVar[Mapping[StageName, TrainSettings]] = {
        "autoencoder": TrainSettings(
            max_train_steps=1600,
            train_batch_size=32,
            learning_rate=1e-3,
            optimizer="muon",
            muon_learning_rate=2e-3,
            ema_decay=0.995,
        ),
        "vision": TrainSettings(
            max_train_steps=1400, train_batch_size=64, learning_rate=1.5e-3, optimizer="muon", ema_decay=0.995
        ),
        "vlm": TrainSettings(
            max_train_steps=2000,
            train_batch_size=32,
            learning_rate=1.2e-3,
            optimizer="muon",
            muon_learning_rate=2.4e-3,
            adam_weight_decay=0.05,
            ema_decay=0.995,
        ),
        "flow": TrainSettings(
            max_train_steps=9000,
            train_batch_size=64,
            learning_rate=1.5e-3,
            optimizer="muon",
            lr_warmup_steps=300,
            ema_decay=0.999,
        ),
    }

    def __init__(self, package: Path, seed: int = 0) -> None:
        """Loads the world.

        Args:
            package: the folder that `latte.emoji.package.fetch` made.

        Raises:
            InputError: the folder is not such a package.
        """
        self.catalogue = load_catalogue(package)
        self.seed = seed

    def images(self, model: LatteFlow) -> BusyScenes:
        return BusyScenes(self.catalogue, self.seed)

    def captioned_images(self, model: LatteFlow, *, held_out: bool = False) -> CaptionedScenes:
        return CaptionedScenes(self.catalogue, self.seed + HELD_OUT_SEED * held_out)

    def labelled_images(self, model: LatteFlow) -> LabelledScenes:
        return LabelledScenes(self.catalogue, self.seed)

    def vlm_stage(self, model: LatteFlow, encoder: ConversationEncoder) -> EmojiVlmStage:
        return EmojiVlmStage(model, encoder, EmojiConversations(self.catalogue, self.seed), self.catalogue)

    def flow_stage(self, model: LatteFlow) -> FlowStage:
        return FlowStage(model, self.captioned_images(model))
