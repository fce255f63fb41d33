"""Scores checkpoints like `emoji` on combinations of emoji that training never saw."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from latte.emoji.captions import caption, describe, unseen_phrasing
from latte.emoji.catalogue import Catalogue
from latte.emoji.questions import DESCRIBE, WHAT, questions
from latte.emoji.reader import ATTRIBUTES, Reader, judge
from latte.emoji.scenes import Scene, draw, sample_scene
from latte.score import Answer, AnswerScore, Draw, DrawingScore, Exam, Report, score_prompts, score_questions


def held_out_prompts(
    catalogue: Catalogue, count: int, emoji: int, seed: int, *, unseen_words: bool = False
) -> list[tuple[str, Scene]]:
    """Returns prompts that state every attribute of held-out scenes, with the scenes as stated.

    Args:
        emoji: number of emoji in each scene, 1 or 2.
        unseen_words: take sentences that training never uses, instead of plain captions.
    """
    rng = np.random.default_rng([seed, emoji])
    scenes = [sample_scene(catalogue.names, rng, held_out=True, count=emoji) for _ in range(count)]
    if unseen_words:
        return [unseen_phrasing(scene, rng) for scene in scenes]
    return [caption(scene, catalogue, rng, full=True) for scene in scenes]


def score_drawing(
    draw_images: Draw,
    catalogue: Catalogue,
    count: int,
    emoji: int,
    seed: int = 0,
    on_progress: Report = lambda _: None,
    *,
    unseen_words: bool = False,
) -> DrawingScore:
    """Scores images of held-out prompts by their pixels.

    Args:
        draw_images: generates images from prompts.
        count: number of prompts.
        emoji: number of emoji in each prompt, 1 or 2.
        on_progress: called after each batch with its number of prompts.
        unseen_words: take prompts in sentences that training never uses.
    """
    reader = Reader(catalogue)

    def judge_images(scenes: Sequence[Scene], images: np.ndarray) -> list[dict[str, bool]]:
        return [judge(scene, found) for scene, found in zip(scenes, reader.read(images), strict=True)]

    prompts = held_out_prompts(catalogue, count, emoji, seed, unseen_words=unseen_words)
    return score_prompts(draw_images, prompts, judge_images, ATTRIBUTES, seed, on_progress)


def score_answers(
    answer: Answer,
    catalogue: Catalogue,
    count: int,
    seed: int = 0,
    on_progress: Report = lambda _: None,
    *,
    only: str | None = None,
) -> AnswerScore:
    """Scores answers to one question about each of `count` rendered held-out scenes.

    Args:
        answer: answers questions about images.
        count: number of scenes.
        on_progress: called after each batch with its number of questions.
        only: the question to ask about images of one emoji, such as `questions.WHAT`; by default a random one about
            images of one or two.
    """
    rng = np.random.default_rng([seed, 7])
    asked = []
    for _ in range(count):
        scene = sample_scene(catalogue.names, rng, held_out=True, count=1 if only else None)
        pairs = [*questions(scene, catalogue.names, rng), (DESCRIBE, describe(scene))]
        question, expected = pairs[rng.integers(len(pairs))] if only is None else (only, _answer_to(only, scene))
        asked.append((draw(scene, catalogue), question, expected))
    return score_questions(answer, asked, kind_of_question, on_progress)


def _answer_to(question: str, scene: Scene) -> str:
    if question == WHAT:
        return " and ".join(emoji.name for emoji in scene.emoji)
    if question == DESCRIBE:
        return describe(scene)
    raise ValueError(f"expected {WHAT!r} or {DESCRIBE!r}, got {question!r}")


def kind_of_question(question: str) -> str:
    """Returns what a question is about, such as "emoji" or "place"."""
    if question == DESCRIBE:
        return "description"
    return next(kind for kind, beginnings in _KINDS if question.startswith(beginnings))


_KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("count", ("how many",)),
    ("background", ("what colour", "what is the background")),
    ("size", ("what size", "how big")),
    ("place", ("where is",)),
    ("presence", ("is there",)),
    ("emoji", ("what is this", "which emoji", "what does", "what is in the image")),
    ("emoji at a place", ("what is",)),
)


def exam(catalogue: Catalogue) -> Exam:
    """Returns what `latte-flow score` asks of a checkpoint like `emoji`."""
    drawings = partial(score_drawing, catalogue=catalogue)
    answers = partial(score_answers, catalogue=catalogue)
    return Exam(
        ATTRIBUTES,
        {
            "1 emoji": partial(drawings, emoji=1),
            "2 emoji": partial(drawings, emoji=2),
            "1 emoji, unseen words": partial(drawings, emoji=1, unseen_words=True),
        },
        {"answers": answers, WHAT: partial(answers, only=WHAT)},
    )
