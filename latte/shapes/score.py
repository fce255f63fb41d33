"""Scores checkpoints like `shapes` on combinations of attributes that training never saw."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import numpy as np

from latte.score import Answer, AnswerScore, Draw, DrawingScore, Exam, Report, score_prompts, score_questions
from latte.shapes.captions import caption, describe, short_caption, unseen_phrasing
from latte.shapes.questions import DESCRIBE, questions
from latte.shapes.reader import ATTRIBUTES, judge, read_image
from latte.shapes.scenes import Scene, draw, sample_scene

Phrasing = Literal["plain", "unseen", "short"]
"""How prompts are phrased: plain captions, or sentences that training never uses, both of which state every attribute;
or only a colour and a kind, as in "a red star"."""


def held_out_prompts(count: int, shapes: int, seed: int, phrasing: Phrasing = "plain") -> list[tuple[str, Scene]]:
    """Returns prompts of held-out scenes, with the scenes as stated. Short ones are of the first shape only."""
    rng = np.random.default_rng([seed, shapes])
    scenes = [sample_scene(rng, held_out=True, count=shapes) for _ in range(count)]
    if phrasing == "short":
        return [short_caption(scene) for scene in scenes]
    return [unseen_phrasing(scene, rng) if phrasing == "unseen" else caption(scene, rng, full=True) for scene in scenes]


def score_drawing(
    draw_images: Draw,
    count: int,
    shapes: int,
    seed: int = 0,
    on_progress: Report = lambda _: None,
    phrasing: Phrasing = "plain",
) -> DrawingScore:
    """Scores images of held-out prompts by their pixels.

    Args:
        draw_images: generates images from prompts.
        count: number of prompts.
        shapes: number of shapes in each prompt, 1 or 2.
        on_progress: called after each batch with its number of prompts.
    """
    prompts = held_out_prompts(count, shapes, seed, phrasing)

    def judge_images(scenes: Sequence[Scene], images: np.ndarray) -> list[dict[str, bool]]:
        return [judge(scene, read_image(image)) for scene, image in zip(scenes, images, strict=True)]

    return score_prompts(draw_images, prompts, judge_images, ATTRIBUTES, seed, on_progress)


def score_answers(answer: Answer, count: int, seed: int = 0, on_progress: Report = lambda _: None) -> AnswerScore:
    """Scores answers to one random question about each of `count` rendered held-out scenes.

    Args:
        answer: answers questions about images.
        count: number of scenes.
        on_progress: called after each batch with its number of questions.
    """
    rng = np.random.default_rng([seed, 7])
    rows = [_sample_question(rng) for _ in range(count)]
    asked = [(draw(scene), question, expected) for scene, question, expected in rows]
    return score_questions(answer, asked, kind_of_question, on_progress)


def _sample_question(rng: np.random.Generator) -> tuple[Scene, str, str]:
    scene = sample_scene(rng, held_out=True)
    asked = [*questions(scene, rng), (DESCRIBE, describe(scene))]
    question, expected = asked[rng.integers(len(asked))]
    return scene, question, expected


def kind_of_question(question: str) -> str:
    """Returns what a question is about, such as "colour" or "relation"."""
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


EXAM = Exam(
    ATTRIBUTES,
    {
        "1 shape": partial(score_drawing, shapes=1),
        "2 shapes": partial(score_drawing, shapes=2),
        "1 shape, unseen words": partial(score_drawing, shapes=1, phrasing="unseen"),
        "1 shape, colour and kind only": partial(score_drawing, shapes=1, phrasing="short"),
    },
    {"answers": score_answers},
)
"""What `latte-flow score` asks of a checkpoint like `shapes`."""
