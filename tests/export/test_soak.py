"""The soak keeps count of every request, and says which promise was broken."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from export.benchmarks.soak import Ended, MemorySample, Outage, Plan, Record, broken_promises

RunCommand = Callable[..., tuple[int, str, str]]
PLAN = Plan(requests=2, cancel=0.0, kill_every=0, reload_every=0, clients=1, deadline=10.0, seed=0)
ANSWERED = Ended(0, "PNG", "answer", 0.0, 1.0)
FAILED = Ended(1, "PNG", "error", 2.0, 3.0, "UNAVAILABLE", "Socket closed")


def test_every_request_ends_although_the_service_is_killed_and_reloaded(bundle: Path, run_command: RunCommand) -> None:
    options = ("--requests", 60, "--kill-every", 25, "--reload-every", 30, "--clients", 8, "--seed", 7)
    code, out, error = run_command("bench", "soak", "--bundle", bundle, *options, "--json")
    assert code == 0, error
    report = json.loads(out)
    ends = sum((Counter(counts) for counts in report["ends"].values()), Counter())
    assert ends.total() == 60
    assert ends["lost"] == 0
    assert min(ends["answer"], ends["cancelled"]) > 0
    assert report["kills"] >= 1
    assert report["reloads"] >= 1
    assert len(report["outages_seconds"]) == report["kills"]
    assert sum(found["count"] for found in report["errors"]) == ends["error"]
    assert report["slowest_seconds"] < 60
    assert report["left_behind"] == report["broken"] == []
    assert report["machine"]["processor"]


def test_a_soak_prints_a_table(bundle: Path, run_command: RunCommand) -> None:
    options = ("--requests", 8, "--kill-every", 0, "--reload-every", 0, "--cancel", 0)
    code, out, error = run_command("bench", "soak", "--bundle", bundle, *options)
    assert code == 0, error
    assert "8 requests, seed 0" in out
    assert "kills: 0" in out
    assert "left in /dev/shm and /tmp: nothing" in out


def test_a_kept_promise_is_not_reported() -> None:
    outage = Outage(2.5, 4.0, "killed", killed=True)
    assert broken_promises(PLAN, Record(ended=[ANSWERED, FAILED], outages=[outage])) == []


def test_each_broken_promise_is_one_line() -> None:
    lost = Ended(1, "question", "lost", 0.0, 20.0)

    def only(record: Record, plan: Plan = PLAN) -> str:
        (line,) = broken_promises(plan, record)
        return line

    assert "1 requests have no end" in only(Record(ended=[ANSWERED]))
    assert "1 requests were lost" in only(Record(ended=[ANSWERED, lost]))
    assert "failed while the server ran, with UNAVAILABLE" in only(Record(ended=[ANSWERED, FAILED]))
    away = Outage(2.5, 4.0, "it ended with code -11", killed=False)
    assert "died by itself: it ended with code -11" in only(Record(ended=[ANSWERED, FAILED], outages=[away]))
    both = [ANSWERED, replace(ANSWERED, index=1)]
    assert "left behind: region" in only(Record(ended=both, left_behind=["region"]))
    plan = replace(PLAN, requests=1000)
    many = [replace(ANSWERED, index=index) for index in range(1000)]
    flat, grown = MemorySample(1000, 100.0, 219.0), MemorySample(1000, 100.0, 221.0)
    first = MemorySample(100, 100.0, 200.0)
    assert broken_promises(plan, Record(ended=many, memory=[first, flat])) == []
    line = only(Record(ended=many, memory=[first, grown]), plan)
    assert line == "memory of the model grew from 200 to 221 MB after the first tenth"


def test_a_deadline_that_cannot_work_is_refused_in_one_line(run_command: RunCommand) -> None:
    code, _, error = run_command("bench", "soak", "--deadline", "nan")
    assert code == 2
    assert error.strip() == "error: --deadline must be at least 1 second, got nan"
