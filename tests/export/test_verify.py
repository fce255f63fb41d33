"""The ladder finds what is wrong and says where."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import SanaMultiscaleLinearAttention

from export.bundle import export_bundle
from export.dc_ae import LinearAttentionProcessor
from export.parity import bias_levels, psnr_db, relative_error, relative_row
from export.reference import Reference
from export.verify import FiniteWatch, verify_bundle
from latte.model import LatteFlow
from runtime.backends import open_backend
from runtime.errors import EngineError, InputError
from runtime.flow_time import ExpertSchedule
from runtime.manifest import load_manifest
from runtime.pipeline import LatteFlowPipeline
from tests.tiny import scale_weight, tiny_model


def test_a_faithful_bundle_passes_every_rung(
    bundle: Path, checkpoint: Path, tmp_path: Path, run_command: Callable[..., tuple[int, str, str]]
) -> None:
    """Its files have several hard links, as after `latte-flow repository`."""
    linked = shutil.copytree(bundle, tmp_path / "linked", copy_function=os.link)
    code, out, error = run_command("verify", linked, checkpoint, "--json")
    assert code == 0, error
    report = json.loads(out)
    assert report["passed"]
    assert {row["rung"] for row in report["rows"]} == {
        "input",
        "weights",
        "engine",
        "step",
        "trajectory",
        "image",
        "answer",
    }
    worst = max(row["value"] for row in report["rows"] if row["metric"] == "relative_error")
    assert worst < 1e-4


def test_a_value_that_is_not_finite_is_traced_to_its_engine(
    bundle_copy: Path, checkpoint: Path, run_command: Callable[..., tuple[int, str, str]]
) -> None:
    scale_weight(bundle_copy, "expert_1", "heads", float("inf"))
    code, out, _ = run_command("verify", bundle_copy, checkpoint, "--json")
    assert code == 1
    first = next(row for row in json.loads(out)["rows"] if row["rung"] == "engine" and not row["passed"])
    assert first["what"].startswith("expert_1")
    assert first["note"].endswith("values of expert_1's velocity (group 1) are not finite")


def test_the_step_at_which_a_trajectory_is_lost_is_named(bundle: Path) -> None:
    watch = FiniteWatch(open_backend("cpu"))

    def spoil(_: object, step: int, __: float, values: dict[str, np.ndarray]) -> dict[str, np.ndarray] | None:
        return {"latents": values["latents"] * np.float32(np.nan)} if step == 1 else None

    with LatteFlowPipeline(bundle, load_manifest(bundle), watch) as pipe:
        pipe("a", num_inference_steps=4, output_type="latent")
        assert watch.first is None
        watch.reset()
        with pytest.raises(EngineError, match="not finite"):
            pipe("a", num_inference_steps=4, callback_on_step_end=spoil, output_type="latent")
    assert watch.first is not None
    assert watch.first.endswith("values of expert_1's velocity (group 1) are not finite after 2 steps")


def test_a_wrong_weight_is_traced_to_its_engine_and_group(
    bundle_copy: Path, checkpoint: Path, run_command: Callable[..., tuple[int, str, str]]
) -> None:
    """One weight of the second expert is 2 % off, the manifest says it is meant to be so."""
    scale_weight(bundle_copy, "expert_1", "heads", 1.02)
    code, _, error = run_command("verify", bundle_copy, checkpoint)
    assert code == 1
    assert "first at rung weights: 46 weights of expert_1, group 1: differences: flow.heads.0." in error


def test_a_checkpoint_of_another_form_is_said_so(bundle: Path) -> None:
    config = tiny_model().config.model_copy(update={"schedule": ExpertSchedule.uniform(2)})
    other = tiny_model()
    other.config = config
    with pytest.raises(InputError, match="another form"):
        verify_bundle(bundle, Reference(other, None))


def test_the_shortest_prompts_that_a_template_allows_are_verified_and_calibrated(
    checkpoint: Path, model: LatteFlow, tmp_path: Path
) -> None:
    """Prompts of a fixed length needed 32 tokens to verify and 42 to calibrate."""
    (shortest,) = map(len, model.tokenize([""]))
    copy = Path(shutil.copytree(checkpoint, tmp_path / "short"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"max_prompt_tokens": shortest}))
    manifest, failed = export_bundle(copy, tmp_path / "bundle", precision="int8")
    assert not failed
    assert manifest.prompt.max_tokens == shortest
    assert any(engine.quantization and engine.quantization.quantized for engine in manifest.engines)


def test_a_reference_that_is_constant_or_not_finite_proves_nothing() -> None:
    same = np.ones((2, 3))
    for value, reference in (
        (same, same),
        (np.arange(3.0), np.array([0.0, 1.0, np.nan])),
        (np.array([0.0, np.inf, 2.0]), np.arange(3.0)),
    ):
        row = relative_row("engine", "x", value, reference, tolerance=1.0)
        assert (row.value, row.passed) == (None, False)
    assert bias_levels(np.zeros((4, 4), np.uint8), np.zeros((4, 4), np.uint8)) is None
    assert psnr_db(np.zeros((4, 4), np.uint8), np.zeros((4, 4), np.uint8)) is None


def test_the_measures_are_what_they_say() -> None:
    assert relative_error(np.array([3.0, 4.4]), np.array([3.0, 4.0])) == pytest.approx(0.08)
    a = np.array([[0, 255]], np.uint8)
    assert psnr_db(a, a) == 100.0
    assert psnr_db(np.array([[10, 255]], np.uint8), a) == pytest.approx(10 * np.log10(255**2 / 50))
    assert bias_levels(np.array([[10, 253]], np.uint8), a) == 10
    assert bias_levels(np.array([[0, 253]], np.uint8), a) == -2
    assert relative_error(np.zeros(2), np.zeros(2)) == 0
    assert relative_error(np.zeros(2), np.zeros(3)) == math.inf


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (8, 8), (5, 9)])
def test_linear_attention_equals_both_of_diffusers_forms(height: int, width: int) -> None:
    """diffusers switches to the quadratic form at H·W <= head_dim = 8; the traced form serves both."""
    torch.manual_seed(0)
    attention = SanaMultiscaleLinearAttention(
        16, 16, attention_head_dim=8, norm_type="rms_norm", residual_connection=True
    ).eval()
    x = torch.randn(2, 16, height, width)
    with torch.no_grad():
        expected = attention(x)
        attention.processor = LinearAttentionProcessor()
        torch.testing.assert_close(attention(x), expected, rtol=1e-4, atol=1e-5)
