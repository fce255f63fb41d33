"""What `latte-flow bench generation` measured, and the calls that follow from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from export.benchmarks.limits import Limits, Work
from export.benchmarks.timing import Turns
from latte.paper import COUNTERPARTS, PUBLISHED

IMAGE_TOKENS = (576, 64)
"""A 24x24 grid, as Janus writes, and as many as the flow has latents."""
STEPS = (10, 20, 40)
"""Numbers of sampling steps of calls without the decoder."""
STEPS_OF_WHOLE_CALLS = 20


@dataclass
class GenerationReport:
    """Everything that one run measured."""

    size: str
    precision: str
    step: dict[str, dict[int, Turns[object]]] = field(default_factory=dict)
    """Times of a sampling step with guidance, by side and number of images."""
    one_row: dict[str, dict[int, Turns[object]]] = field(default_factory=dict)
    """Times of a sampling step with guidance built in, by side and number of images."""
    decoder: dict[int, Turns[object]] = field(default_factory=dict)
    """Times of decoding the images, by their number."""
    groups: int = 1
    """Number of expert groups."""
    prefix: dict[int, Turns[object]] = field(default_factory=dict)
    """Times of encoding the prompts, by number of images."""
    token: dict[int, dict[int, Turns[object]]] = field(default_factory=dict)
    """Times of one token of the autoregressive twin, by number of images and of tokens before it."""
    limits: list[Limits] = field(default_factory=list)
    """Rates of the device, measured or of its data sheet."""
    work: dict[str, dict[int, Work]] = field(default_factory=dict)
    """What a step, or a token, does at least, by side and number of images."""
    active: dict[str, int] = field(default_factory=dict)
    """Parameters of the flow model that a step reads, by side."""
    notes: list[str] = field(default_factory=list)

    def add_steps(self, images: int, turns: Mapping[str, Turns[object]]) -> None:
        """Adds the times of a sampling step for a number of images."""
        for side, times in turns.items():
            self.step.setdefault(side, {})[images] = times

    def of_limits(self, limits: Limits) -> dict[str, dict[int, float]]:
        """Returns the shortest time that a device's rates allow, relative to the measured one, by side and images."""
        last = {count: times[max(times)] for count, times in self.token.items()}
        measured = {side: self.step.get(side, last) for side in self.work}
        return {
            side: {count: work.seconds(limits) / measured[side][count].median for count, work in of_side.items()}
            for side, of_side in self.work.items()
        }

    def beside_the_paper(self) -> Iterator[dict[str, Any]]:
        """Yields what was measured beside the authors' own models: seconds of an image with the fewest in a call."""
        fewest = min(self.step["experts"])
        tokens = partial(self.autoregressive, max(IMAGE_TOKENS))
        base = PUBLISHED["LaTtE-Flow"]
        experts = self.total("experts", base.steps, fewest)
        for model, side in COUNTERPARTS.items():
            paper = PUBLISHED[model]
            seconds = self.total(side, paper.steps, fewest) if side in self.step else tokens(fewest)
            yield {
                "side": side,
                "seconds": seconds / fewest,
                "to_experts": seconds / experts,
                "model": model,
                "paper_seconds": paper.seconds,
                "paper_to_experts": paper.seconds / base.seconds,
            }

    def calls(self) -> Iterator[tuple[str, Callable[[int], float], Callable[[int], float]]]:
        """Yields whole calls: name, seconds by number of images, and seconds of the experts' call to compare with."""
        for steps in STEPS:
            experts = partial(self.total, "experts", steps)
            for side in self.step:
                yield f"{side}, {steps} steps", partial(self.total, side, steps), experts
        for tokens in IMAGE_TOKENS:
            yield (
                f"autoregressive twin, {tokens} tokens",
                partial(self.autoregressive, tokens),
                partial(self.total, "experts", 20),
            )

    def whole_calls(self) -> Iterator[tuple[str, Callable[[int], float]]]:
        """Yields calls with prefix and decoder: name, and seconds by number of images; first the experts'.

        The autoregressive twin's decoder is another, which is left out.
        """
        for side in self.step:
            yield f"{side}, {STEPS_OF_WHOLE_CALLS} steps", partial(self.whole, side, STEPS_OF_WHOLE_CALLS)
        for side in self.one_row:
            for steps in (self.groups, 2 * self.groups):
                yield f"{side}, distilled, {steps} steps", partial(self.whole_distilled, side, steps)
        tokens = max(IMAGE_TOKENS)
        yield f"autoregressive twin, {tokens} tokens", partial(self.autoregressive, tokens)

    def whole(self, side: str, steps: int, images: int) -> float:
        """Returns the seconds of a call with guidance, decoder included."""
        return self.total(side, steps, images) + self.decoder[images].median

    def whole_distilled(self, side: str, steps: int, images: int) -> float:
        """Returns the seconds of a call with guidance built in, decoder included."""
        rest = self.prefix[images].median + self.decoder[images].median
        return rest + steps * self.one_row[side][images].median

    def total(self, side: str, steps: int, images: int) -> float:
        """Returns the seconds of a call without the autoencoder, which is the same for all flow models."""
        return self.prefix[images].median + steps * self.step[side][images].median

    def autoregressive(self, tokens: int, images: int) -> float:
        """Returns the seconds to write image tokens; a token's time is linear in the number of tokens before it."""
        places = self.token[images]
        (first, a), (last, b) = ((place, places[place].median) for place in (min(places), max(places)))
        slope = (b - a) / (last - first)
        mean_place = (tokens - 1) / 2
        return self.prefix[images].median + tokens * (a + slope * (mean_place - first))


