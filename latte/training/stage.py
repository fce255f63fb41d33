"""What the training loop knows of a stage: a module to train, batches, and losses.

A step has a number of rows, which processes and forward passes share out. All randomness of a row derives from the
seed, the step and the row's number. A run of two processes with eight rows each therefore sees what one process with
sixteen rows sees, and a run can be resumed at any step without a state of its random generators.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Rows:
    """The rows of one forward pass of one process, and what is random about them."""

    seed: int
    numbers: range
    """Their numbers among the rows of the step."""
    total: int
    """Number of rows of the step."""

    def generators(self, *key: int) -> list[np.random.Generator]:
        """Returns a random generator for each row, which depends on the seed, the key and the row's number only."""
        return [np.random.default_rng([self.seed, *key, number]) for number in self.numbers]


def row_noise(generators: Sequence[np.random.Generator], shape: Sequence[int], device: torch.device | str) -> Tensor:
    """Draws x₀ ~ N(0, I) with a generator for each row, `[B, *shape]` float32."""
    rows = np.stack([generator.standard_normal(tuple(shape), np.float32) for generator in generators])
    return torch.from_numpy(rows).to(device)


class Stage(Protocol):
    """A stage, as the training loop sees it."""

    @property
    def name(self) -> str:
        """Its name: the part of the model, and what a resumed run must share besides settings."""

    @property
    def steps_per_batch(self) -> int:
        """Number of consecutive steps that use the same batch."""

    @property
    def module(self) -> nn.Module:
        """The module to train: its parameters with `requires_grad`. `losses` calls it as it is given, maybe wrapped."""

    @property
    def frozen(self) -> Sequence[nn.Module]:
        """The modules that the losses use and that are not trained; a resumed run must have the same."""

    def batch(self, index: int, rows: Rows) -> Any:
        """Returns rows of the batch of this index, on the CPU. Worker processes may call it, in any order."""

    def prepare(self, batch: Any, device: torch.device) -> Any:
        """Moves a batch to a device, and computes there what needs no gradient and serves all steps of the batch."""

    def weight(self, prepared: Any) -> float:
        """Returns the number of equal parts whose mean the losses are: rows, or tokens."""

    def losses(self, module: nn.Module, prepared: Any, step: int, rows: Rows) -> dict[str, Tensor]:
        """Returns the scalar losses of one step by name; their sum is minimised."""
