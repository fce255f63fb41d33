"""Whole calls of several bundles side by side, each with its own sampling defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from export.benchmarks.report import Against, AsJson, ProviderName, Publisher, app, bundle_for_the_run
from export.benchmarks.stages import PROMPT
from export.benchmarks.timing import take_turns
from runtime.console import progress_bar, stdout
from runtime.errors import InputError
from runtime.pipeline import LatteFlowPipeline

DEFAULT_CHECKPOINTS = ("shapes", "shapes-4step")


@dataclass(frozen=True)
class CallTimes:
    """Times of whole calls of one bundle, prompt and decoder included."""

    bundle: str
    steps: int
    images: int
    """Number of images in a call."""
    seconds: list[float]
    median: float
    """Median of `seconds`."""
    times_as_fast: float
    """As the first bundle with as many images, by the medians."""


def measure_calls(bundles: Mapping[str, Path], provider: str, images: Sequence[int], rounds: int) -> list[CallTimes]:
    """Times calls with warm engines. All sides take turns, and encode the prompt in every call, as a new prompt is.

    Args:
        bundles: folders by name.
        images: numbers of images in a call.
    """
    with ExitStack() as stack, progress_bar() as progress:
        pipes = {
            name: stack.enter_context(LatteFlowPipeline.from_pretrained(path, provider, prefix_cache_bytes=0))
            for name, path in bundles.items()
        }
        calls = {(count, name): partial(_call, pipe, count) for count in images for name, pipe in pipes.items()}
        task = progress.add_task("time calls", total=rounds + 1)
        turns = take_turns(calls, rounds, lambda: progress.advance(task))
        first = next(iter(bundles))
        return [
            CallTimes(
                name,
                pipes[name].manifest.sampling.num_inference_steps,
                count,
                timed.seconds,
                timed.median,
                turns[count, first].median / timed.median,
            )
            for (count, name), timed in turns.items()
        ]


def _call(pipe: LatteFlowPipeline, images: int, turn: int) -> None:
    pipe(PROMPT, num_images_per_prompt=images, seed=turn)


@app.command(no_args_is_help=False)
def calls(
    bundle: Annotated[
        list[Path] | None,
        typer.Option(help="Bundle; may be repeated. By default `shapes` and `shapes-4step` are exported for the run."),
    ] = None,
    provider: ProviderName = "cpu",
    images: Annotated[list[int] | None, typer.Option(help="Number of images in a call; may be repeated.")] = None,
    rounds: Annotated[int, typer.Option(help="Number of calls of each.", min=1)] = 9,
    against: Against = None,
    as_json: AsJson = False,
) -> None:
    """Compare whole calls of bundles: a model and its distilled form, or two precisions.

    \b
    Examples:
      latte-flow bench calls
      latte-flow bench calls --bundle bundle --bundle bundle-int8 --images 1 --images 8 --rounds 21
    """
    publisher = Publisher(as_json, against)
    counts = sorted(set(images or [1, 8]))
    if counts[0] < 1:
        raise InputError(f"--images must be at least 1, got {counts[0]}")
    with ExitStack() as stack:
        if bundle:
            bundles = {str(path): path for path in bundle}
        else:
            bundles = {name: stack.enter_context(bundle_for_the_run(None, name)) for name in DEFAULT_CHECKPOINTS}
        times = measure_calls(bundles, provider, counts, rounds)

    def show() -> None:
        table = Table("images", "bundle", "steps", "ms", "times as fast", title="whole calls, medians")
        for timed in times:
            numbers = (str(timed.steps), f"{1000 * timed.median:.1f}", f"{timed.times_as_fast:.2f}")
            table.add_row(str(timed.images), timed.bundle, *numbers)
        stdout.print(table)

    by_images = {str(count): [asdict(timed) for timed in times if timed.images == count] for count in counts}
    publisher.publish({"provider": provider, "images": by_images}, show)
