"""Where a call's time goes: every run of every engine, and what the host does in between."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from runtime.backends import Backend
from runtime.backends.observed import ObservedBackend, ObservedRun
from runtime.files import write_text


class Run(NamedTuple):  # made between two engines, where a frozen dataclass takes three times as long
    """One run of an engine; times in seconds of `time.perf_counter`."""

    engine: str
    start: float
    end: float


@dataclass(frozen=True)
class Share:
    """One line of a profile."""

    what: str
    runs: int
    seconds: float


class Profiler(ObservedBackend):
    """A backend that remembers when each engine ran. On a GPU a run ends when the host has handed it over."""

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self.runs: list[Run] = []

    def observe(self, run: ObservedRun) -> None:
        self.runs.append(Run(run.entry.name, run.start, run.end))

    def shares(self, seconds: float) -> list[Share]:
        """Time per engine, on the host between two steps, and on the host otherwise.

        Args:
            seconds: that the whole took.
        """
        names = dict.fromkeys(run.engine for run in self.runs)
        shares = []
        for name in names:
            times = [run.end - run.start for run in self.runs if run.engine == name]
            shares.append(Share(name, len(times), sum(times)))
        between = self.between_steps()
        rest = seconds - sum(share.seconds for share in shares) - between
        return [*shares, Share("host, between steps", 0, between), Share("host, otherwise", 0, rest)]

    def between_steps(self) -> float:
        """Seconds in which no engine ran while the sampler was under way."""
        stepping = [run for run in self.runs if run.engine.startswith("expert_") or run.engine == "solver_step"]
        return sum(later.start - earlier.end for earlier, later in itertools.pairwise(stepping))

    def save_trace(self, path: Path) -> None:
        """Writes the runs in Chrome's trace format, one lane per engine: chrome://tracing, Perfetto."""
        lanes = {name: lane for lane, name in enumerate(dict.fromkeys(run.engine for run in self.runs))}
        start = min((run.start for run in self.runs), default=0.0)
        process = os.getpid()
        names = [
            {"ph": "M", "name": "thread_name", "pid": process, "tid": lane, "args": {"name": name}}
            for name, lane in lanes.items()
        ]
        spans = [
            {
                "ph": "X",
                "name": run.engine,
                "cat": "engine",
                "pid": process,
                "tid": lanes[run.engine],
                "ts": 1e6 * (run.start - start),
                "dur": 1e6 * (run.end - run.start),
            }
            for run in self.runs
        ]
        write_text(path, json.dumps({"traceEvents": [*names, *spans], "displayTimeUnit": "ms"}) + "\n")
