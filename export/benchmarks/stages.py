"""Where a call's time goes, stage by stage: medians over calls."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from runtime.backends import open_backend
from runtime.manifest import load_manifest
from runtime.pipeline import LatteFlowPipeline
from runtime.profile import Profiler, Share

PROMPT = "a small red circle above a large blue square on a white background"


@dataclass(frozen=True)
class StageProfile:
    """Of a call."""

    seconds: float
    """Median of the whole."""
    stages: list[Share]
    host_share_of_a_step: float
    """Time between two steps in which no engine runs, in proportion to the step."""


def measure_stages(bundle: Path, provider: str, images: int, rounds: int, trace: Path | None) -> StageProfile:
    """Draws `rounds` times with warm engines; the last call's runs go into `trace`."""
    profiler = Profiler(open_backend(provider))
    wholes: list[float] = []
    parts: list[dict[str, Share]] = []
    host_shares: list[float] = []
    with LatteFlowPipeline(bundle, load_manifest(bundle), profiler) as pipe:
        for turn in range(rounds + 1):
            profiler.runs.clear()
            started = time.perf_counter()
            pipe(PROMPT, num_images_per_prompt=images, seed=turn)
            seconds = time.perf_counter() - started
            began = time.perf_counter()
            pipe.check_prompt(PROMPT)
            tokenise = Share("tokenise", 0, time.perf_counter() - began)
            if turn:  # the first warms up
                wholes.append(seconds)
                *engines, between, rest = profiler.shares(seconds)
                rest = Share(rest.what, 0, rest.seconds - tokenise.seconds)
                parts.append({share.what: share for share in (tokenise, *engines, between, rest)})
                stepping = sum(s.seconds for s in engines if s.what.startswith(("expert_", "solver_step")))
                host_shares.append(between.seconds / (stepping + between.seconds))
    if trace is not None:
        profiler.save_trace(trace)
    stages = [
        Share(what, first.runs, statistics.median(part[what].seconds for part in parts))
        for what, first in parts[0].items()
    ]
    return StageProfile(statistics.median(wholes), stages, statistics.median(host_shares))
