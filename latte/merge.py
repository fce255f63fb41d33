"""Puts together a checkpoint from expert groups that were trained apart, each from the same base."""

from __future__ import annotations

import filecmp
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from latte.checkpoint import (
    copy_from_vlm,
    has_latents_statistics,
    load_checkpoint,
    load_config,
    own_state,
    save_changed,
)
from latte.config import LatteFlowConfig
from latte.model import group_of_weight
from runtime.errors import CheckpointError, one_line

Embeddings = Literal["average", "base"]
"""What to take where experts have different embeddings of latents and time: their average, or the base's."""
CONFIG, WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True)
class Merged:
    """Where the parts of a merged checkpoint come from."""

    sources: tuple[Path, ...]
    """Of each group: the expert that trained it, or the base."""
    embeddings: str
    """"same" in all experts, or what was taken: "average" or "base"."""


def merge(base: Path, experts: Sequence[Path], target: Path, embeddings: Embeddings = "average") -> Merged:
    """Writes a checkpoint in which each group's layers and head are those of the one expert that trained it.

    An expert has trained the groups in which it differs from the base. All groups share the embeddings of latents and
    time; where the experts' are the same, they are taken as they are.

    Args:
        base: the checkpoint that all experts started from.
        experts: checkpoints, each the result of training some groups.
        target: the folder to write, which is replaced if it exists.

    Raises:
        CheckpointError: checkpoints differ in anything else, a group was trained twice, or an expert trained none.
    """
    config = _common_config(base, experts)
    for expert in experts:
        _check_other_files(base, expert)
    weights = {expert: _load(expert) for expert in experts}
    dtype = _common_dtype(weights)
    model = load_checkpoint(base, dtype)
    copy_from_vlm(model.flow, model.vlm)  # as the training of the experts did
    start = {name: weight.detach() for name, weight in own_state(model.flow).items()}

    sources = [base] * config.schedule.num_groups
    for expert, tensors in weights.items():
        for group in _trained_groups(expert, tensors, base, start, config):
            if sources[group] != base:
                raise CheckpointError(
                    f"{sources[group]} and {expert} have both trained group {group}; give one of them"
                )
            sources[group] = expert
    if config.sampling.guidance_distilled and not load_config(base).sampling.guidance_distilled and base in sources:
        raise CheckpointError(
            f"the experts are distilled and group {sources.index(base)} is not; give a checkpoint that "
            "`distill --groups` made for each group"
        )
    taken = "same"
    merged = {}
    for name, weight in start.items():
        owner = group_of_weight(name, config)
        if owner is not None:
            merged[name] = weights.get(sources[owner], start)[name]
            continue
        trained = [tensors[name] for tensors in weights.values()]
        if all(torch.equal(trained[0], other) for other in trained):
            merged[name] = trained[0]
        else:
            taken = embeddings
            merged[name] = weight if embeddings == "base" else torch.stack(trained).float().mean(dim=0)
    save_changed(base, target, dtype, flow=merged, config=config)
    return Merged(tuple(sources), taken)


def _common_config(base: Path, experts: Sequence[Path]) -> LatteFlowConfig:
    """Returns the experts' config: the base's, but for statistics of latents that it lacks, and how students sample."""
    configs = {path: load_config(path) for path in (base, *experts)}
    start, expected = configs[base], configs[experts[0]]
    if not has_latents_statistics(start):
        update = {"latents_mean": expected.latents_mean, "latents_std": expected.latents_std}
        start = start.model_copy(update=update)
    if expected.sampling.guidance_distilled:
        start = start.model_copy(update={"sampling": expected.sampling})
    for path in experts:
        for name, value in configs[path]:
            if value != getattr(start, name):
                raise CheckpointError(
                    f"{path} has another {name} than {base if path == experts[0] else experts[0]}; "
                    "merge experts that were trained from one checkpoint, on the same latents"
                )
    return expected


def _check_other_files(base: Path, expert: Path) -> None:
    """Checks that all files but those of the flow layers are the base's."""
    files = [
        {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {CONFIG, WEIGHTS}
        for folder in (base, expert)
    ]
    for name in sorted(files[0] | files[1]):
        if not all(name in found for found in files) or not filecmp.cmp(base / name, expert / name, shallow=False):
            raise CheckpointError(
                f"{expert} differs from {base} in {name}; merge experts that differ in flow layers only"
            )


def _load(expert: Path) -> dict[str, Tensor]:
    try:
        return load_file(expert / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{expert / WEIGHTS} cannot be read: {one_line(error)}") from error


def _common_dtype(weights: Mapping[Path, Mapping[str, Tensor]]) -> torch.dtype:
    dtypes = {tensor.dtype for tensors in weights.values() for tensor in tensors.values()}
    if len(dtypes) != 1:
        listed = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise CheckpointError(f"the experts have weights of several precisions, {listed}; train them with one")
    return dtypes.pop()


def _trained_groups(
    expert: Path, tensors: Mapping[str, Tensor], base: Path, start: Mapping[str, Tensor], config: LatteFlowConfig
) -> list[int]:
    """Returns the groups in which an expert differs from what it started from."""
    if other := sorted(tensors.keys() ^ start.keys()):
        raise CheckpointError(f"{expert} and {base} do not have the same weights: only one has {other[0]}")
    changed = {
        group_of_weight(name, config) for name, tensor in tensors.items() if not torch.equal(tensor, start[name])
    }
    groups = sorted(group for group in changed if group is not None)
    if not groups:
        raise CheckpointError(f"{expert} has trained no expert group of {base}; give what `train --groups` made")
    return groups
