"""The optimisers of a stage: AdamW, and Muon for the matrices inside layers.

Muon (https://kellerjordan.github.io/posts/muon) makes the update of a matrix orthogonal. Its step costs more and it
needs far fewer of them; it keeps one moment, AdamW two.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from latte.training.settings import TrainSettings

ENDS = ("embed", "head", "table")
"""Parts of the names of matrices at the two ends of a model, and of tables of scales: these stay with AdamW."""


def make_optimizers(
    parameters: Mapping[str, nn.Parameter], settings: TrainSettings
) -> tuple[torch.optim.Optimizer, ...]:
    """Returns the optimisers; the groups of parameters have their peak learning rate as `initial_lr`.

    Weight decay spares norms, biases and the tables of scales, whose neutral value is not 0.
    """
    matrices = {name: p for name, p in parameters.items() if settings.optimizer == "muon" and is_inner(name, p)}
    others = {name: p for name, p in parameters.items() if name not in matrices}
    decayed = [p for name, p in others.items() if p.ndim >= 2 and not name.endswith("_table")]
    spared = [p for name, p in others.items() if p.ndim < 2 or name.endswith("_table")]
    groups = [
        {"params": decayed, "weight_decay": settings.adam_weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if filled := [group for group in groups if group["params"]]:
        betas = (settings.adam_beta1, settings.adam_beta2)
        optimizers.append(torch.optim.AdamW(filled, lr=settings.learning_rate, betas=betas))
    if matrices:
        optimizers.append(
            torch.optim.Muon(
                matrices.values(),
                lr=settings.muon_learning_rate,
                weight_decay=settings.adam_weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return tuple(optimizers)


def is_inner(name: str, parameter: Tensor) -> bool:
    """Returns whether Muon may train a parameter of this name."""
    return parameter.ndim == 2 and not any(end in name for end in ENDS)
