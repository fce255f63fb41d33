"""Loss curves as pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

SMOOTHING = 15
"""Lines of the log in a moving mean."""


def plot_losses(log: Path, picture: Path) -> None:
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
    figure.savefig(picture, dpi=110)
