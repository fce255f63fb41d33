"""The first day on a GPU, rehearsed on the CPU with tiny models: what each section measures, and what it survives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from export.benchmarks import gpu_day
from export.benchmarks.generation import Bench, GenerationSettings
from export.benchmarks.generation_report import GenerationReport
from export.benchmarks.gpu_day import Settings, main
from export.benchmarks.limits import Limits, Work, limits_of, step_work, token_work
from export.benchmarks.torch_twins import TokenTwin, prompt_inputs, random_token_twin
from latte.model import LatteFlow
from latte.paper import PAPER, PUBLISHED
from runtime.backends import open_backend
from runtime.errors import InputError
from runtime.manifest import EngineEntry, PlanProfile
from tests.doubles import GpuDouble
from tests.plan_files import plan_file
from tests.test_imports import ROOT, WITHOUT_MODULES

ON_THE_CPU = ("--device", "cpu", "--size", "tiny", "--rounds", "1", "--images", "1", "--no-compile")


def run_sections(out: Path, *more: str) -> tuple[int, dict[str, Any]]:
    """In a process of its own: sections are forked, and hang after a process that has used PyTorch's threads."""
    command = [sys.executable, "-m", "export.benchmarks.gpu_day", *ON_THE_CPU, "--out", str(out), *more]
    code = subprocess.run(command, timeout=400, cwd=ROOT, check=False).returncode
    return code, json.loads(out.read_text())


def test_parity_and_twins_are_measured_beside_the_papers_table(tmp_path: Path) -> None:
    code, report = run_sections(tmp_path / "day.json", "--only", "limits", "parity", "twins, fp16")
    assert [entry.get("reason") for entry in report["sections"].values()] == [None] * 3
    assert code == 0
    assert report["finished"]
    assert list(report["sections"]) == ["limits", "parity", "twins, fp16"]
    assert report["machine"]["packages"]["torch"] == torch.__version__
    rows = report["sections"]["parity"]["result"]
    assert [row["precision"] for row in rows] == ["fp32"] * 3 + ["fp16"] * 3 + ["bf16"] * 3
    assert all(row["passed"] for row in rows)
    assert all(row["error"] > 0 for row in rows if row["precision"] != "fp32")
    twins = report["sections"]["twins, fp16"]["result"]
    assert [row["side"] for row in twins["step"]] == ["experts", "dense twin", "autoregressive twin"]
    assert all(0 < row["limit_seconds"] < row["seconds"] for row in twins["step"])
    janus = next(call for call in twins["calls"] if call["side"] == "autoregressive twin")
    assert janus["paper_to_experts"] == pytest.approx(0.311 / 0.052)
    assert janus["to_experts"] > 0
    assert set(report["published"]["models"]) == set(PUBLISHED)
    assert [path.name for path in tmp_path.iterdir()] == ["day.json"]


def test_a_section_that_fails_crashes_or_hangs_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(settings: Settings, report: gpu_day.Report) -> None:
        report({"so": "far"})
        raise ValueError("wrong")

    def crashes(settings: Settings, report: gpu_day.Report) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def hangs(settings: Settings, report: gpu_day.Report) -> None:
        report([1])
        time.sleep(60)

    def lacks(settings: Settings, report: gpu_day.Report) -> None:
        import no_such_package  # type: ignore[import-not-found]  # noqa: F401

    def works(settings: Settings, report: gpu_day.Report) -> None:
        report([2])

    sections = [(each.__name__, each) for each in (fails, crashes, hangs, lacks, works)]
    monkeypatch.setattr(gpu_day, "_sections", lambda settings: iter(sections))
    out = tmp_path / "day.json"
    assert main([*ON_THE_CPU, "--out", str(out), "--timeout", "1"]) == 1
    found = json.loads(out.read_text())["sections"]
    assert [entry["state"] for entry in found.values()] == ["failed", "failed", "failed", "left out", "ok"]
    assert found["fails"]["reason"] == "ValueError: wrong"
    assert found["fails"]["result"] == {"so": "far"}
    assert found["crashes"]["reason"] == "its process ended with -9"
    assert found["hangs"]["reason"] == "took longer than 1 s"
    assert found["hangs"]["result"] == [1]
    assert "no_such_package" in found["lacks"]["reason"]


