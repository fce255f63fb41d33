"""The validation of a run's flow layers: images of fixed prompts, and the loss by expert group and flow time.

Rows, noise and flow times are the same each time, so that lines of `validation.jsonl` differ by the weights only. All
processes compute all of it, because those that share weights must; the main process writes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from latte.training.flow import Batches, FlowBatch, FlowStage
from latte.training.stage import Rows, row_noise
from runtime.errors import InputError, one_line
from runtime.files import write_text
from runtime.images import contact_sheet, save_png

VALIDATION_LOG, VALIDATION_PLOT, SHEETS = "validation.jsonl", "validation.png", "validation"
PROMPTS = 8
"""Number of prompts that are taken from the rows, where none are given."""
PROMPTS_AT_ONCE = 16
SEED = 0
"""Of the rows' noise, and of the first image."""
CURVES = 6
"""Number of steps that a plot shows."""


@dataclass(frozen=True)
class ValidationOptions:
    """What to validate, and when."""

    every: int = 500
    """Number of steps between two validations; the last step is validated too."""
    prompts: tuple[str, ...] = ()
    """What to draw; by default the first captions of the rows."""
    rows: int = 64
    """Number of rows whose loss is computed."""


class FlowValidation:
    """Draws prompts and computes losses with the weights in place.

    Args:
        stage: the training to validate.
        batches: where rows come from.

    Raises:
        InputError: a prompt is too long.
    """

    def __init__(
        self, stage: FlowStage, batches: Batches, run_dir: Path, options: ValidationOptions, accelerator: Accelerator
    ) -> None:
        self.stage, self.run_dir, self.accelerator = stage, run_dir, accelerator
        self.batch = batches.batch(0, range(options.rows), options.rows)
        captions = [prompt for prompt in self.batch.prompts if prompt]
        self.prompts = options.prompts or tuple(captions[:PROMPTS])
        stage.model.tokenize(self.prompts)
        self.times = {group: stage.validation_times(group) for group in stage.groups}
        self._prepared: FlowBatch | None = None

    @torch.no_grad()
    def run(self, step: int) -> dict[str, float]:
        """Writes the images and losses of a step; returns the mean loss of each group."""
        images = self._draw()
        losses = {group: self._losses(group) for group in self.times}
        figures = {f"validation_group_{group}": float(np.mean(values)) for group, values in losses.items()}
        if self.accelerator.is_main_process:
            sheet = contact_sheet(images, self.prompts)
            save_png(sheet, self.run_dir / SHEETS / f"step-{step}.png")
            line = {
                "step": step,
                **figures,
                "times": [time for times in self.times.values() for time in times],
                "losses": [loss for values in losses.values() for loss in values],
            }
            _append(self.run_dir / VALIDATION_LOG, line)
            plot_validation(self.run_dir / VALIDATION_LOG, self.run_dir / VALIDATION_PLOT)
        return figures

    def _draw(self) -> list[Image.Image]:
        images: list[Image.Image] = []
        for start in range(0, len(self.prompts), PROMPTS_AT_ONCE):
            part = self.prompts[start : start + PROMPTS_AT_ONCE]
            images += map(Image.fromarray, self.stage.model.generate(part, seed=SEED + start))
        return images

    def _losses(self, group: int) -> list[float]:
        """Returns the loss of a group at each of its times."""
        model, device = self.stage.model, self.accelerator.device
        if self._prepared is None:
            self._prepared = self.stage.prepare_to_validate(self.batch, device)
        data = self._prepared.data
        rows = Rows(SEED, range(len(data)), len(data))
        noise = row_noise(rows.generators(0), data.shape[1:], device)  # x₀, [B, C, H, W]
        losses = []
        for time in self.times[group]:
            error = self.stage.error_at(model.flow, self._prepared, group, time, noise)
            losses.append(float(error.square().mean()))
        return losses


def read_prompts(values: Sequence[str]) -> tuple[str, ...]:
    """Returns prompts, of which each value is one, or names a file with one on each line.

    Raises:
        InputError: a file cannot be read, or contains none.
    """
    prompts: list[str] = []
    for value in values:
        if not os.path.isfile(value):
            prompts.append(value)
            continue
        try:
            lines = Path(value).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"prompts cannot be read from {value}: {one_line(error)}") from error
        if not any(map(str.strip, lines)):
            raise InputError(f"{value} contains no prompts; write one on each line")
        prompts += [line.strip() for line in lines if line.strip()]
    return tuple(prompts)


def _append(path: Path, line: dict[str, Any]) -> None:
    """Appends a line to a log, without the lines of its step and later ones: a resumed run repeats them."""
    earlier = [kept for kept in _lines(path) if kept["step"] < line["step"]]
    write_text(path, "".join(json.dumps(each) + "\n" for each in (*earlier, line)))


def _lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def plot_validation(log: Path, image: Path) -> None:
    """Plots the losses of groups over the steps, and the losses over flow time at some steps, as a PNG."""
    lines = _lines(log)
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    by_step, by_time = figure.subplots(1, 2)
    steps = [line["step"] for line in lines]
    for name in (name for name in lines[-1] if name.startswith("validation_")):
        label = name.removeprefix("validation_").replace("_", " ")
        by_step.plot(steps, [line.get(name, np.nan) for line in lines], marker=".", label=label)
    by_step.set(xlabel="step", ylabel="validation loss", yscale="log")
    by_step.legend(fontsize="small")
    shown = np.unique(np.linspace(0, len(lines) - 1, CURVES).round().astype(int))
    for place, number in enumerate(shown):
        line = lines[number]
        colour = str(0.75 * (1 - (place + 1) / len(shown)))  # the newest is black
        by_time.plot(line["times"], line["losses"], color=colour, marker=".", label=f"step {line['step']}")
    by_time.set(xlabel="flow time", yscale="log", xlim=(0, 1))
    by_time.legend(fontsize="small")
    for axes in (by_step, by_time):
        axes.grid(alpha=0.3)
    figure.savefig(image, dpi=110)
