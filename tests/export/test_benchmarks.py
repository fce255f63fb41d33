"""Benchmarks measure both sides of the same work; their numbers are not asserted."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from export.benchmarks.ablations import Variant
from export.benchmarks.png_files import thread_counts
from export.benchmarks.precision import PROMPTS, Subject, random_subject, study
from export.benchmarks.random_models import write_random_checkpoint
from latte.checkpoint import load_checkpoint
from latte.config import one_group
from latte.model import LatteFlow
from latte.paper import PAPER
from runtime.manifest import Precision

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
    code, out, error = run_command("bench", "serving", "--bundle", bundle, "--requests", 8, "--open", 24, "--json")
    assert code == 0, error
    report = json.loads(out)
    opened = report["open"]
    assert [load["load"] for load in opened] == [
        "24 open, images",
        "24 open, images with previews",
        "24 open, PNG",
        "24 open, images and answers",
    ]
    for load in opened:
        assert load["median_answer_seconds"] > 0
        assert 0 < load["last_image_seconds"] <= load["last_answer_seconds"]
    sizes = {rate["size"]: rate["threads"] for rate in report["png"]}
    assert sizes == {"32x24": os.cpu_count(), "256x192": os.cpu_count()}
    assert all(rate["images_per_second"] > 0 for rate in report["png"])
    loads = report["loads"]
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
    assert all(0 < load["p50_seconds"] <= load["p95_seconds"] <= load["p99_seconds"] for load in loads)


@pytest.mark.parametrize(("cores", "counts"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_png_files_are_measured_with_one_thread_up_to_all_cores(cores: int, counts: list[int]) -> None:
    assert thread_counts(cores) == counts


def test_the_gateway_is_measured_in_turns_and_with_many_streams(bundle: Path, run_command: RunCommand) -> None:
    arguments = ("bench", "gateway", bundle, "--requests", 8, "--rounds", 2, "--streams", 12)
    code, out, error = run_command(*arguments, "--json")
    assert code == 0, error
    report = json.loads(out)
    for side in ("in process", "gateway"):
        assert len(report["sides"][side]["images_per_second"]) == 2
        assert min(report["sides"][side]["images_per_second"] + report["sides"][side]["p50_seconds"]) > 0
    assert report["overhead"] < 1
    streams = report["streams"]
    assert (streams["streams"], streams["lost"], streams["reasons"]) == (12, 0, [])
    assert streams["open_at_once"] <= 12  # so few may come and go between two looks at the gauge
    first = streams["first_event_seconds"]
    assert 0 < first["p50"] <= first["p95"] <= first["longest"] <= streams["seconds"]
    assert streams["most_mb"] >= streams["idle_mb"] > 0


def test_bench_lists_its_subjects(run_command: RunCommand) -> None:
    code, out, _ = run_command("bench", "--help")
    assert code == 0
    assert "understanding" in out
    assert "serving" in out
    assert "soak" in out
    assert "gateway" in out


def test_a_provider_is_verified_drawn_with_and_timed(checkpoint: Path, tmp_path: Path, run_command: RunCommand) -> None:
    code, out, error = run_command(
        "bench", "provider", "cpu", "--checkpoint", checkpoint, "--rounds", 1, "--out", tmp_path
    )
    assert code == 0, error
    assert "fp16:" in out
    report = json.loads((tmp_path / "report.json").read_text())
    assert {timing["precision"] for timing in report["timings"]} == {"fp32", "fp16"}
    assert all(row["passed"] for rows in report["parity"].values() for row in rows)
    assert (tmp_path / "cpu-fp16.png").is_file()


def test_a_provider_that_is_not_here_is_said_before_any_work(tmp_path: Path, run_command: RunCommand) -> None:
    code, _, error = run_command("bench", "provider", "tensorrt", "--out", tmp_path / "out")
    assert code == 2
    assert error.startswith("error: tensorrt is not installed")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_is_studied_part_by_part(precision: Precision, model: LatteFlow) -> None:
    def errors(subject: Subject) -> dict[str, float | None]:
        return {error.part: error.error for error in study("tiny", subject, [precision])}

    prefix = model.encode_prompts(PROMPTS)
    found = errors(Subject(model.flow, prefix.kv[-1], prefix.mask))
    recipe = found.pop("nothing: the recipe")
    assert recipe is not None
    assert 0 < recipe < 2e-2
    assert all(error is not None and error > 0 for error in found.values())
    assert found["all of them"] > recipe  # type: ignore[operator]
    massive = errors(random_subject(model.config, massive=True))
    assert massive["nothing: the recipe"] is not None
    assert (massive["normalisation"] > 0.5) == (precision == "fp16")  # type: ignore[operator]


def test_generation_is_measured_beside_its_twins(
    model: LatteFlow, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run_command: RunCommand
) -> None:
    monkeypatch.setattr("export.benchmarks.generation.load_config", lambda _: model.config)
    monkeypatch.setattr("export.benchmarks.generation.load_vae_config", lambda _: dict(model.vae.config))
    plot = tmp_path / "plot.png"
    options = ("--rounds", 1, "--images", 1, "--images", 2, "--no-compile", "--plot", plot, "--json")
    code, out, error = run_command("bench", "generation", *options)
    assert code == 0, error
    report = json.loads(out)
    assert set(report["step_seconds"]) == {"experts", "dense twin", "experts, int8", "PyTorch eager"}
    assert all(min(times) > 0 for by_images in report["step_seconds"].values() for times in by_images.values())
    (limits,) = report["limits"]
    assert set(limits["share"]) == {"experts", "dense twin", "autoregressive twin, a token"}
    assert all(0 < share["1"] < 1 for share in limits["share"].values())
    assert [row["model"] for row in report["beside_the_paper"]] == ["LaTtE-Flow", "Vanilla", "Janus Pro"]
    assert set(report["call_seconds"]) >= {"experts, 20 steps", "autoregressive twin, 576 tokens"}
    assert all(set(calls) == {"1", "2"} for calls in report["call_seconds"].values())
    assert plot.stat().st_size > 10_000
    whole = report["whole_call_seconds"]
    assert next(iter(whole)) == "experts, 20 steps"
    assert {"experts, distilled, 2 steps", "experts, int8, distilled, 4 steps", "dense twin, 20 steps"} <= set(whole)
    assert whole["experts, distilled, 2 steps"]["1"] < whole["experts, 20 steps"]["1"]


def test_variants_are_trained_within_a_budget_and_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run_command: RunCommand
) -> None:
    """A second call finds the finished runs, and gives the same numbers."""
    monkeypatch.setattr("export.benchmarks.ablations.HELD_OUT_IMAGES", 32)
    monkeypatch.setattr("export.benchmarks.ablations.EVALUATION_BATCH", 32)
    variants = (Variant(1), Variant(4), Variant(4, residual=False))
    monkeypatch.setattr("export.benchmarks.ablations.VARIANTS", variants)
    command = ("bench", "ablations", "--out", tmp_path, "--steps", 20, "--batch-size", 2, "--json")
    reports = []
    for _ in range(2):
        code, out, error = run_command(*command)
        assert code == 0, error
        reports.append(json.loads(out))
    first, second = reports
    assert [variant["layers"] for variant in first["variants"]] == [8, 2, 2]
    assert first["variants"] == second["variants"]
    # Gates begin at zero: after so few steps the last two variants may have equal losses, but not equal weights.
    trained = [load_file(tmp_path / v["variant"] / "checkpoint-20" / "state.safetensors") for v in first["variants"]]
    gates = [
        [t for name, t in state.items() if name.startswith("parameter") and "attention_gate" in name]
        for state in trained
    ]
    assert any(gate.abs().max() > 0 for gate in gates[1])
    assert gates[2] == []
    assert all(0.5 < variant["held_out_loss"] < 5 for variant in first["variants"])


def test_steps_are_scored_and_compared_with_many(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run_command: RunCommand
) -> None:
    settings = (("Euler", 4), ("Euler", 20), ("Heun", 4), ("Euler, guidance for t < 0.5", 20))
    monkeypatch.setattr("export.benchmarks.steps.SETTINGS", settings)
    monkeypatch.setattr("export.benchmarks.steps.PSNR_IMAGES", 4)
    monkeypatch.setattr("export.benchmarks.steps.FINE_STEPS", 60)
    monkeypatch.setattr("export.benchmarks.steps.DISTILLED_STEPS", (2, 8))
    options = ("--prompts", 4, "--plot", tmp_path / "steps.png", "--distilled", "shapes", "--json")
    code, out, error = run_command("bench", "steps", *options)
    assert code == 0, error
    report = json.loads(out)
    assert report["guidance_scale"] == 2.0  # the checkpoint's
    points = {(point["sampler"], point["steps"]): point for point in report["points"]}
    assert {setting: point["rows"] for setting, point in points.items()} == dict(
        zip((*settings, ("distilled", 2), ("distilled", 8)), (8, 40, 16, 30, 2, 8), strict=True)
    )
    assert points["Euler", 20]["psnr_db"] > points["Euler", 4]["psnr_db"]
    assert (tmp_path / "steps.png").stat().st_size > 10_000


def test_memory_is_measured_in_processes_of_their_own(run_command: RunCommand) -> None:
    code, out, error = run_command("bench", "memory", "--json")
    assert code == 0, error
    report = json.loads(out)
    assert report["export"]["peak_mb"] > report["export"]["interpreter_mb"] > 100
    every, one = report["draw"]
    assert (every["low_memory"], one["low_memory"]) == (False, True)
    assert one["peak_mb"] < every["peak_mb"]
    assert min(every["first_image_seconds"], every["second_image_seconds"]) > 0


def test_a_random_checkpoint_is_a_checkpoint(tmp_path: Path, run_command: RunCommand) -> None:
    config = one_group(PAPER, 2).model_copy(
        update={
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_attention_heads": 4,
            "mrope_section": (2, 3, 3),
            "latent_channels": 4,
            "latents_mean": (0.0,) * 4,
            "latents_std": (1.0,) * 4,
            "vae_scale_factor": 4,
        }
    )
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}
    total = write_random_checkpoint(tmp_path / "random", config, vision, 600, (32, 64, 64))
    model = load_checkpoint(tmp_path / "random")
    assert total == sum(parameter.numel() for parameter in model.parameters())
    code, _, error = run_command(
        "export", tmp_path / "random", tmp_path / "bundle", "--precision", "fp16", "--no-verify"
    )
    assert code == 0, error


def test_what_got_slower_beyond_the_noise_is_flagged(tmp_path: Path, run_command: RunCommand) -> None:
    machine = {"processor": "x", "cores": "2"}

    def report(name: str, **times: object) -> Path:
        path = tmp_path / name
        path.write_text(json.dumps({"machine": machine} | times))
        return path

    old = report("old.json", step_seconds={"experts": [1.0, 1.01, 0.99]}, tokens_per_second=[50.0, 51.0, 49.0])
    same = report("same.json", step_seconds={"experts": [1.05, 1.04, 1.06]}, tokens_per_second=[49.0, 50.0, 50.0])
    slow = report("slow.json", step_seconds={"experts": [1.5, 1.52, 1.48]}, tokens_per_second=[70.0, 71.0, 69.0])
    noisy = report("noisy.json", step_seconds={"experts": [1.5, 1.0, 2.0]}, tokens_per_second=[50.0, 50.0, 50.0])
    assert run_command("bench", "compare", old, same)[0] == 0
    code, out, _ = run_command("bench", "compare", old, slow)
    assert code == 1
    assert "slower" in out
    assert "faster" in out
    assert run_command("bench", "compare", old, noisy)[0] == 0


def test_single_numbers_and_lists_of_objects_are_compared_too(tmp_path: Path, run_command: RunCommand) -> None:
    def report(name: str, seconds: float) -> Path:
        path = tmp_path / name
        stages = [{"what": "vlm", "runs": 1, "seconds": 1.0}, {"what": "expert_0", "runs": 5, "seconds": seconds}]
        path.write_text(json.dumps({"machine": {}, "stages": stages, "same_seconds": True}))
        return path

    assert run_command("bench", "compare", report("a", 1.0), report("b", 1.2))[0] == 0  # one number is a noisy one
    code, out, _ = run_command("bench", "compare", report("a", 1.0), report("b", 1.5))
    assert code == 1
    assert "expert_0" in out


def test_stages_are_told_and_compared_with_an_old_report(bundle: Path, tmp_path: Path, run_command: RunCommand) -> None:
    trace = tmp_path / "trace.json"
    options = ("--bundle", bundle, "--rounds", 3, "--trace", trace)
    code, out, error = run_command("bench", "stages", *options, "--json")
    assert code == 0, error
    report = json.loads(out)
    names = {stage["what"] for stage in report["stages"]}
    assert names >= {"tokenise", "vlm", "expert_0", "expert_1", "solver_step", "vae_decoder", "host, between steps"}
    assert sum(stage["seconds"] for stage in report["stages"]) == pytest.approx(report["seconds"], rel=0.5)
    assert 0 < report["host_share_of_a_step"] < 1
    assert json.loads(trace.read_text())["traceEvents"]
    report["stages"] = [stage | {"seconds": stage["seconds"] / 1000} for stage in report["stages"]]
    (tmp_path / "old.json").write_text(json.dumps(report))
    code, out, _ = run_command("bench", "stages", *options, "--compare", tmp_path / "old.json")
    assert code == 1
    assert "slower" in out
    code, _, error = run_command("bench", "stages", *options, "--compare", tmp_path / "nothing.json")
    assert code == 2
    assert len(error.strip().splitlines()) == 1


def test_calls_of_bundles_are_compared_with_the_first(bundle: Path, tmp_path: Path, run_command: RunCommand) -> None:
    fewer = Path(shutil.copytree(bundle, tmp_path / "fewer"))
    manifest = json.loads((fewer / "manifest.json").read_text())
    manifest["sampling"]["num_inference_steps"] = 2
    (fewer / "manifest.json").write_text(json.dumps(manifest))
    options = ("--bundle", bundle, "--bundle", fewer, "--images", 2, "--images", 1, "--rounds", 3)
    code, out, error = run_command("bench", "calls", *options, "--json")
    assert code == 0, error
    report = json.loads(out)
    assert list(report["images"]) == ["1", "2"]
    for images, (whole, short) in report["images"].items():
        assert (whole["bundle"], short["bundle"]) == (str(bundle), str(fewer))
        assert (whole["steps"], short["steps"]) == (20, 2)
        assert whole["times_as_fast"] == 1 < short["times_as_fast"], images
    (tmp_path / "old.json").write_text(out)
    assert run_command("bench", "compare", tmp_path / "old.json", tmp_path / "old.json")[0] == 0
    assert run_command("bench", "calls", "--bundle", bundle, "--images", 0)[0] == 2


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"machine": {}, "other": [1.0]}'])
def test_what_is_no_report_is_refused_in_one_line(content: str, tmp_path: Path, run_command: RunCommand) -> None:
    (tmp_path / "old.json").write_text(content)
    code, _, error = run_command("bench", "compare", tmp_path / "old.json", tmp_path / "old.json")
    assert code == 2
    assert len(error.strip().splitlines()) == 1
    assert error.startswith("error: ")


def test_batches_are_measured_beside_calls_of_the_pipeline(bundle: Path, run_command: RunCommand) -> None:
    options = ("--images", 4, "--steps", 1, "--size", 2, "--rounds", 1, "--rows", 3, "--row-steps", 1, "--json")
    code, out, error = run_command("bench", "batch", "--bundle", bundle, *options)
    assert code == 0, error
    report = json.loads(out)
    assert set(report["sides"]) == {"pipe(), 2 at a time", "run-batch, --batch-size 2"}
    assert report["ratio"] > 0
    (job,) = report["growth"]
    assert job["rows"] == 3
    assert min(job["start_seconds"], job["seconds_per_row"], job["peak_mb"]) > 0
