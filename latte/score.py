"""Scores of a checkpoint on what its training never saw: the share of prompts and questions that comes out right."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from transformers import Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

BATCH = 50
"""Prompts or questions per batch."""
MAX_EXAMPLES = 100
"""Largest number of images that a score keeps as examples."""

SceneT = TypeVar("SceneT")
Draw = Callable[[Sequence[str], Sequence[int]], np.ndarray]
"""Maps prompts and seeds to images, `[B, 64, 64, 3]` uint8."""
Answer = Callable[[Sequence[np.ndarray], Sequence[str]], list[str]]
"""Maps images, each `[64, 64, 3]` uint8, and one question about each to answers."""
Report = Callable[[int], None]
"""Called after each batch with its number of prompts or questions."""


@dataclass(frozen=True)
class JudgedImage:
    """An image of a prompt."""

    prompt: str
    seed: int
    image: np.ndarray
    wrong: tuple[str, ...]
    """The attributes that are wrong."""

    @property
    def label(self) -> str:
        """The prompt, and what is wrong."""
        return f"{self.prompt} | WRONG: {', '.join(self.wrong)}" if self.wrong else self.prompt


@dataclass
class DrawingScore:
    """Counts of right images, for prompts of one kind."""

    prompts: int = 0
    right: dict[str, int] = field(default_factory=dict)
    """Number of images that have an attribute right, by attribute.

    `all` counts images without any error, `attributes` those that may have specks, blur or faint traces besides.
    """
    stated: dict[str, int] = field(default_factory=dict)
    """Number of prompts that state an attribute, by attribute."""
    failures: list[JudgedImage] = field(default_factory=list)
    examples: list[JudgedImage] = field(default_factory=list)
    """The first images, right or wrong."""

    def share(self, attribute: str = "all") -> float:
        """Returns the share of images that have an attribute right, of those whose prompt states it."""
        return self.right.get(attribute, 0) / max(1, self.stated.get(attribute, 0))


@dataclass
class AnswerScore:
    """Counts of right answers, by kind of question."""

    asked: dict[str, int] = field(default_factory=dict)
    right: dict[str, int] = field(default_factory=dict)
    failures: list[tuple[str, str, str]] = field(default_factory=list)
    """(question, expected, answer)."""

    def share(self) -> float:
        """Returns the share of right answers over all kinds."""
        return sum(self.right.values()) / max(1, sum(self.asked.values()))


class ScoreDrawings(Protocol):
    """Scores drawings of one kind of prompts."""

    def __call__(self, *, draw_images: Draw, count: int, seed: int, on_progress: Report) -> DrawingScore: ...


class ScoreAnswers(Protocol):
    """Scores answers to one kind of questions."""

    def __call__(self, *, answer: Answer, count: int, seed: int, on_progress: Report) -> AnswerScore: ...


@dataclass(frozen=True)
class Exam:
    """What the checkpoints of a world are scored on."""

    attributes: Sequence[str]
    """What is judged of an image, besides "all"; the last is whether it is free of specks, blur and faint traces."""
    drawings: Mapping[str, ScoreDrawings]
    """By kind of prompts."""
    answers: Mapping[str, ScoreAnswers]
    """By kind of questions; the first is of all kinds."""


def score_prompts(
    draw_images: Draw,
    prompts: Sequence[tuple[str, SceneT]],
    judge_images: Callable[[Sequence[SceneT], np.ndarray], Sequence[dict[str, bool]]],
    attributes: Sequence[str],
    seed: int = 0,
    on_progress: Report = lambda _: None,
) -> DrawingScore:
    """Scores images of prompts by their pixels.

    Args:
        draw_images: generates images from prompts.
        prompts: each with the scene that it states.
        judge_images: says for each scene and image, `[B, 64, 64, 3]` uint8, which attributes are right, and `all`.
        attributes: the attributes that a failure may name; see `Exam`.
        on_progress: called after each batch with its number of prompts.
    """
    result = DrawingScore()
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        seeds = [seed * 1_000_003 + start + i for i in range(len(part))]
        images = draw_images([prompt for prompt, _ in part], seeds)
        verdicts = judge_images([stated for _, stated in part], images)
        for (prompt, _), image_seed, image, verdict in zip(part, seeds, images, verdicts, strict=True):
            wrong = () if verdict["all"] else tuple(name for name in attributes if not verdict.get(name, True))
            judged = JudgedImage(prompt, image_seed, image, wrong)
            if len(result.examples) < MAX_EXAMPLES:
                result.examples.append(judged)
            result.prompts += 1
            named = all(right for name, right in verdict.items() if name not in ("all", attributes[-1]))
            for attribute, right in {**verdict, "attributes": named}.items():
                result.stated[attribute] = result.stated.get(attribute, 0) + 1
                result.right[attribute] = result.right.get(attribute, 0) + right
            if not verdict["all"]:
                result.failures.append(judged)
        on_progress(len(part))
    return result


def score_questions(
    answer: Answer,
    asked: Sequence[tuple[np.ndarray, str, str]],
    kind_of: Callable[[str], str],
    on_progress: Report = lambda _: None,
) -> AnswerScore:
    """Scores answers to questions about images.

    Args:
        answer: answers questions about images.
        asked: image, `[64, 64, 3]` uint8, question, and expected answer.
        kind_of: returns what a question is about.
        on_progress: called after each batch with its number of questions.
    """
    result = AnswerScore()
    for start in range(0, len(asked), BATCH):
        rows = asked[start : start + BATCH]
        answers = answer([image for image, _, _ in rows], [question for _, question, _ in rows])
        for (_, question, expected), given in zip(rows, answers, strict=True):
            kind = kind_of(question)
            right = " ".join(given.split()) == expected
            result.asked[kind] = result.asked.get(kind, 0) + 1
            result.right[kind] = result.right.get(kind, 0) + right
            if not right:
                result.failures.append((question, expected, given))
        on_progress(len(rows))
    return result


@torch.no_grad()
def answer(
    vlm: Qwen2VLForConditionalGeneration,
    tokenizer: Any,
    image_processor: Qwen2VLImageProcessorPil,
    images: Sequence[np.ndarray],
    questions: Sequence[str],
    max_new_tokens: int = 40,
) -> list[str]:
    """Answers one question about each image with transformers' own `generate`, greedily.

    Args:
        images: each `[height, width, 3]` uint8.
        questions: one for each image.
        max_new_tokens: limit of an answer in tokens.
    """
    pixels = image_processor(list(images), return_tensors="pt")
    image_token = "<|image_pad|>"
    texts = []
    for question, grid in zip(questions, pixels["image_grid_thw"].tolist(), strict=True):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        tokens = grid[0] * grid[1] * grid[2] // image_processor.merge_size**2
        texts.append(text.replace(image_token, image_token * tokens))
    encoded = tokenizer(texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
    generated = vlm.generate(
        input_ids=encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        mm_token_type_ids=(encoded["input_ids"] == vlm.config.image_token_id).int(),
        pixel_values=pixels["pixel_values"],
        image_grid_thw=pixels["image_grid_thw"],
        do_sample=False,
        max_new_tokens=max_new_tokens,
    )
    return tokenizer.batch_decode(generated[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
