"""The training loop of all stages: seeded, and resumable from one state file.

All randomness of a step derives from `(seed, step)`. The parameters, their moving average, the optimiser's moments and
the step number are therefore enough to resume a run bit for bit. They are saved as one safetensors file, which is
replaced atomically; the state before it is kept too.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict, Field
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from runtime.console import stderr
from runtime.errors import CheckpointError, TrainingError, one_line
from runtime.files import make_writable_folder, write_text

SMOOTHING = 15
"""Width of the moving mean in a plot of losses, in lines of the log."""


class TrainSettings(BaseModel):
    """Settings of the training of one stage.

    Raises:
        ValidationError: a value is out of range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    warmup_steps: int = Field(default=100, ge=0)
    final_learning_rate: float = Field(default=0.02, ge=0, le=1, description="at the last step, as a share of the peak")
    weight_decay: float = Field(default=0.01, ge=0)
    beta2: float = Field(default=0.99, gt=0, lt=1)
    clip_norm: float = Field(default=1.0, gt=0)
    ema_decay: float = Field(default=0.0, ge=0, lt=1, description="of the weights' moving average; 0 disables it")
    seed: int = Field(default=0, ge=0)
    precision: str = Field(default="fp32", pattern="^(fp32|bf16)$", description="bf16 is autocast; weights stay fp32")
    device: str = "cpu"
    save_every_seconds: float = Field(default=120.0, gt=0)

    def learning_rate_at(self, step: int) -> float:
        """Returns a step's learning rate: linear warm-up, then cosine decay to `final_learning_rate` of the peak."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        floor = self.final_learning_rate
        return self.learning_rate * (floor + (1 - floor) * 0.5 * (1 + float(np.cos(np.pi * progress))))


class Stage(Protocol):
    """A stage, as the training loop sees it."""

    name: str

    def trainable(self) -> nn.Module:
        """Returns the module to train: its parameters with `requires_grad`."""

    def frozen(self) -> Sequence[nn.Module]:
        """Returns the modules that the losses use and that are not trained; a resumed run must have the same."""

    def losses(self, step: int, rng: np.random.Generator) -> Iterator[tuple[str, Tensor]]:
        """Yields the scalar losses of one step by name. Each is back-propagated as soon as it is yielded."""


def train(stage: Stage, settings: TrainSettings, run_dir: Path) -> None:
    """Trains a stage for `settings.steps` steps, resuming from the state in `run_dir` if there is one.

    More steps than before extend a run. With `ema_decay`, the stage's module has the averaged weights at the end.
    Writes into `run_dir`: `<stage>.safetensors`, the state; `<stage>.previous.safetensors`, the state before it; and
    `<stage>.jsonl`, a line of mean losses every 20 steps.

    Raises:
        CheckpointError: the state was written with other settings or other frozen parts, has other parameters, or
            cannot be read.
        TrainingError: a loss or a gradient is not finite. The parameters are those of the step before.
    """
    make_writable_folder(run_dir)
    module = stage.trainable()
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    optimizer = _optimizer(parameters, settings)
    average = {name: p.detach().clone() for name, p in parameters.items()} if settings.ema_decay else {}
    state_file = run_dir / f"{stage.name}.safetensors"
    previous_file = run_dir / f"{stage.name}.previous.safetensors"
    log_file = run_dir / f"{stage.name}.jsonl"
    frozen = _hash_of_frozen(stage)
    step, seconds_before = 0, 0.0
    if (newest := _newest_readable(state_file, previous_file)) is not None:
        step, seconds_before = _load_state(newest, stage.name, settings, frozen, parameters, average, optimizer)
        _cut_log(log_file, step)
    started = last_save = time.monotonic()

    def save() -> None:
        seconds = seconds_before + time.monotonic() - started
        metadata = {
            "stage": stage.name,
            "step": str(step),
            "seconds": f"{seconds:.1f}",
            "settings": settings.model_dump_json(),
            "frozen": frozen,
        }
        temporary = state_file.with_suffix(".tmp")
        save_file(_state_of(parameters, average, optimizer), temporary, metadata)
        if state_file.exists():
            os.replace(state_file, previous_file)
        os.replace(temporary, state_file)

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    with Progress(*columns, console=stderr) as progress, log_file.open("a", encoding="utf-8") as log:
        task = progress.add_task(f"train {stage.name}", total=settings.steps, completed=step, loss="")
        window: dict[str, list[float]] = {}
        while step < settings.steps:
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate_at(step)
            for name, value in _step(stage, settings, step, optimizer, parameters):
                window.setdefault(name, []).append(value)
            _update_average(average, parameters, settings.ema_decay, step)
            step += 1
            if step % 20 == 0 or step == settings.steps:
                means = {name: float(np.mean(values)) for name, values in window.items()}
                window = {}
                seconds = round(seconds_before + time.monotonic() - started, 1)
                log.write(json.dumps({"step": step, "seconds": seconds, **means}) + "\n")
                log.flush()
                shown = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
                progress.update(task, completed=step, loss=shown)
            if time.monotonic() - last_save > settings.save_every_seconds:
                save()
                last_save = time.monotonic()
    save()
    with torch.no_grad():
        for name, averaged in average.items():
            parameters[name].copy_(averaged)


def _step(
    stage: Stage,
    settings: TrainSettings,
    step: int,
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, nn.Parameter],
) -> list[tuple[str, float]]:
    torch.manual_seed(settings.seed * 1_000_003 + step)
    rng = np.random.default_rng([settings.seed, step])
    values = []
    optimizer.zero_grad(set_to_none=True)
    device_type = torch.device(settings.device).type
    # No autocast cache: a bf16 copy of a weight that no-grad code cached would be reused without gradients.
    with torch.autocast(device_type, torch.bfloat16, enabled=settings.precision == "bf16", cache_enabled=False):
        for name, loss in stage.losses(step, rng):
            loss.backward()
            values.append((name, float(loss.detach())))
    for name, value in values:
        if not np.isfinite(value):
            raise TrainingError(f"{stage.name}: {name} is {value} at step {step}; lower the learning rate")
    norm = float(torch.nn.utils.clip_grad_norm_(parameters.values(), settings.clip_norm))
    if not np.isfinite(norm):
        raise TrainingError(f"{stage.name}: the gradient's norm is {norm} at step {step}; lower the learning rate")
    optimizer.step()
    return values


def _update_average(average: dict[str, Tensor], parameters: dict[str, nn.Parameter], decay: float, step: int) -> None:
    if not average:
        return
    # The window is short at first, so that the average forgets the initial weights.
    decay = min(decay, (1 + step) / (10 + step))
    with torch.no_grad():
        torch._foreach_lerp_(list(average.values()), [parameters[name].detach() for name in average], 1 - decay)


def _optimizer(parameters: Mapping[str, nn.Parameter], settings: TrainSettings) -> torch.optim.Optimizer:
    """Returns AdamW. Weight decay spares norms, biases and the tables of scales, whose neutral value is not 0."""
    spared = [p for name, p in parameters.items() if p.ndim < 2 or name.endswith("_table")]
    spared_ids = {id(p) for p in spared}
    groups = [
        {"params": [p for p in parameters.values() if id(p) not in spared_ids], "weight_decay": settings.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    filled = [group for group in groups if group["params"]]
    return torch.optim.AdamW(filled, lr=settings.learning_rate, betas=(0.9, settings.beta2))


def _hash_of_frozen(stage: Stage) -> str:
    """Returns the SHA-256 of every tensor that a stage uses and does not train."""
    digest = hashlib.sha256()
    trained = {id(p) for p in stage.trainable().parameters() if p.requires_grad}
    for module in (stage.trainable(), *stage.frozen()):
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if id(tensor) not in trained:
                digest.update(f"{name} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _state_of(
    parameters: Mapping[str, nn.Parameter], average: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    tensors = {f"parameter.{name}": p.detach() for name, p in parameters.items()}
    tensors |= {f"average.{name}": value for name, value in average.items()}
    for name, p in parameters.items():
        for key, value in optimizer.state[p].items():
            tensors[f"optimizer.{key}.{name}"] = value if isinstance(value, Tensor) else torch.tensor(float(value))
    return {name: value.contiguous().cpu() for name, value in tensors.items()}


def _newest_readable(state_file: Path, previous_file: Path) -> Path | None:
    """Returns the newest state that can be read, or None if there is no state at all.

    Raises:
        CheckpointError: there are states, but none can be read.
    """
    reason = ""
    for path in (state_file, previous_file):
        if path.exists():
            try:
                with safe_open(path, framework="pt"):
                    pass
            except (OSError, SafetensorError) as error:
                reason = reason or f"{path} cannot be read: {one_line(error)}"
                continue
            if reason:
                stderr.print(f"{reason}; going on from {path}", highlight=False, soft_wrap=True)
            return path
    if reason:
        raise CheckpointError(f"{reason}; delete it to start again")
    return None


def _load_state(
    path: Path,
    stage_name: str,
    settings: TrainSettings,
    frozen: str,
    parameters: dict[str, nn.Parameter],
    average: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> tuple[int, float]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        written = json.loads(metadata.get("settings", "{}"))
        wanted = settings.model_dump(mode="json")
        other = [
            f"{name} was {written.get(name)}, is {value}"
            for name, value in wanted.items()
            if name not in ("steps", "device", "save_every_seconds") and written.get(name) != value
        ]
        step = int(metadata.get("step", 0))
        if metadata.get("stage") != stage_name:
            other.append(f"the stage was {metadata.get('stage')}, is {stage_name}")
        if settings.steps < step:
            other.append(f"{step} steps are done, {settings.steps} are asked for")
        if other:
            raise CheckpointError(
                f"{path} was written with other settings: {'; '.join(other)}; use the same settings or another folder"
            )
        if metadata.get("frozen") != frozen:
            raise CheckpointError(
                f"{path} was written with other weights in the parts that are not trained; "
                "restore those parts, or use another folder"
            )
        names = set(file.keys())
        expected = {f"parameter.{name}" for name in parameters}
        found = {name for name in names if name.startswith("parameter.")}
        if found != expected:
            raise CheckpointError(f"{path} contains other parameters than the model has; use another folder")
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(file.get_tensor(f"parameter.{name}"))
                if name in average:
                    average[name].copy_(file.get_tensor(f"average.{name}"))
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    if f"optimizer.{key}.{name}" in names:
                        value = file.get_tensor(f"optimizer.{key}.{name}")
                        optimizer.state[p][key] = value if key == "step" else value.to(p.device)
    return step, float(metadata.get("seconds", 0.0))


def _cut_log(path: Path, step: int) -> None:
    """Drops the lines that were logged after the last save, since the resumed run logs those steps again."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_text(path, "".join(kept))


def plot_losses(log: Path, image: Path) -> None:
    """Plots the losses of a stage's log, `<stage>.jsonl`, one curve per name, as a PNG."""
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    # A line has only the losses of its steps: with many groups, not those of every group.
    names = sorted({name for row in rows for name in row} - {"step", "seconds"}, key=lambda name: (len(name), name))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name in names:
        steps = np.array([row["step"] for row in rows if name in row])
        values = np.array([row[name] for row in rows if name in row])
        width = min(SMOOTHING, len(values))
        (line,) = axes.plot(steps, values, alpha=0.25, linewidth=0.8)
        mean, middle = (np.convolve(x, np.ones(width) / width, mode="valid") for x in (values, steps))
        axes.plot(middle, mean, color=line.get_color(), label=name.replace("_", " "))
    axes.set(xlabel="step", ylabel="loss", yscale="log", title=f"{log.stem}, {rows[-1]['seconds'] / 60:.0f} minutes")
    axes.grid(alpha=0.3)
    if len(names) > 1:
        axes.legend(ncols=1 + len(names) // 12, fontsize="small")
    figure.savefig(image, dpi=110)
