"""The training loop that all stages share: resumable, seeded, one file of state.

Everything random in a step is drawn from `(seed, step)`, so the state that resumes a run bit for bit
is parameters, optimiser moments, their moving average and the step number: one safetensors file,
replaced in one rename.
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
"""Lines of the log in a moving mean."""


class TrainSettings(BaseModel):
    """How one stage is trained. A value that cannot work raises where the settings are made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    warmup_steps: int = Field(default=100, ge=0)
    final_learning_rate: float = Field(default=0.02, ge=0, le=1, description="share of the learning rate at the end")
    weight_decay: float = Field(default=0.01, ge=0)
    beta2: float = Field(default=0.99, gt=0, lt=1)
    clip_norm: float = Field(default=1.0, gt=0)
    ema_decay: float = Field(default=0.0, ge=0, lt=1, description="0 keeps no moving average")
    seed: int = Field(default=0, ge=0)
    precision: str = Field(default="fp32", pattern="^(fp32|bf16)$", description="bf16 is autocast; weights stay fp32")
    device: str = "cpu"
    save_every_seconds: float = Field(default=120.0, gt=0)

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then cosine decay to `final_learning_rate` of the peak."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        floor = self.final_learning_rate
        return self.learning_rate * (floor + (1 - floor) * 0.5 * (1 + float(np.cos(np.pi * progress))))


class Stage(Protocol):
    """What the loop needs of a stage."""

    name: str

    def trainable(self) -> nn.Module:
        """The module whose parameters with `requires_grad` are trained."""

    def losses(self, step: int, rng: np.random.Generator) -> Iterator[tuple[str, Tensor]]:
        """Named scalar losses of one step. Each is back-propagated as it comes; the names go into the log."""


def train(stage: Stage, settings: TrainSettings, run_dir: Path) -> None:
    """Trains `stage` to `settings.steps`, from the state in `run_dir` if there is one.

    Leaves the moving average in the stage's module if there is one. Writes `<stage>.safetensors`
    (state) and `<stage>.jsonl` (a line of losses every few steps) into `run_dir`.

    Raises:
        CheckpointError: the state found was written with other settings, or is not this stage's.
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
    # `cache_enabled=False`: a cached bf16 copy of a weight would outlive the no-grad code that made it.
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
    # A short average at the start, so that it does not remember the initial weights.
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
                f"{path} was written with other settings ({metadata.get('settings')}) than asked for "
                f"({_identity(settings)}); train with those, or into another folder"
            )
        names = set(file.keys())
        expected = {f"parameter.{name}" for name in parameters}
        found = {name for name in names if name.startswith("parameter.")}
        if found != expected:
            raise CheckpointError(f"{path} holds other parameters than the model; train into another folder")
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
    """The settings that decide the result; where it runs and how often it saves do not."""
    return settings.model_dump_json(exclude={"device", "save_every_seconds"})


def _cut_log(path: Path, step: int) -> None:
    """Drops the lines that a killed run logged after its last save, since they are about to come again."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_text(path, "".join(kept))


def plot_losses(log: Path, image: Path) -> None:
    """Draws the losses of a stage's log (`<stage>.jsonl`), one curve for each name, into a PNG."""
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
