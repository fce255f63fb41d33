"""The settings of a training run; their names are those of diffusers' training scripts."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

CHANGEABLE = frozenset(
    {
        "max_train_steps",
        "checkpointing_steps",
        "checkpointing_seconds",
        "checkpoints_total_limit",
        "logging_steps",
        "dataloader_num_workers",
        "gradient_checkpointing",
        "sharding",
        "compile",
        "cpu",
    }
)
"""Settings that a resumed run may change, since its results do not depend on them beyond rounding."""
BATCH_SIZES = ("train_batch_size", "gradient_accumulation_steps")
"""Settings of which a resumed run may change each, but not the number of rows of a step."""


class TrainSettings(BaseModel):
    """Settings of the training of one stage.

    Raises:
        ValidationError: a value is out of range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_train_steps: int = Field(ge=1)
    train_batch_size: int = Field(ge=1, description="rows of one process in one forward pass")
    gradient_accumulation_steps: int = Field(default=1, ge=1, description="forward passes whose gradients are averaged")
    learning_rate: float = Field(gt=0, description="the peak")
    optimizer: Literal["adamw", "muon"] = Field(default="adamw", description="muon: of the matrices inside layers")
    muon_learning_rate: float = Field(default=3e-3, gt=0, description="the peak for what Muon trains")
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    lr_warmup_steps: int = Field(default=100, ge=0)
    final_learning_rate: float = Field(default=0.02, ge=0, le=1, description="at the last step, as a share of the peak")
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.99, ge=0, lt=1)
    adam_weight_decay: float = Field(default=0.01, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    ema_decay: float = Field(default=0.0, ge=0, lt=1, description="of the weights' moving average; 0 disables it")
    seed: int = Field(default=0, ge=0)
    mixed_precision: Literal["no", "bf16"] = Field(default="no", description="bf16 is autocast; weights stay fp32")
    gradient_checkpointing: bool = Field(default=False, description="compute activations again instead of keeping them")
    compile: bool = Field(default=False, description="compile layers with torch.compile, once at the start")
    sharding: Literal["none", "fsdp2"] = Field(default="none", description="fsdp2 splits the weights over processes")
    cpu: bool = Field(default=False, description="train on the CPU even where there is a GPU")
    dataloader_num_workers: int = Field(default=0, ge=0, description="processes that prepare batches; 0: this one")
    logging_steps: int = Field(default=20, ge=1)
    checkpointing_steps: int = Field(default=500, ge=1)
    checkpointing_seconds: float = Field(default=300.0, gt=0, description="save at least this often")
    checkpoints_total_limit: int = Field(
        default=2, ge=2, description="a state that is kept beside the newest is safety"
    )

    def share_of_learning_rate_at(self, step: int) -> float:
        """Returns the share of the peaks at a step: linear warm-up, then the decay to `final_learning_rate`."""
        if step < self.lr_warmup_steps:
            return (step + 1) / self.lr_warmup_steps
        progress = (step - self.lr_warmup_steps) / max(1, self.max_train_steps - self.lr_warmup_steps)
        remaining = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}
        floor = self.final_learning_rate
        return floor + (1 - floor) * remaining[self.lr_scheduler]