def test_it_needs_little_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    """As on a machine that has PyTorch and transformers, but neither this project's packages nor ONNX Runtime's."""
    blocked = "diffusers,accelerate,onnx_ir,onnxruntime,scipy,peft,datasets,matplotlib"
    code = WITHOUT_MODULES.partition("from runtime.cli")[0]
    code += "from export.benchmarks.gpu_day import main\nsys.exit(main(sys.argv[1:]))"
    out = tmp_path / "day.json"
    arguments = [*ON_THE_CPU, "--only", "limits", "images", "ONNX", "--out", str(out)]
    command = [sys.executable, "-c", code, blocked, *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, check=False)
    assert finished.returncode == 0, finished.stderr
    sections = json.loads(out.read_text())["sections"]
    assert {name: entry["state"] for name, entry in sections.items()} == {
        "limits": "ok",
        "images": "left out",
        "ONNX Runtime, fp16": "left out",
    }
    assert "diffusers" in sections["images"]["reason"] or "accelerate" in sections["images"]["reason"]


def test_without_a_gpu_every_section_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    out = tmp_path / "day.json"
    assert main(["--size", "tiny", "--only", "limits", "--out", str(out)]) == 1
    assert "finds no GPU" in json.loads(out.read_text())["sections"]["limits"]["reason"]


def test_the_autoregressive_twin_goes_on_where_its_prompt_ended() -> None:
    """Tokens read together and one by one are the same, so that its memory for keys and values is the model's past."""
    config = gpu_day.TINY
    twin = random_token_twin(config, 64, "fp32", "cpu")
    assert isinstance(twin, TokenTwin)
    tokens, places, kv = prompt_inputs(twin, 1, 40)
    tokens = torch.randint(64, tokens.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = twin(tokens, places, kv)
        later = torch.zeros_like(kv)
        for place in range(tokens.shape[1]):
            one_by_one = twin(tokens[:, place : place + 1], places[place : place + 1], later)
    assert torch.equal(together, one_by_one)
    torch.testing.assert_close(kv, later)


def test_engines_on_a_gpu_are_timed_by_events_in_its_stream(
    model: LatteFlow, gpu: GpuDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On doubles: random engines get plans, run within their profiles, and are timed on the device."""

    def planned(bundle: Path, entry: EngineEntry, _: object, profiles: tuple[PlanProfile, ...]) -> EngineEntry:
        with_plan = plan_file(bundle, entry, "tensorrt", profiles)
        gpu.trt.show_engine(bundle, with_plan)
        return with_plan

    monkeypatch.setattr("export.benchmarks.generation.with_plan", planned)
    settings = GenerationSettings("tiny", "tensorrt", "fp32", rounds=3, images=(1, 2))
    report = GenerationReport("tiny", "fp32")
    with closing(open_backend("tensorrt")) as backend:
        bench = Bench(settings, model.config, report, backend, lambda stage: None)
        bench.time_flow_models(tmp_path)
        bench.time_decoder(tmp_path / "decoder", dict(model.vae.config))
    assert set(report.step) == set(report.work) == {"experts", "dense twin"}
    assert min(report.step["experts"][2].seconds + report.decoder[2].seconds) > 0
    assert gpu.cuda.launches > 0
    assert len(gpu.cuda.events) == 2 * (settings.rounds + 1) * (2 * 2 + 2 + 2)
    assert set(gpu.cuda.alive().values()) == {0}


def test_a_precision_that_the_provider_lacks_is_refused_at_once() -> None:
    with pytest.raises(InputError, match="cpu does not run bf16"):
        GenerationSettings("tiny", "cpu", "bf16")


def test_the_least_work_is_that_of_the_formulas() -> None:
    """A step of one image at the paper's size is bound by memory, and a token even more so."""
    step, dense = (step_work(PAPER, layers, 1, "fp16") for layers in (7, 28))
    assert 3.9 < dense.flops / step.flops < 4.1
    token = token_work(PAPER, 16_384, 600, 1, "fp16")
    h100 = limits_of("NVIDIA H100 80GB HBM3", "fp16")
    assert h100 is not None
    assert h100.source == "data sheet of H100"
    assert step.bound(h100) == token.bound(h100) == "memory"
    assert 0.69e9 < step.bytes < 0.71e9  # 350 million parameters
    assert 2.5e9 < token.bytes < 2.8e9
    assert limits_of("GeForce 256", "fp16") is None
    assert Work(100, 10).seconds(Limits(10, 5, "measured")) == 10
    assert Work(100, 10).bound(Limits(10, 5, "measured")) == "arithmetic"
