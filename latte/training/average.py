"""The moving average of weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


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
