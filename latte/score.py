"""How good a `shapes`-like checkpoint is, on combinations that training never saw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from latte.scenes import DESCRIBE, Scene, caption, describe, draw, questions, sample_scene
from latte.scorer import ATTRIBUTES, judge, read_picture

BATCH = 50
EXAMPLES = 20

Draw = Callable[[Sequence[str], Sequence[int]], np.ndarray]
"""Prompts and seeds to pictures `[B, 64, 64, 3]` uint8."""
Answer = Callable[[Sequence[np.ndarray], Sequence[str]], list[str]]
"""Pictures and a question about each to answers."""


@dataclass(frozen=True)
class Failure:
    """A picture that is not what its prompt says."""

    prompt: str
    seed: int
    image: np.ndarray
    wrong: tuple[str, ...]


@dataclass
class DrawingScore:
    """Counts of right pictures, for prompts of one number of shapes."""

    prompts: int = 0
    right: dict[str, int] = field(default_factory=dict)
    stated: dict[str, int] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    examples: list[tuple[str, np.ndarray]] = field(default_factory=list)
    """The first prompts with their pictures, right or wrong."""

    def share(self, attribute: str = "all") -> float:
        """Share of the prompts that state an attribute whose pictures have it right."""
        return self.right.get(attribute, 0) / max(1, self.stated.get(attribute, 0))


def held_out_prompts(count: int, shapes: int, seed: int) -> list[tuple[str, Scene]]:
    """Prompts that state every attribute of held-out scenes, with what they state."""
    rng = np.random.default_rng([seed, shapes])
    return [caption(sample_scene(rng, held_out=True, count=shapes), rng, full=True) for _ in range(count)]


def score_drawing(
    draw_pictures: Draw, count: int, shapes: int, seed: int = 0, on_progress: Callable[[int], None] = lambda _: None
) -> DrawingScore:
    """Draws `count` held-out prompts of one or two shapes and judges the pictures by their pixels."""
    prompts = held_out_prompts(count, shapes, seed)
    result = DrawingScore()
    for start in range(0, count, BATCH):
        part = prompts[start : start + BATCH]
        seeds = [seed * 1_000_003 + start + i for i in range(len(part))]
        for (prompt, stated), image_seed, image in zip(
            part, seeds, draw_pictures([prompt for prompt, _ in part], seeds), strict=True
        ):
            verdict = judge(stated, read_picture(image))
            if len(result.examples) < EXAMPLES:
                result.examples.append((prompt, image))
            result.prompts += 1
            for attribute, right in verdict.items():
                result.stated[attribute] = result.stated.get(attribute, 0) + 1
                result.right[attribute] = result.right.get(attribute, 0) + right
            if not verdict["all"]:
                wrong = tuple(name for name in ATTRIBUTES if not verdict.get(name, True))
                result.failures.append(Failure(prompt, image_seed, image, wrong))
        on_progress(len(part))
    return result


@dataclass
class AnswerScore:
    """Counts of right answers by kind of question."""

    asked: dict[str, int] = field(default_factory=dict)
    right: dict[str, int] = field(default_factory=dict)
    failures: list[tuple[str, str, str]] = field(default_factory=list)
    """(question, expected, answer)."""

    def share(self) -> float:
        """Share of right answers over all kinds."""
        return sum(self.right.values()) / max(1, sum(self.asked.values()))


def score_answers(
    answer: Answer, count: int, seed: int = 0, on_progress: Callable[[int], None] = lambda _: None
) -> AnswerScore:
    """Asks one random question about each of `count` held-out scenes, drawn by the renderer."""
    rng = np.random.default_rng([seed, 7])
    result = AnswerScore()
    for start in range(0, count, BATCH):
        rows = [_sample_question(rng) for _ in range(min(BATCH, count - start))]
        answers = answer([draw(scene) for scene, _, _ in rows], [question for _, question, _ in rows])
        for (_, question, expected), given in zip(rows, answers, strict=True):
            kind = kind_of_question(question)
            right = " ".join(given.split()) == expected
            result.asked[kind] = result.asked.get(kind, 0) + 1
            result.right[kind] = result.right.get(kind, 0) + right
            if not right:
                result.failures.append((question, expected, given))
        on_progress(len(rows))
    return result


def _sample_question(rng: np.random.Generator) -> tuple[Scene, str, str]:
    scene = sample_scene(rng, held_out=True)
    asked = [*questions(scene, rng), (DESCRIBE, describe(scene))]
    question, expected = asked[rng.integers(len(asked))]
    return scene, question, expected


def kind_of_question(question: str) -> str:
    """What a question is about: "colour", "relation", …"""
    if question == DESCRIBE:
        return "description"
    for kind, words in _KINDS:
        if any(word in question for word in words):
            return kind
    return "colour (yes or no)"


_KINDS = (
    ("count", ("how many",)),
    ("background", ("background",)),
    ("relation", ("above", "below", "left of", "right of")),
    ("size", ("what size", "how big")),
    ("position", ("where is",)),
    ("kind", ("what shape", "what is the")),
    ("colour", ("what colour",)),
    ("presence", ("is there",)),
)
