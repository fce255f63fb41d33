"""What a model can be trained on: a world that is drawn, such as `shapes`, or a data set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol

from latte.model import LatteFlow
from latte.training.conversations import ConversationEncoder
from latte.training.flow import Batches, FlowStage
from latte.training.settings import TrainSettings
from latte.training.vision import LabelledImages
from latte.training.vlm import VlmStage
from runtime.errors import InputError

StageName = Literal["autoencoder", "vision", "vlm", "flow"]
HELD_OUT_SEED = 1_000_003
"""Added to the seed of training for scenes that validate it."""
STAGES: tuple[StageName, ...] = ("autoencoder", "vision", "vlm", "flow")
"""The stages in the order in which a model is trained from nothing. A pretrained VLM and autoencoder need the last."""


class World(Protocol):
    """A source of batches for every stage that it supports, all of one seed."""

    @property
    def name(self) -> str:
        """What to call it in messages."""

    @property
    def identity(self) -> Mapping[str, str]:
        """How rows become batches, which a resumed run must not change. Rows may be added meanwhile."""

    @property
    def settings(self) -> Mapping[StageName, TrainSettings]:
        """The settings of each stage that it supports, for who says nothing else."""

    @property
    def num_rows(self) -> int | None:
        """Number of images of an epoch; None for a stream, and for scenes that are drawn without end."""

    def images(self, model: LatteFlow) -> Batches:
        """Returns images for the autoencoder."""

    def captioned_images(self, model: LatteFlow, *, held_out: bool = False) -> Batches:
        """Returns images with prompts, as pixels: what the flow layers are trained on, or what validates them."""

    def labelled_images(self, model: LatteFlow) -> LabelledImages:
        """Returns images with labels for the vision tower."""

    def vlm_stage(self, model: LatteFlow, encoder: ConversationEncoder) -> VlmStage:
        """Returns the training of the language model."""

    def flow_stage(self, model: LatteFlow) -> FlowStage:
        """Returns the training of the flow layers of all groups."""


def settings_of(world: World, stage: StageName) -> TrainSettings:
    """Returns the settings of a world's stage.

    Raises:
        InputError: the world does not support the stage.
    """
    if stage not in world.settings:
        supported = ", ".join(world.settings)
        needs = '; that needs a column `questions` of [{"question": ..., "answer": ...}]' if stage == "vlm" else ""
        raise InputError(f"{world.name} cannot train the stage {stage}{needs}; it supports: {supported}")
    return world.settings[stage]
