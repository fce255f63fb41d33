"""Both directions of one bundle: generate an image, ask the bundle what it shows, and compare with the pixels.

Each image has three descriptions in the canonical words of `latte.shapes.captions.describe`: the prompt's, that of the
reader of pixels, and the bundle's answer. It works for `shapes` and for checkpoints trained like it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from latte.shapes.captions import describe
from latte.shapes.questions import DESCRIBE
from latte.shapes.reader import describe_found, read_image
from latte.shapes.score import held_out_prompts
from runtime.images import contact_sheet
from runtime.pipeline import LatteFlowPipeline

Agreement = Literal["all three", "prompt and pixels", "prompt and answer", "pixels and answer", "none"]
AGREEMENTS: tuple[Agreement, ...] = (
    "all three",
    "prompt and pixels",
    "prompt and answer",
    "pixels and answer",
    "none",
)
BATCH = 25


@dataclass(frozen=True)
class RoundTrip:
    """One image with its three descriptions."""

    prompt: str
    said: str
    seen: str
    answered: str
    seed: int
    image: np.ndarray

    @property
    def agreement(self) -> Agreement:
        """Which of the three descriptions agree."""
        if self.said == self.seen == self.answered:
            return "all three"
        if self.said == self.seen:
            return "prompt and pixels"
        if self.said == self.answered:
            return "prompt and answer"
        return "pixels and answer" if self.seen == self.answered else "none"


def run_roundtrip(
    pipe: LatteFlowPipeline,
    prompts: int,
    shapes: int,
    seed: int = 0,
    on_progress: Callable[[int], None] = lambda _: None,
) -> list[RoundTrip]:
    """Generates images of held-out prompts with one or two shapes, and asks the bundle to describe each."""
    trips: list[RoundTrip] = []
    drawn = held_out_prompts(prompts, shapes, seed)
    for start in range(0, prompts, BATCH):
        part = drawn[start : start + BATCH]
        texts = [text for text, _ in part]
        seeds = [seed * 1_000_003 + start + i for i in range(len(part))]
        images = pipe(texts, seed=seeds, output_type="np").images
        answers = pipe.ask(list(images), [DESCRIBE] * len(part))
        for (text, stated), image_seed, image, answer in zip(part, seeds, images, answers, strict=True):
            seen = describe_found(read_image(image))
            trips.append(RoundTrip(text, describe(stated), seen, answer.strip(), image_seed, image))
        on_progress(len(part))
    return trips


def count_agreements(trips: Sequence[RoundTrip]) -> dict[Agreement, int]:
    """Counts the images by the kind of agreement; every kind is listed."""
    found = Counter(trip.agreement for trip in trips)
    return {agreement: found[agreement] for agreement in AGREEMENTS}


def sheet_of(trips: Sequence[RoundTrip]) -> Image.Image:
    """Returns a sheet of images with their three descriptions."""
    labels = [f"PROMPT {trip.said} | PIXELS {trip.seen} | ANSWER {trip.answered}" for trip in trips]
    return contact_sheet([Image.fromarray(trip.image) for trip in trips], labels, columns=6)
