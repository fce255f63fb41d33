"""A timeline of a call: every run of every engine, and what the host does in between."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from runtime.backends import Backend
from runtime.backends.observed import ObservedBackend, ObservedRun
from runtime.files import write_text
from runtime.manifest import EngineRole

STEPPING: tuple[EngineRole, ...] = ("expert", "solver_step")
"""Engines that run in each sampling step."""


class EngineRun(NamedTuple):  # made between two engines, where a frozen dataclass takes three times as long
    """One run of an engine; times in seconds of `time.perf_counter`."""

    engine: str
    role: EngineRole
    start: float
    end: float


@dataclass(frozen=True)
class TimeShare:
    """The time that one engine, or one kind of host work, took in a call."""

    what: str
    runs: int
    seconds: float


class Tracer(ObservedBackend):
    """A backend that records when each engine ran. On a GPU a run ends when the host has handed it over."""

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self.runs: list[EngineRun] = []

    def observe(self, run: ObservedRun) -> None:
        self.runs.append(EngineRun(run.entry.name, run.entry.role, run.start, run.end))

    def time_shares(self, seconds: float) -> list[TimeShare]:
        """Returns the time of each engine, of the host between two steps, and of the host otherwise.

        Args:
            seconds: duration of the whole call.
        """
        shares = []
        for name in dict.fromkeys(run.engine for run in self.runs):
            times = [run.end - run.start for run in self.runs if run.engine == name]
            shares.append(TimeShare(name, len(times), sum(times)))
        between = sum(later.start - earlier.end for earlier, later in itertools.pairwise(self._stepping()))
        rest = seconds - sum(share.seconds for share in shares) - between
        return [*shares, TimeShare("host, between steps", 0, between), TimeShare("host, otherwise", 0, rest)]

    def host_share_of_a_step(self) -> float:
        """Returns the time in which no engine ran during the sampling loop, relative to the loop's whole time."""
        runs = list(self._stepping())
        return 1.0 - sum(run.end - run.start for run in runs) / (runs[-1].end - runs[0].start)

    def save_trace(self, path: Path) -> None:
        """Writes the runs in Chrome's trace format, one lane per engine, for chrome://tracing or Perfetto."""
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

    def _stepping(self) -> Iterator[EngineRun]:
        return (run for run in self.runs if run.role in STEPPING)
