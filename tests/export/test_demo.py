"""`latte-flow demo`: the whole way from the shipped checkpoint to pictures of its prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from export.demo import PROMPTS
from latte.scenes import Scene, Shape
from latte.scorer import judge, read_picture
from runtime.manifest import load_manifest
from runtime.pipeline import LatteFlowPipeline

SHOWN = (
    Scene((Shape("circle", "red", "large", "center"),), "white"),
    Scene((Shape("star", "yellow", "medium", "top right"),), "navy"),
    Scene((Shape("diamond", "cyan", "small", "left"),), "black"),
    Scene((Shape("cross", "purple", "large", "bottom"),), "beige"),
)
"""The demo's prompts of one shape. Kinds, sizes and two shapes are not asserted: see docs/shapes.md."""


def test_the_demo_verifies_and_draws_its_prompts(
    tmp_path: Path, run_command: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, error = run_command("demo", "--out", tmp_path / "demo")
    assert code == 0, error
    for name in ("grid.png", "trajectory.png"):
        path = tmp_path / "demo" / name
        assert str(path) in out
        with Image.open(path) as picture:
            assert min(picture.size) > 300
    parity = load_manifest(tmp_path / "demo" / "bundle").parity
    assert parity
    assert all(row.passed for row in parity)

    with LatteFlowPipeline.from_pretrained(tmp_path / "demo" / "bundle") as pipe:
        images = pipe(PROMPTS, seed=0, output_type="np").images
    for prompt, scene, image in zip(PROMPTS[:4], SHOWN, images[:4], strict=True):
        verdict = judge(scene, read_picture(np.asarray(image)))
        assert all(verdict[name] for name in ("count", "background", "colour", "position")), (prompt, verdict)
