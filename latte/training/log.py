"""The log of a run, `log.jsonl`: a line of mean losses every few steps; and its plot."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from runtime.files import write_text

LOG = "log.jsonl"
SMOOTHING = 15
"""Width of the moving mean in a plot of losses, in lines of the log."""
NOT_LOSSES = frozenset({"step", "seconds", "learning_rate", "gradient_norm"})


class RunLog:
    """Collects losses, and appends their means to a log."""

    def __init__(self, path: Path, step: int) -> None:
        """Opens a log, and drops the lines after a step, since a resumed run logs those steps again."""
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            write_text(path, "".join(kept))
        self.path = path
        self._window: dict[str, list[float]] = {}

    def add(self, values: dict[str, float]) -> None:
        """Adds the losses of a step."""
        for name, value in values.items():
            self._window.setdefault(name, []).append(value)

    def write(self, step: int, seconds: float, **also: float) -> dict[str, float]:
        """Appends a line; returns the means of what was added since the line before."""
        means = {name: float(np.mean(values)) for name, values in self._window.items()}
        self._window = {}
        with self.path.open("a", encoding="utf-8") as log:
            log.write(json.dumps({"step": step, "seconds": round(seconds, 1), **means, **also}) + "\n")
        return means


def plot_losses(log: Path, image: Path) -> None:
    """Plots the losses of a log, one curve per name, as a PNG."""
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    # A line has only the losses of its steps: with many groups, not those of every group.
    names = sorted({name for row in rows for name in row} - NOT_LOSSES, key=lambda name: (len(name), name))
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
    title = f"{log.parent.name}, {rows[-1]['seconds'] / 60:.0f} minutes"
    axes.set(xlabel="step", ylabel="loss", yscale="log", title=title)
    axes.grid(alpha=0.3)
    if len(names) > 1:
        axes.legend(ncols=1 + len(names) // 12, fontsize="small")
    figure.savefig(image, dpi=110)
