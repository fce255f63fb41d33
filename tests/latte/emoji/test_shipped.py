"""The shipped checkpoint draws emoji that it recognises itself. docs/emoji.md has the shares that a judge finds right.

The judge needs the images of npm's package, which the tests do not fetch.
"""

from __future__ import annotations

from latte.checkpoint import load_checkpoint, load_image_processor, resolve_checkpoint
from latte.emoji.questions import WHAT
from latte.score import answer

NAMES = (
    "red apple", "octopus", "rocket", "birthday cake", "cat face", "dog face", "crescent moon", "house building",
    "strawberry", "banana", "jack-o-lantern", "crab", "guitar", "cactus", "tropical fish", "honeybee",
    "slice of pizza", "fire", "snowman", "sunflower",
)  # fmt: skip


def test_it_recognises_what_it_draws() -> None:
    """It recognised 11 of these small and 11 large when it was made; a guess is right once in 1,370 times."""
    model = load_checkpoint("emoji")
    processor = load_image_processor(resolve_checkpoint("emoji"))
    told = []
    for size in ("small", "large"):
        prompts = [f"a {size} {name} on a navy background" for name in NAMES]
        images = model.generate(prompts, seed=list(range(len(NAMES))))
        told += answer(model.vlm, model.tokenizer, processor, images, [WHAT] * len(NAMES))
    right = [name for name, what in zip(NAMES * 2, told, strict=True) if what == name]
    assert len(right) >= 18, list(zip(NAMES * 2, told, strict=True))
