"""PNG files of drawn images by the threads of the service's pool: does their rate grow with the cores?"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from model_repository.outbox import Outbox
from runtime.pipeline import LatteFlowPipeline

LARGE_SIDE = 256
"""Images are also measured at this width, the paper's, where Python's own share of the work is small."""
IMAGES = 64
"""Images that are encoded at once."""
SECONDS = 1.0


@dataclass(frozen=True)
class PngResult:
    """How many images of one size the pool encodes."""

    size: str
    threads: int
    images_per_second: float


def png_rates(bundle: Path) -> Iterator[PngResult]:
    """Measures images of the bundle's size and larger ones with 1, 2, 4, … threads, up to a thread for each core."""
    with LatteFlowPipeline.from_pretrained(bundle) as pipe:
        image = pipe("a red star", num_inference_steps=pipe.manifest.schedule.num_groups, seed=0).images[0]
    large = image.resize((LARGE_SIDE, LARGE_SIDE * image.height // image.width), Image.Resampling.BICUBIC)
    for drawn in (image, large):
        pixels = np.asarray(drawn)
        for threads in thread_counts(os.cpu_count() or 1):
            yield PngResult(f"{drawn.width}x{drawn.height}", threads, png_rate(pixels, threads))


def thread_counts(cores: int) -> list[int]:
    """Returns the powers of two below the number of cores, and that number."""
    return [2**power for power in range((cores - 1).bit_length())] + [cores]


def png_rate(pixels: np.ndarray, threads: int) -> float:
    """Returns how many images `[height, width, 3]` uint8 a service with so many encoding threads encodes a second."""
    deaths: list[BaseException] = []
    outbox = Outbox(deaths.append, encoders=threads)
    try:
        _encode(outbox, pixels)  # starts the threads
        began, encoded = time.perf_counter(), 0
        while (seconds := time.perf_counter() - began) < SECONDS:
            _encode(outbox, pixels)
            encoded += IMAGES
    finally:
        outbox.close()
    return encoded / seconds


def _encode(outbox: Outbox, pixels: np.ndarray) -> None:
    for file in [outbox.encode(pixels, "png") for _ in range(IMAGES)]:
        file.result()
