"""The states of a run, from which it resumes bit for bit: `checkpoint-<step>/state.safetensors`.

A state holds the parameters, their moving average, the optimiser's moments and the step number. It does not depend on
the number of processes, or on how they share the weights. A state is complete as soon as its folder exists, and older
ones are removed afterwards.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from latte.training.settings import BATCH_SIZES, CHANGEABLE, TrainSettings
from runtime.console import stderr
from runtime.errors import CheckpointError, one_line
from runtime.files import make_writable_folder, permit_like_new

STATE = "state.safetensors"
PREFIX = "checkpoint-"
LEFT = "left-"
"""Begins the name of a state that a run went back from."""


@dataclass(frozen=True)
class Trained:
    """The tensors of a run: what a state holds."""

    parameters: Mapping[str, nn.Parameter]
    average: Mapping[str, Tensor]
    """The parameters' moving average; empty without one."""
    optimizers: Sequence[torch.optim.Optimizer]

    def moments(self, parameter: nn.Parameter) -> dict[str, Any]:
        """Returns what the parameter's optimiser keeps of it; it may be written to."""
        owner = next(
            optimizer
            for optimizer in self.optimizers
            if any(p is parameter for group in optimizer.param_groups for p in group["params"])
        )
        return owner.state[parameter]

    def tensors(self) -> dict[str, Tensor]:
        """Returns all tensors by the names that they have in a state."""
        tensors: dict[str, Tensor] = {f"parameter.{name}": p.detach() for name, p in self.parameters.items()}
        tensors |= {f"average.{name}": value for name, value in self.average.items()}
        for name, p in self.parameters.items():
            for key, value in self.moments(p).items():
                tensors[f"optimizer.{key}.{name}"] = value if isinstance(value, Tensor) else torch.tensor(float(value))
        return tensors


def whole(tensor: Tensor) -> Tensor:
    """Returns a tensor that processes may share, whole and on the CPU. All processes must call it."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().contiguous().cpu()


def placed_like(value: Tensor, like: Tensor) -> Tensor:
    """Returns a whole tensor on the device of another, and shared over processes as that one is."""
    value = value.to(device=like.device, dtype=like.dtype)
    if isinstance(like, DTensor):
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return value


def save_state(run_dir: Path, trained: Trained, metadata: Mapping[str, str], limit: int, main_process: bool) -> Path:
    """Writes the state of the step in `metadata`, and removes all but the `limit` newest.

    All processes must call it, since each has a part of the weights; the main process writes.
    """
    folder = run_dir / f"{PREFIX}{metadata['step']}"
    tensors = {name: whole(tensor) for name, tensor in trained.tensors().items()}
    if main_process:
        temporary = run_dir / f".{folder.name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        make_writable_folder(temporary)
        save_file(tensors, temporary / STATE, dict(metadata))
        permit_like_new(temporary / STATE)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
        for old in states_of(run_dir)[limit:]:
            shutil.rmtree(old)
    return folder


def states_of(run_dir: Path) -> list[Path]:
    """Returns the folders of a run's states, the newest first."""
    found = [path for path in run_dir.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)), reverse=True)


def put_aside_after(run_dir: Path, step: int) -> None:
    """Renames the states after a step, from which a run went back, so that no later run goes on from them."""
    for folder in states_of(run_dir):
        number = folder.name.removeprefix(PREFIX)
        if int(number) > step:
            aside = run_dir / f"{LEFT}{number}"
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(folder, aside)
            stderr.print(f"{folder.name} is {aside.name} now: the run goes on from step {step}", markup=False)


