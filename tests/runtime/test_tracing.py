"""Where a call's time goes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.backends import open_backend
from runtime.manifest import load_manifest
from runtime.pipeline import LatteFlowPipeline
from runtime.tracing import Tracer

RunCommand = Callable[..., tuple[int, str, str]]


def test_shares_add_up_to_the_call(bundle: Path) -> None:
    tracer = Tracer(open_backend("cpu"))
    with LatteFlowPipeline(bundle, load_manifest(bundle), tracer) as pipe:
        pipe("a red star", num_inference_steps=4, seed=0)
        tracer.runs.clear()
        started = time.perf_counter()
        pipe("a ring", num_inference_steps=4, seed=0)
        seconds = time.perf_counter() - started
    shares = {share.what: share for share in tracer.time_shares(seconds)}
    assert sum(share.seconds for share in shares.values()) == pytest.approx(seconds)
    assert all(share.seconds > 0 for share in shares.values())
    runs = {name: share.runs for name, share in shares.items() if share.runs}
    assert runs == {"vlm": 1, "expert_0": 2, "expert_1": 2, "solver_step": 4, "vae_decoder": 1}


def test_generate_writes_a_trace_with_a_lane_for_each_engine(
    bundle: Path, tmp_path: Path, run_command: RunCommand
) -> None:
    trace = tmp_path / "trace.json"
    options = ("-o", tmp_path, "--num-inference-steps", 4, "--trace", trace)
    code, _, error = run_command("generate", bundle, "a red star", *options)
    assert code == 0, error
    events = json.loads(trace.read_text())["traceEvents"]
    lanes = {event["args"]["name"]: event["tid"] for event in events if event["ph"] == "M"}
    assert set(lanes) == {"vlm", "expert_0", "expert_1", "solver_step", "vae_decoder"}
    assert len(set(lanes.values())) == len(lanes)
    spans = [event for event in events if event["ph"] == "X"]
    assert all(event["tid"] == lanes[event["name"]] and event["dur"] > 0 and event["ts"] >= 0 for event in spans)
