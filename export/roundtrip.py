"""Both directions of one bundle: draw a prompt, ask the bundle what it sees, and let the pixels judge.

Three descriptions of each picture, all in the canonical words of `latte.scenes.describe`: what the
prompt said, what the pixel scorer reads, and what the bundle answers. It works for `shapes` and for
checkpoints of the same world.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from latte.scenes import DESCRIBE, describe
from latte.score import held_out_prompts
from latte.scorer import describe_found, read_picture
from runtime.pictures import contact_sheet
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
class Trip:
    """One picture and its three descriptions."""

    prompt: str
    said: str
    seen: str
    answered: str
    seed: int
    image: np.ndarray

    @property
    def agreement(self) -> Agreement:
        """Which of the three descriptions are the same."""
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
) -> list[Trip]:
    """Draws `prompts` held-out prompts of one or two shapes and asks the bundle to describe each picture."""
    trips: list[Trip] = []
    drawn = held_out_prompts(prompts, shapes, seed)
    for start in range(0, prompts, BATCH):
        part = drawn[start : start + BATCH]
        texts = [text for text, _ in part]
        seeds = [seed * 1_000_003 + start + i for i in range(len(part))]
        images = pipe(texts, seed=seeds, output_type="np").images
        answers = pipe.ask(list(images), [DESCRIBE] * len(part))
        for (text, stated), image_seed, image, answer in zip(part, seeds, images, answers, strict=True):
            seen = describe_found(read_picture(image))
            trips.append(Trip(text, describe(stated), seen, answer.strip(), image_seed, image))
        on_progress(len(part))
    return trips


def count_agreements(trips: Sequence[Trip]) -> dict[Agreement, int]:
    """How many pictures agree in which way; every way is listed."""
    found = Counter(trip.agreement for trip in trips)
    return {agreement: found[agreement] for agreement in AGREEMENTS}


def sheet_of(trips: Sequence[Trip]) -> Image.Image:
    """Pictures with their three descriptions."""
    labels = [f"PROMPT {trip.said} | PIXELS {trip.seen} | ANSWER {trip.answered}" for trip in trips]
    return contact_sheet([Image.fromarray(trip.image) for trip in trips], labels, columns=6)