def newest_state(run_dir: Path) -> Path | None:
    """Returns the newest state of a run that can be read, or None if there is no state at all.

    Raises:
        CheckpointError: there are states, but none can be read.
    """
    reason = ""
    for folder in states_of(run_dir):
        try:
            with safe_open(folder / STATE, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            reason = reason or f"{folder / STATE} cannot be read: {one_line(error)}"
            continue
        if reason:
            stderr.print(f"{reason}; going on from {folder}", markup=False, soft_wrap=True)
        return folder
    if reason:
        raise CheckpointError(f"{reason}; delete it to start again")
    return None


def load_state(
    folder: Path,
    trained: Trained,
    stage: str,
    settings: TrainSettings,
    num_processes: int,
    frozen: str,
    identity: Mapping[str, str],
) -> tuple[int, float]:
    """Loads a state into the tensors of a run; returns the number of steps done, and the seconds that they took.

    Args:
        frozen: hash of the frozen parts, see `hash_of_frozen`.
        identity: what else must be as it was, by name.

    Raises:
        CheckpointError: the state cannot be read, or was written with other settings, other frozen parts or other
            parameters.
    """
    path = folder / STATE
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_origin(path, metadata, stage, settings, num_processes, frozen, identity)
            names = set(file.keys())
            shapes = {name: file.get_slice(name).get_shape() for name in names if name.startswith("parameter.")}
            if shapes != {f"parameter.{name}": list(p.shape) for name, p in trained.parameters.items()}:
                raise CheckpointError(f"{path} contains other parameters than the model has; use another folder")
            with torch.no_grad():
                for name, p in trained.parameters.items():
                    p.copy_(placed_like(_finite(file, f"parameter.{name}", path), p))
                    if name in trained.average:
                        trained.average[name].copy_(placed_like(_finite(file, f"average.{name}", path), p))
                    for key in ("step", "exp_avg", "exp_avg_sq", "momentum_buffer"):
                        if f"optimizer.{key}.{name}" in names:
                            value = _finite(file, f"optimizer.{key}.{name}", path)
                            trained.moments(p)[key] = value if key == "step" else placed_like(value, p)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {one_line(error)}") from error
    return int(metadata.get("step", 0)), float(metadata.get("seconds", 0.0))


def _finite(file: Any, name: str, path: Path) -> Tensor:
    """Returns a tensor of a state's file, none of which was written with a value that is not finite."""
    value: Tensor = file.get_tensor(name)
    if not bool(value.isfinite().all()):
        raise CheckpointError(f"{path} is damaged: {name} is not finite; delete it to go on from the state before")
    return value


def _check_origin(
    path: Path,
    metadata: Mapping[str, str],
    stage: str,
    settings: TrainSettings,
    num_processes: int,
    frozen: str,
    identity: Mapping[str, str],
) -> None:
    written = json.loads(metadata.get("settings", "{}"))
    wanted = settings.model_dump(mode="json")
    other = [
        f"{name} was {written.get(name)}, is {value}"
        for name, value in wanted.items()
        if name not in CHANGEABLE and name not in BATCH_SIZES and written.get(name) != value
    ]
    before = json.loads(metadata.get("identity", "{}"))
    other += [
        f"{name} was {before[name]}, is {value}"
        for name, value in identity.items()
        if name in before and before[name] != value
    ]
    rows, rows_now = metadata.get("rows"), str(rows_of_a_step(settings, num_processes))
    if rows != rows_now:
        other.append(f"a step had {rows} rows, has {rows_now}")
    if metadata.get("stage") != stage:
        other.append(f"the stage was {metadata.get('stage')}, is {stage}")
    if settings.max_train_steps < int(metadata.get("step", 0)):
        other.append(f"{metadata['step']} steps are done, {settings.max_train_steps} are asked for")
    if other:
        raise CheckpointError(
            f"{path} was written with other settings: {'; '.join(other)}; use the same settings or another folder"
        )
    if metadata.get("frozen") != frozen:
        raise CheckpointError(
            f"{path} was written with other weights in the parts that are not trained; "
            "restore those parts, or use another folder"
        )


def rows_of_a_step(settings: TrainSettings, num_processes: int) -> int:
    """Returns the number of rows of a step, over all processes and forward passes."""
    return settings.train_batch_size * settings.gradient_accumulation_steps * num_processes


def hash_of_frozen(module: nn.Module, frozen: Sequence[nn.Module]) -> str:
    """Returns the SHA-256 of every tensor that a stage uses and does not train."""
    digest = hashlib.sha256()
    trained = {id(p) for p in module.parameters() if p.requires_grad}
    for part in (module, *frozen):
        named: Iterable[tuple[str, Tensor]] = (*part.named_parameters(), *part.named_buffers())
        for name, tensor in named:
            if id(tensor) not in trained:
                digest.update(f"{name} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