def report_as_dict(report: GenerationReport) -> dict[str, Any]:
    """Returns all times, and numbers computed from them, for JSON."""
    images = sorted(report.step["experts"])  # keys are text, as in JSON, so that reports compare before and after
    return {
        "size": report.size,
        "step_seconds": {side: {str(n): t.seconds for n, t in times.items()} for side, times in report.step.items()},
        "prefix_seconds": {str(n): timing.seconds for n, timing in report.prefix.items()},
        "one_row_seconds": {
            side: {str(n): t.seconds for n, t in times.items()} for side, times in report.one_row.items()
        },
        "decoder_seconds": {str(n): timing.seconds for n, timing in report.decoder.items()},
        "token_seconds": {str(n): {str(p): t.seconds for p, t in of.items()} for n, of in report.token.items()},
        "call_seconds": {name: {str(n): seconds(n) for n in images} for name, seconds, _ in report.calls()},
        "whole_call_seconds": {name: {str(n): seconds(n) for n in images} for name, seconds in report.whole_calls()},
        "active_parameters": report.active,
        "beside_the_paper": list(report.beside_the_paper()),
        "limits": [asdict(each) | {"share": report.of_limits(each)} for each in report.limits],
        "notes": report.notes,
    }


def plot_generation(report: GenerationReport, path: Path) -> None:
    """Plots whole calls with the fewest images, one dot per call."""
    from matplotlib.figure import Figure

    fewest = min(report.step["experts"])
    names, seconds = zip(*((name, of(fewest)) for name, of, _ in report.calls()), strict=True)
    figure = Figure(figsize=(9, 0.35 * len(names) + 1.2), layout="constrained")
    axes = figure.subplots()
    colours = ["#1f77b4" if name.startswith("experts") else "#999999" for name in names]
    axes.scatter(seconds, range(len(names)), color=colours)
    axes.set_yticks(range(len(names)), names)
    for place, value in enumerate(seconds):
        axes.annotate(f"{value:.3g} s", (value, place), xytext=(7, -4), textcoords="offset points")
    axes.margins(x=0.12)
    axes.grid(axis="x", alpha=0.3)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel(f"seconds for {fewest} image{'s' * (fewest > 1)} with guidance, without the decoder, log scale")
    axes.set_title(f"size {report.size}")
    figure.savefig(path, dpi=120)
