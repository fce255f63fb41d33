"""Timing of several sides in one run: the sides take turns, and the first turn only warms up."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from runtime.stopwatch import ResultT, wall_time

KeyT = TypeVar("KeyT")


@dataclass(frozen=True)
class Turns(Generic[ResultT]):
    """The timed turns of one side."""

    seconds: list[float]
    results: list[ResultT]
    """What the side returned in each turn."""

    @property
    def median(self) -> float:
        """Median, in seconds."""
        return statistics.median(self.seconds)


def take_turns(
    sides: Mapping[KeyT, Callable[[int], ResultT]],
    rounds: int,
    on_round: Callable[[], object] = lambda: None,
    stopwatch: Callable[[Callable[[], ResultT]], tuple[float, ResultT]] = wall_time,
) -> dict[KeyT, Turns[ResultT]]:
    """Runs every side once per round, after a first round that is not counted.

    Shared machines are faster at one moment than at another; sides that take turns meet the same moments.

    Args:
        sides: functions by the name of their side; each gets the number of the turn, 0 being the warm-up.
        on_round: called after each round.
        stopwatch: runs a side; returns how long it took, and its result.
    """
    turns: dict[KeyT, Turns[ResultT]] = {name: Turns([], []) for name in sides}
    for turn in range(rounds + 1):
        for name, side in sides.items():
            seconds, result = stopwatch(partial(side, turn))
            if turn:
                turns[name].seconds.append(seconds)
                turns[name].results.append(result)
        on_round()
    return turns
