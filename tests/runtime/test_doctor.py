"""What a machine has, and what is wrong with it. This one's GPU, if any, is not asked: nvidia-smi is a script here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.doctor import Finding, examine
from tests.test_imports import HEAVY, run_without

RunCommand = Callable[..., tuple[int, str, str]]


def with_gpu(monkeypatch: pytest.MonkeyPatch, folder: Path, line: str) -> None:
    script = folder / "nvidia-smi"
    script.write_text(f"#!/bin/sh\necho '{line}'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.what.strip(): finding for finding in findings}


def test_a_machine_without_a_gpu_is_fine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bundle: Path, run_command: RunCommand
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = by_name(examine(bundle))
    assert found["NVIDIA driver"].state == "missing"
    assert found["ONNX Runtime"].state == "ok"
    assert found["Triton"].state == "ok"
    assert found["tensorrt-rtx"].found.endswith("without a GPU it builds")
    assert found["on cpu"].found == "6 of 6 engines run here"
    assert "no tensorrt-rtx plan" in found["on tensorrt-rtx"].fix
    code, out, _ = run_command("doctor", bundle)
    assert code == 0
    assert "NVIDIA driver" in out


@pytest.mark.parametrize("folder", ["/dev/null", "/proc/nope"])
def test_a_cache_that_cannot_be_written_is_missing(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATTE_FLOW_CACHE", folder)
    found = by_name(examine())["graph cache"]
    assert found.state == "missing"
    assert "LATTE_FLOW_CACHE" in found.fix


def test_a_gpu_that_onnx_runtime_cannot_use_is_a_problem_with_its_fix(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run_command: RunCommand
) -> None:
    with_gpu(monkeypatch, tmp_path, "NVIDIA H100, 9.0, 81559 MiB, 580.1")
    found = by_name(examine())
    assert found["NVIDIA driver"].found == "580.1: NVIDIA H100, sm_90, 81559 MiB"
    assert found["tensorrt-rtx"].found.endswith("does not run on sm_90: use tensorrt")
    assert found["ONNX Runtime"].state == "problem"
    assert 'pip install "latte-flow[gpu]"' in found["ONNX Runtime"].fix
    code, out, _ = run_command("doctor", "--json")
    assert code == 1
    assert json.loads(out)["findings"]


def test_it_works_with_nothing_but_the_base_package() -> None:
    blocked = HEAVY | {"latte", "export", "onnxruntime", "tensorrt", "tensorrt_rtx", "cuda", "tritonclient", "pytriton"}
    result = run_without(blocked, "doctor")
    assert result.returncode == 0, result.stderr
    assert "not installed" in result.stdout


def test_what_is_no_bundle_is_a_finding(tmp_path: Path) -> None:
    assert by_name(examine(tmp_path))["bundle"].state == "problem"


@pytest.mark.parametrize(
    ("driver", "supports", "state", "says"),
    [
        ("580.82.07", 13050, "ok", "runtime 13.4"),
        ("580.82.07", 13000, "ok", "runtime 13.4 on a driver for 13.0, by minor-version compatibility"),
        ("575.51.03", 12090, "problem", "update the driver to 580 or later: it supports CUDA 12.9"),
        ("450.51", 11000, "problem", "update the driver to 580 or later: it supports CUDA 11.0"),
    ],
)
def test_a_driver_runs_the_minor_versions_of_its_cuda(
    driver: str, supports: int, state: str, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As NVIDIA's tables of CUDA and drivers have it."""
    with_gpu(monkeypatch, tmp_path, f"NVIDIA L4, 8.9, 23034 MiB, {driver}")
    monkeypatch.setattr("cuda.bindings.runtime.cudaRuntimeGetVersion", lambda: (0, 13040))
    monkeypatch.setattr("cuda.bindings.runtime.cudaDriverGetVersion", lambda: (0, supports))
    found = by_name(examine())
    assert found["CUDA (cuda-python)"].state == found["NVIDIA driver"].state == state
    assert says in (found["CUDA (cuda-python)"].fix if state == "problem" else found["CUDA (cuda-python)"].found)
    if state == "problem":
        assert found["NVIDIA driver"].fix.endswith("CUDA 13, which needs driver 580 or later")
