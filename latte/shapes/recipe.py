"""The training recipe of `shapes`: what its stages are trained on, their settings, and the untrained model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from latte.checkpoint import assemble
from latte.model import LatteFlow
from latte.shapes.autoencoder import BusyScenes, small_autoencoder
from latte.shapes.flow import ScenePairs, ShapesFlowStage
from latte.shapes.vision import LabelledScenes
from latte.shapes.vlm import ShapesConversations, small_image_processor, small_vlm, train_tokenizer
from latte.training.conversations import ConversationEncoder
from latte.training.settings import TrainSettings
from latte.training.vlm import VlmStage
from latte.training.world import HELD_OUT_SEED, StageName
from runtime.flow_time import SamplingDefaults

NUM_GROUPS = 4
"""Number of expert groups, K."""
MAX_PROMPT_TOKENS = 128
GUIDANCE_SCALE = 2.0
"""The default of the trained model: 3 gets more sizes wrong (docs/shapes.md)."""
LATENT_SIZE = (8, 8)
"""Height and width in latents."""


def untrained(seed: int = 0) -> tuple[LatteFlow, Qwen2VLImageProcessorPil]:
    """Builds the model before its training, with its image processor. The tokenizer is trained."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer()
    model = assemble(
        small_vlm(tokenizer),
        small_autoencoder(),
        tokenizer,
        num_groups=NUM_GROUPS,
        latent_size=LATENT_SIZE,
        max_prompt_tokens=MAX_PROMPT_TOKENS,
        sampling=SamplingDefaults(guidance_scale=GUIDANCE_SCALE),
    )
    return model, small_image_processor()


class Shapes:
    """The world of scenes of one or two shapes, which are drawn as they are needed."""

    name = "shapes"
    num_rows = None
    identity: ClassVar[Mapping[str, str]] = {"world": name}
    settings: ClassVar[Mapping[StageName, TrainSettings]] = {
        "autoencoder": TrainSettings(max_train_steps=6000, train_batch_size=32, learning_rate=1e-3, ema_decay=0.995),
        "vision": TrainSettings(max_train_steps=800, train_batch_size=64, learning_rate=1.5e-3, optimizer="muon"),
        "vlm": TrainSettings(
            max_train_steps=5000,
            train_batch_size=32,
            learning_rate=1.2e-3,
            optimizer="muon",
            muon_learning_rate=2.4e-3,
            lr_warmup_steps=150,
            adam_weight_decay=0.05,
            ema_decay=0.995,
        ),
        "flow": TrainSettings(
            max_train_steps=23000,
            train_batch_size=64,
            learning_rate=1.5e-3,
            optimizer="muon",
            lr_warmup_steps=400,
            ema_decay=0.999,
        ),
    }

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def images(self, model: LatteFlow) -> BusyScenes:
        return BusyScenes(self.seed)

    def captioned_images(self, model: LatteFlow, *, held_out: bool = False) -> ScenePairs:
        return ScenePairs(self.seed + HELD_OUT_SEED * held_out)

    def labelled_images(self, model: LatteFlow) -> LabelledScenes:
        return LabelledScenes(self.seed)

    def vlm_stage(self, model: LatteFlow, encoder: ConversationEncoder) -> VlmStage:
        return VlmStage(model.vlm, encoder, ShapesConversations(self.seed))

    def flow_stage(self, model: LatteFlow) -> ShapesFlowStage:
        return ShapesFlowStage(model, self.seed)
