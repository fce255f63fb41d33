"""Benchmarks measure both sides of the same work; their numbers are not asserted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

RunCommand = Callable[..., tuple[int, str, str]]


def test_understanding_is_measured_beside_transformers(bundle: Path, checkpoint: Path, run_command: RunCommand) -> None:
    arguments = ("bench", "understanding", checkpoint, "--bundle", bundle, "--new-tokens", 6, "--rounds", 2)
    code, out, error = run_command(*arguments, "--json")
    assert code == 0, error
    report = json.loads(out)
    assert report["same_tokens"]
    assert report["new_tokens"] == 6
    for side in ("engines", "transformers"):
        assert len(report[side]["tokens_per_second"]) == 2
        assert min(report[side]["tokens_per_second"] + report[side]["first_token_seconds"]) > 0
    assert report["machine"]["processor"]
    code, out, _ = run_command(*arguments)
    assert code == 0
    assert "engines are faster by" in out
    assert "both sides wrote the same tokens: yes" in out


def test_serving_is_measured_under_every_discipline_and_through_triton(bundle: Path, run_command: RunCommand) -> None:
    code, out, error = run_command("bench", "serving", "--bundle", bundle, "--requests", 8, "--json")
    assert code == 0, error
    loads = json.loads(out)["loads"]
    names = {(load["load"], load["discipline"]) for load in loads}
    for discipline in ("step-level", "whole requests", "one at a time"):
        assert {load for load, name in names if name == discipline} == {
            "1 in flight",
            "4 in flight",
            "16 in flight",
            "64 in flight",
            "Poisson, 50% of capacity",
            "Poisson, 80% of capacity",
            "Poisson, 95% of capacity",
        }
    assert {("16 in flight", "in process"), ("16 in flight", "Triton")} <= names
    assert all(0 < load["p50"] <= load["p95"] <= load["p99"] for load in loads)


def test_bench_lists_its_subjects(run_command: RunCommand) -> None:
    code, out, _ = run_command("bench", "--help")
    assert code == 0
    assert "understanding" in out
    assert "serving" in out
