"""Distances of sets of images: against closed forms and plain formulas, and the command on a data set."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
from PIL import Image

from latte.checkpoint import load_checkpoint, load_image_processor
from latte.fidelity.distances import frechet_distance, kernel_distance
from latte.fidelity.features import image_features
from tests.latte.data.worlds import folder_with_metadata

RNG = np.random.default_rng(0)
FEATURES = RNG.standard_normal((200, 6)) @ RNG.standard_normal((6, 6))
OTHERS = 0.5 + RNG.standard_normal((150, 6)) @ RNG.standard_normal((6, 6))


def test_the_frechet_distance_has_its_closed_forms() -> None:
    centred = FEATURES - FEATURES.mean(axis=0)
    shift = np.arange(6.0)
    assert frechet_distance(FEATURES, FEATURES) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(FEATURES, FEATURES + shift) == pytest.approx(shift @ shift)
    assert frechet_distance(centred, 3 * centred) == pytest.approx(4 * np.trace(np.cov(centred, rowvar=False)))


def test_the_frechet_distance_is_that_of_the_matrix_square_root() -> None:
    one, two = np.cov(FEATURES, rowvar=False), np.cov(OTHERS, rowvar=False)
    difference = FEATURES.mean(axis=0) - OTHERS.mean(axis=0)
    expected = difference @ difference + np.trace(one + two - 2 * scipy.linalg.sqrtm(one @ two).real)
    assert frechet_distance(FEATURES, OTHERS) == pytest.approx(expected)
    assert frechet_distance(OTHERS, FEATURES) == pytest.approx(expected)


def test_the_frechet_distance_survives_fewer_images_than_features() -> None:
    assert 0 < frechet_distance(FEATURES[:3], OTHERS[:4]) < np.inf


def test_the_kernel_distance_is_the_unbiased_sum_over_pairs() -> None:
    x, y = FEATURES[:7], OTHERS[:7]

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        pairs = [(u @ v / 6 + 1) ** 3 for i, u in enumerate(a) for j, v in enumerate(b) if a is not b or i != j]
        return float(np.mean(pairs))

    estimate = kernel_distance(x, y)
    assert estimate.mean == pytest.approx(mean(x, x) + mean(y, y) - 2 * mean(x, y))
    assert estimate.std == 0
    halves = kernel_distance(FEATURES[::2], FEATURES[1::2], subset_size=50)
    assert abs(halves.mean) < 3 * halves.std
    assert kernel_distance(FEATURES, FEATURES + 4, subset_size=50).mean > 3 * halves.std


def test_features_are_the_towers_tokens_averaged_over_each_image(checkpoint: Path) -> None:
    vlm, processor = load_checkpoint(checkpoint).vlm, load_image_processor(checkpoint)
    images = [RNG.integers(0, 256, (*size, 3), np.uint8) for size in ((64, 64), (64, 128), (64, 64))]
    together = image_features(vlm, processor, images)
    assert together.shape == (3, 32)
    for image, features in zip(images, together, strict=True):
        pixels = processor([image], return_tensors="pt")
        alone = vlm.model.visual(pixels["pixel_values"], pixels["image_grid_thw"]).pooler_output
        np.testing.assert_allclose(features, alone.mean(dim=0).detach(), rtol=1e-4, atol=1e-6)


def test_the_command_measures_drawn_and_given_images(
    checkpoint: Path, tmp_path: Path, run_command: Callable[..., tuple[int, str, str]]
) -> None:
    data = folder_with_metadata(tmp_path / "images" / "test", 9, (32, 24)).parent
    arguments = ("fidelity", checkpoint, "--data", data, "--num-inference-steps", 2)
    code, out, err = run_command(*arguments, "--out", tmp_path / "out", "--json")
    assert code == 0, err
    drawn = json.loads(out)
    assert (drawn["generated_images"], drawn["held_out_images"], drawn["features"]) == (9, 9, 32)
    assert drawn["frechet_distance"] > 0
    assert "with fewer images than features (32)" in err
    with Image.open(tmp_path / "out" / "generated" / "00008.png") as image:
        assert image.size == (32, 24)

    code, out, err = run_command(*arguments, "--images", tmp_path / "out" / "generated", "--json")
    assert code == 0, err
    assert json.loads(out) == pytest.approx(drawn)
    code, out, err = run_command(*arguments, "--images", tmp_path / "out" / "held-out", "--features", checkpoint)
    assert code == 0, err
    assert "9 generated and 9 held-out images" in out

    code, _, err = run_command(*arguments, "--images", tmp_path / "nothing")
    assert code == 2
    assert "contains 0 images; at least 4 are needed" in err
    code, _, err = run_command(*arguments, "--split", "train")
    assert code == 2
    assert "has no split 'train'; its splits: test" in err
