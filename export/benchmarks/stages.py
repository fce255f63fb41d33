"""The time of a call, stage by stage: medians over calls."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from export.benchmarks.report import Against, AsJson, ProviderName, Publisher, app, bundle_for_the_run
from export.benchmarks.timing import take_turns
from runtime.backends import open_backend
from runtime.console import stdout
from runtime.manifest import load_manifest
from runtime.pipeline import LatteFlowPipeline
from runtime.tracing import TimeShare, Tracer

PROMPT = "a small red circle above a large blue square on a white background"


@dataclass(frozen=True)
class StageTimes:
    """Where the time of a call goes."""

    seconds: float
    """Median of the whole call."""
    stages: list[TimeShare]
    steps: int
    host_share_of_a_step: float
    """Time between two steps in which no engine runs, relative to the step."""


def measure_stages(bundle: Path, provider: str, images: int, rounds: int, trace: Path | None) -> StageTimes:
    """Generates images `rounds` times with warm engines; writes the last call's timeline to `trace`.

    The prompt is encoded in every call, as a new prompt is.
    """
    tracer = Tracer(open_backend(provider))
    with LatteFlowPipeline(bundle, load_manifest(bundle), tracer, prefix_cache_bytes=0) as pipe:

        def call(turn: int) -> tuple[list[TimeShare], float]:
            tracer.runs.clear()
            started = time.perf_counter()
            pipe(PROMPT, num_images_per_prompt=images, seed=turn)
            seconds = time.perf_counter() - started
            began = time.perf_counter()
            pipe.check_prompt(PROMPT)
            tokenise = TimeShare("tokenise", 0, time.perf_counter() - began)
            *engines, rest = tracer.time_shares(seconds)
            rest = TimeShare(rest.what, 0, rest.seconds - tokenise.seconds)
            return [tokenise, *engines, rest], tracer.host_share_of_a_step()

        turns = take_turns({"call": call}, rounds)["call"]
    if trace is not None:
        tracer.save_trace(trace)
    steps = pipe.manifest.sampling.num_inference_steps
    calls = [{share.what: share for share in shares} for shares, _ in turns.results]
    stages = [
        TimeShare(what, first.runs, statistics.median(shares[what].seconds for shares in calls))
        for what, first in calls[0].items()
    ]
    whole = statistics.median(sum(share.seconds for share in shares.values()) for shares in calls)
    return StageTimes(whole, stages, steps, statistics.median(host for _, host in turns.results))


@app.command(no_args_is_help=False)
def stages(
    bundle: Annotated[Path | None, typer.Option(help="Bundle; by default `shapes` is exported for the run.")] = None,
    provider: ProviderName = "cpu",
    images: Annotated[int, typer.Option(help="Number of images in a call.", min=1)] = 1,
    rounds: Annotated[int, typer.Option(help="Number of calls.", min=1)] = 9,
    trace: Annotated[Path | None, typer.Option(help="Write a Chrome trace of the last call to this file.")] = None,
    against: Against = None,
    as_json: AsJson = False,
) -> None:
    """Show where a call's time goes: tokeniser, prefix, each expert, solver, decoder, host between steps.

    \b
    Examples:
      latte-flow bench stages
      latte-flow bench stages --bundle my-bundle --images 8 --trace trace.json
    """
    publisher = Publisher(as_json, against)
    with bundle_for_the_run(bundle) as bundle:
        times = measure_stages(bundle, provider, images, rounds, trace)

    def show() -> None:
        table = Table("stage", "runs", "ms", "share", title=f"{images} image{'s' * (images > 1)}, {times.steps} steps")
        for stage in times.stages:
            share = f"{stage.seconds / times.seconds:.1%}"
            table.add_row(stage.what, str(stage.runs or ""), f"{1000 * stage.seconds:.2f}", share)
        table.add_row("all", "", f"{1000 * times.seconds:.2f}", "")
        stdout.print(table)
        stdout.print(f"host between steps: {times.host_share_of_a_step:.1%} of a step")

    publisher.publish({"provider": provider, "images": images} | asdict(times), show)
