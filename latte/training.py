"""The training loop of all stages: seeded, and resumable from one state file.

All randomness of a step derives from `(seed, step)`. The parameters, their moving average, the optimiser's moments and
the step number are therefore enough to resume a run bit for bit. They are saved as one safetensors file, which is
replaced atomically.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict, Field
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from runtime.console import stderr
from runtime.errors import CheckpointError
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

    def losses(self, step: int, rng: np.random.Generator) -> Iterator[tuple[str, Tensor]]:
        """Yields the scalar losses of one step by name. Each is back-propagated as soon as it is yielded."""


def train(stage: Stage, settings: TrainSettings, run_dir: Path) -> None:
    """Trains a stage for `settings.steps` steps, resuming from the state in `run_dir` if there is one.

    With `ema_decay`, the stage's module has the averaged weights at the end. Writes `<stage>.safetensors`, the state,
    and `<stage>.jsonl`, a line of mean losses every 20 steps, into `run_dir`.

    Raises:
        CheckpointError: the state was written with other settings, or has other parameters.
        FloatingPointError: a loss is not finite.
    """
    make_writable_folder(run_dir)
    module = stage.trainable()
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=settings.learning_rate, betas=(0.9, settings.beta2), weight_decay=settings.weight_decay
    )
    average = {name: p.detach().clone() for name, p in parameters.items()} if settings.ema_decay else {}
    state_file = run_dir / f"{stage.name}.safetensors"
    log_file = run_dir / f"{stage.name}.jsonl"
    step, seconds_before = 0, 0.0
    if state_file.exists():
        step, seconds_before = _load_state(state_file, stage.name, settings, parameters, average, optimizer)
        _cut_log(log_file, step)
    started = last_save = time.monotonic()

    def save() -> None:
        seconds = seconds_before + time.monotonic() - started
        _save_state(state_file, stage.name, settings, step, seconds, parameters, average, optimizer)

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
            raise FloatingPointError(f"{stage.name}: {name} is {value} at step {step}; lower the learning rate")
    torch.nn.utils.clip_grad_norm_(parameters.values(), settings.clip_norm)
    optimizer.step()
    return values


def _update_average(average: dict[str, Tensor], parameters: dict[str, nn.Parameter], decay: float, step: int) -> None:
    if not average:
        return
    # The window is short at first, so that the average forgets the initial weights.
    decay = min(decay, (1 + step) / (10 + step))
    with torch.no_grad():
        torch._foreach_lerp_(list(average.values()), [parameters[name].detach() for name in average], 1 - decay)


def _save_state(
    path: Path,
    stage_name: str,
    settings: TrainSettings,
    step: int,
    seconds: float,
    parameters: dict[str, nn.Parameter],
    average: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    tensors = {f"parameter.{name}": p.detach() for name, p in parameters.items()}
    tensors |= {f"average.{name}": value for name, value in average.items()}
    for name, p in parameters.items():
        for key, value in optimizer.state[p].items():
            tensors[f"optimizer.{key}.{name}"] = value if isinstance(value, Tensor) else torch.tensor(float(value))
    metadata = {
        "stage": stage_name,
        "step": str(step),
        "seconds": f"{seconds:.1f}",
        "settings": _identity(settings),
    }
    temporary = path.with_suffix(".tmp")
    save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, temporary, metadata)
    os.replace(temporary, path)


def _load_state(
    path: Path,
    stage_name: str,
    settings: TrainSettings,
    parameters: dict[str, nn.Parameter],
    average: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> tuple[int, float]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("stage") != stage_name or metadata.get("settings") != _identity(settings):
            raise CheckpointError(
                f"{path} was written with other settings ({metadata.get('settings')}) than this run's "
                f"({_identity(settings)}); use the same settings or another folder"
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
    return int(metadata["step"]), float(metadata["seconds"])


def _identity(settings: TrainSettings) -> str:
    """Returns, as JSON, the settings that affect the result: all but the device and the interval between saves."""
    return settings.model_dump_json(exclude={"device", "save_every_seconds"})


def _cut_log(path: Path, step: int) -> None:
    """Drops the lines that were logged after the last save, since the resumed run logs those steps again."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_text(path, "".join(kept))


def plot_losses(log: Path, image: Path) -> None:
    """Plots the losses of a stage's log, `<stage>.jsonl`, one curve per name, as a PNG."""
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    names = [name for name in rows[-1] if name not in ("step", "seconds")]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    steps = np.array([row["step"] for row in rows])
    width = min(SMOOTHING, len(rows))
    for name in names:
        values = np.array([row[name] for row in rows])
        smooth = np.convolve(values, np.ones(width) / width, mode="valid")
        (line,) = axes.plot(steps, values, alpha=0.25, linewidth=0.8)
        middle = np.convolve(steps, np.ones(width) / width, mode="valid")
        axes.plot(middle, smooth, color=line.get_color(), label=name.replace("_", " "))
    axes.set(xlabel="step", ylabel="loss", yscale="log", title=f"{log.stem}, {rows[-1]['seconds'] / 60:.0f} minutes")
    axes.grid(alpha=0.3)
    if len(names) > 1:
        axes.legend()
    figure.savefig(image, dpi=110)
