"""AdamW with the right parameters spared from weight decay, and the moving average of weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from latte.training.settings import TrainSettings


def make_optimizer(parameters: Mapping[str, nn.Parameter], settings: TrainSettings) -> torch.optim.Optimizer:
    """Returns AdamW. Weight decay spares norms, biases and the tables of scales, whose neutral value is not 0."""
    spared = [p for name, p in parameters.items() if p.ndim < 2 or name.endswith("_table")]
    spared_ids = {id(p) for p in spared}
    decayed = [p for p in parameters.values() if id(p) not in spared_ids]
    groups = [
        {"params": decayed, "weight_decay": settings.adam_weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    filled = [group for group in groups if group["params"]]
    betas = (settings.adam_beta1, settings.adam_beta2)
    return torch.optim.AdamW(filled, lr=settings.learning_rate, betas=betas)


def update_average(
    average: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], decay: float, step: int
) -> None:
    """Moves the average towards the parameters after a step, in place."""
    if not average:
        return
    # The window is short at first, so that the average forgets the initial weights.
    decay = min(decay, (1 + step) / (10 + step))
    with torch.no_grad():
        torch._foreach_lerp_(list(average.values()), [parameters[name].detach() for name in average], 1 - decay)


@contextmanager
def averaged(parameters: Mapping[str, nn.Parameter], average: Mapping[str, Tensor]) -> Iterator[None]:
    """Gives parameters their average's values inside the block; exchanges the two, one tensor at a time."""
    _exchange(parameters, average)
    try:
        yield
    finally:
        _exchange(parameters, average)


def _exchange(parameters: Mapping[str, nn.Parameter], average: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in average.items():
            kept = parameters[name].detach().clone()
            parameters[name].copy_(value)
            value.copy_(kept)
