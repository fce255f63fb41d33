"""The simulated cluster against what can be computed by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from export.benchmarks.scale_out import Cluster, simulate

RunCommand = Callable[..., tuple[int, str, str]]
NEVER = 1e12
IDEAL: dict[str, Any] = {
    "start_seconds": 0,
    "spread": 0,
    "hours_between_losses": NEVER,
    "rows_read_per_second": NEVER,
    "store_latency": 0,
    "store_bytes_per_second": NEVER,
}


def ideal(**changed: Any) -> Cluster:
    return Cluster(256_000, 10, 3600, **{**IDEAL, **changed})


def test_without_limits_the_work_is_shared_evenly() -> None:
    found = simulate(ideal())
    assert found.hours == pytest.approx(256_000 / 36_000)
    assert found.efficiency == pytest.approx(1)
    assert (found.parts, found.losses, found.limit) == (1_000, 0, "workers")


def test_a_reader_and_a_store_bound_the_rate() -> None:
    slow = simulate(ideal(rows_read_per_second=2))
    assert slow.hours == pytest.approx(256_000 / 2 / 3600, rel=0.01)
    assert slow.limit == "the reader"
    slow = simulate(ideal(bytes_per_image=1_000, store_bytes_per_second=5_000))
    assert slow.hours == pytest.approx(256_000 / 5 / 3600, rel=0.01)
    assert slow.waiting_for_store == pytest.approx(0.5, abs=0.01)


def test_workers_that_die_cost_half_a_shard_and_a_start() -> None:
    found = simulate(ideal(hours_between_losses=1, start_seconds=90))
    assert found.losses == pytest.approx(10 * found.hours, rel=0.25)
    assert found.lost == pytest.approx((128 + 90) / 3600, rel=0.25)
    assert found == simulate(ideal(hours_between_losses=1, start_seconds=90))
    assert found != simulate(ideal(hours_between_losses=1, start_seconds=90), seed=1)


def test_the_command_shows_what_a_million_images_cost(run_command: RunCommand) -> None:
    arguments = ("bench", "scale-out", "--images", 100_000, "--workers", 10, "--cost-per-hour", 2)
    code, out, _ = run_command(*arguments)
    assert code == 0
    assert "100,000 images in parts of 256" in out
    code, out, _ = run_command(*arguments, "--json")
    (run,) = json.loads(out)["runs"]
    assert run["cost_of_a_million"] == pytest.approx(2 * 10 * run["hours"] * 10)
    assert run["hours"] * run["efficiency"] == pytest.approx(100_000 / 50_000, rel=0.05)
