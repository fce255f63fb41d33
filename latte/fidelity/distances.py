"""Distances between two sets of images by their features: Fréchet and kernel distance.

Both are those of FID and KID, whose features are another network's. They can be compared only where features, images,
resizing and counts are the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SUBSETS, SUBSET_SIZE = 100, 1000
"""Of the kernel distance, as in the paper and in torch-fidelity and clean-fid."""


@dataclass(frozen=True)
class Estimate:
    """A mean over subsets, and their standard deviation."""

    mean: float
    std: float


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the squared Fréchet distance of two Gaussians with the means and covariances of features.

    d² = |m₁ − m₂|² + Tr(C₁ + C₂ − 2·(C₁·C₂)^½), after "GANs Trained by a Two Time-Scale Update Rule Converge to a Local
    Nash Equilibrium" (arXiv 1706.08500). It is too large for few images: use as many for both sets in all comparisons,
    and more than there are features.

    Args:
        first: `[N, D]`.
        second: `[M, D]`.
    """
    first, second = first.astype(np.float64), second.astype(np.float64)
    difference = first.mean(axis=0) - second.mean(axis=0)
    one, two = (np.atleast_2d(np.cov(features, rowvar=False)) for features in (first, second))
    # (C₁·C₂)^½ has the trace of the symmetric (C₁^½·C₂·C₁^½)^½, whose eigenvalues are real and not negative.
    values, vectors = np.linalg.eigh(one)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    trace_of_root = np.sqrt(np.linalg.eigvalsh(root @ two @ root).clip(0)).sum()
    return float(difference @ difference + np.trace(one) + np.trace(two) - 2 * trace_of_root)


def kernel_distance(
    first: np.ndarray, second: np.ndarray, *, subsets: int = SUBSETS, subset_size: int = SUBSET_SIZE, seed: int = 0
) -> Estimate:
    """Returns the squared maximum mean discrepancy of features with the kernel (x·y / D + 1)³, unbiased.

    "Demystifying MMD GANs" (arXiv 1801.01401). It may be negative, and does not depend on the number of images but for
    its deviation.

    Args:
        first: `[N, D]`.
        second: `[M, D]`.
        subsets: number of random subsets that are averaged.
        subset_size: images of each set in a subset; at most all.
        seed: of the subsets.
    """
    rng = np.random.default_rng(seed)
    size = min(subset_size, len(first), len(second))
    first, second = first.astype(np.float64), second.astype(np.float64)
    distances = []
    for _ in range(subsets if size < max(len(first), len(second)) else 1):
        x, y = (features[rng.choice(len(features), size, replace=False)] for features in (first, second))
        within = sum(kernel.sum() - np.trace(kernel) for kernel in (_kernel(x, x), _kernel(y, y)))
        distances.append(within / (size * (size - 1)) - 2 * _kernel(x, y).mean())
    return Estimate(float(np.mean(distances)), float(np.std(distances)))


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3
