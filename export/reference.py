"""What a bundle must compute, from PyTorch and transformers with the checkpoint's own files.

Nothing here comes from a bundle or from the runtime's processors: a wrong tokenizer, chat template or image processor
of a bundle would otherwise be wrong on both sides. Of the runtime only the time grid and the noise are used, which the
tests compare with formulas of their own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from latte.checkpoint import check_trained, load_checkpoint, load_image_processor, resolve_checkpoint
from latte.model import LatteFlow
from latte.sampling import SampleStep, guided
from runtime.errors import InputError
from runtime.files import sha256_of
from runtime.flow_time import initial_latents, time_grid

HASHED_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt")
"""Files of a checkpoint that its hash covers; those of a training run are left out."""
SIZES = ((1, 0, (0, 0)), (2, 3, (0, 0)), (3, 17, (1, 2)), (2, None, (0, 0)))
"""Rows, prefix tokens beyond the shortest prompt (None: up to the limit), and more latent rows and columns."""
STEPS = 8
ANSWER_TOKENS = 4
PROMPTS = ("a", "a small red circle", "a large green star above a small blue square on a white background", "")
"""Those that are longer than the model allows lose their last words."""
LOWEST_SCALES = (6.0, -4.0, 0.0)
"""Random guidance scales of each row of the solver's cases begin here; their range is 4."""
SCALES = (3.0, 1.0, 5.0, 1.5)
"""Guidance scale of each prompt."""
FAR_TOKENS = 5
"""Tokens at the end of the VLM's context."""
QUESTIONS = (
    (((3, 4), (5, 2), (1, 17), (2, 1), (1, 2)), PROMPTS[1]),
    (((2, 2),), "what is this?"),
    ((), "what colour is it?"),
)
"""Sizes of the images in tokens, and the question. They are answered as one batch."""
DIALOGUE = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is a star?"},
    {"role": "assistant", "content": "A shape."},
    {"role": "user", "content": " And  a circle?\n"},
)


@dataclass(frozen=True)
class EngineCase:
    """Inputs of one size for all engines that draw, and what PyTorch makes of them. R rows."""

    size: str
    input_ids: np.ndarray
    """`[R, P]` int64."""
    mask: np.ndarray
    """`[R, P]` bool."""
    prefix_kv: tuple[np.ndarray, ...]
    """Per expert group, `[M, 2, R, Hkv, P, D]` float32."""
    latents: np.ndarray
    """`[R, C, H, W]` float32."""
    timesteps: tuple[np.ndarray, ...]
    """Per expert group, in its interval, `[R]` float32."""
    velocities: tuple[np.ndarray, ...]
    """Per expert group, `[R, C, H, W]` float32."""
    solver_feed: Mapping[str, np.ndarray]
    """Inputs of `solver_step`: every image is guided."""
    moved: np.ndarray
    """The step of `solver_step`, `[R, C, H, W]` float32: the next latents minus those before."""
    images: np.ndarray
    """The decoded latents, `[R, height, width, 3]` uint8."""


@dataclass(frozen=True)
class FarCase:
    """A few tokens at the last positions of the VLM's context, as the last words of a long conversation have them."""

    input_ids: np.ndarray
    """`[1, FAR_TOKENS]` int64."""
    position_ids: np.ndarray
    """`[3, 1, FAR_TOKENS]` int64; time, row and column differ."""
    kv: tuple[np.ndarray, ...]
    """Per expert group, `[M, 2, 1, Hkv, FAR_TOKENS, D]` float32."""


@dataclass(frozen=True)
class SamplingCase:
    """The sampling of all `PROMPTS` in one batch."""

    noise: np.ndarray
    """`[B, C, H, W]` float32."""
    times: tuple[float, ...]
    steps: tuple[SampleStep, ...]
    images: np.ndarray
    """`[B, height, width, 3]` uint8."""

    @property
    def final(self) -> np.ndarray:
        """The last latents, `[B, C, H, W]` float32."""
        return self.steps[-1].latents.numpy()

    def latents_before(self, step: int) -> np.ndarray:
        """Returns the latents that a step starts from, `[B, C, H, W]` float32."""
        return self.noise if step == 0 else self.steps[step - 1].latents.numpy()


@dataclass(frozen=True)
class QuestionCase:
    """A question about images, and the greedy answer."""

    images: tuple[np.ndarray, ...]
    """Each `[height, width, 3]` uint8."""
    question: str
    inputs: Mapping[str, Tensor]
    """Arguments of transformers' Qwen2-VL."""
    embeds: np.ndarray | None
    """Embeddings of the image tokens, `[tokens, hidden]` float32."""
    logits: np.ndarray
    """Logits of each token of the answer, `[ANSWER_TOKENS, vocabulary]` float32."""
    tokens: np.ndarray
    """The answer, `[ANSWER_TOKENS]` int64."""


class Reference:
    """A checkpoint's answers to everything that a verification asks. Each is computed once."""

    def __init__(self, model: LatteFlow, image_processor: Any, folder: Path | None = None) -> None:
        """Takes a checkpoint.

        Args:
            model: in fp32.
            image_processor: the checkpoint's own, from transformers.
            folder: the checkpoint's, with the files of tokenizer and processor; None leaves them uncompared.
        """
        self.model = model
        self.folder = folder
        self._image_processor = image_processor

    @classmethod
    def from_pretrained(cls, checkpoint: str | Path) -> Self:
        """Loads a checkpoint, given by its folder or by the name of a shipped one.

        Raises:
            CheckpointError: it cannot be used, or is untrained.
        """
        path = resolve_checkpoint(checkpoint)
        model = load_checkpoint(path)
        check_trained(model, checkpoint)
        return cls(model, load_image_processor(path), path)

    @cached_property
    def sha256(self) -> str | None:
        """The hash of the checkpoint's files; None without a folder."""
        return None if self.folder is None else checkpoint_hash(self.folder)

    @cached_property
    def prompts(self) -> list[str]:
        """`PROMPTS`, short enough for the model."""
        return [shortened(prompt, lambda text: self.model.tokenize([text])) for prompt in PROMPTS]

    @cached_property
    def prompt_tokens(self) -> list[list[int]]:
        """The tokens of the prompts."""
        return self.model.tokenize(self.prompts)

    @cached_property
    def dialogue_tokens(self) -> list[int]:
        """The tokens of `DIALOGUE`."""
        ids: list[int] = self.model.tokenizer(self._rendered(DIALOGUE), add_special_tokens=False)["input_ids"]
        return ids

    @cached_property
    def eos_token_ids(self) -> list[int]:
        """The tokens that end an answer, by the configs of the VLM and the tokenizer, sorted."""
        vlm, tokenizer = self.model.vlm, self.model.tokenizer
        ends = (vlm.config.text_config.eos_token_id, vlm.generation_config.eos_token_id, tokenizer.eos_token_id)
        return sorted({int(token) for end in ends if end is not None for token in np.atleast_1d(end)})

    @cached_property
    def engine_cases(self) -> list[EngineCase]:
        """Random inputs of all `SIZES`."""
        return self._engine_cases(SIZES)

    @cached_property
    def fixed_size_cases(self) -> list[EngineCase]:
        """Random inputs of all `SIZES`, but latents of the model's own size only."""
        return self._engine_cases([(rows, more, (0, 0)) for rows, more, _ in SIZES])

    def _engine_cases(self, sizes: Sequence[tuple[int, int | None, tuple[int, int]]]) -> list[EngineCase]:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            return [self._engine_case(rows, more, larger, generator) for rows, more, larger in sizes]

    def _engine_case(
        self, rows: int, more: int | None, larger: tuple[int, int], generator: torch.Generator
    ) -> EngineCase:
        model, config = self.model, self.model.config
        longest = config.max_prompt_tokens if more is None else min(1 + more + rows, config.max_prompt_tokens)
        ids, mask = self._random_prompts(rows, longest, generator)
        prefix = model.encode_tokens(ids, mask)
        shape = (config.latent_channels, config.latent_size[0] + larger[0], config.latent_size[1] + larger[1])
        latents = torch.randn((rows, *shape), generator=generator)
        timesteps, velocities = [], []
        for group in range(config.schedule.num_groups):
            start, end = config.schedule.interval(group)
            timesteps.append(start + (end - start) * torch.rand(rows, generator=generator))
            velocities.append(model.flow(latents, timesteps[-1], prefix.kv[group], prefix.mask, group).numpy())
        velocity = torch.randn((2 * rows, *shape), generator=generator)
        lowest = torch.tensor(LOWEST_SCALES[:rows])
        scale, length = lowest + 4 * torch.rand(rows, generator=generator), 0.01 + torch.rand(rows, generator=generator)
        solver_feed = {
            "latents": latents,
            "velocity": velocity,
            "unconditional_row": torch.arange(rows, 2 * rows),
            "guidance_scale": scale,
            "step_size": length,
            "row_of": torch.arange(2 * rows) % rows,
        }
        moved = length[:, None, None, None] * guided(velocity[:rows], velocity[rows:], range(rows), scale)
        return EngineCase(
            size=f"{rows} rows, {longest} tokens, {shape[1]}x{shape[2]}",
            input_ids=ids.numpy(),
            mask=mask.bool().numpy(),
            prefix_kv=tuple(kv.numpy() for kv in prefix.kv),
            latents=latents.numpy(),
            timesteps=tuple(t.numpy() for t in timesteps),
            velocities=tuple(velocities),
            solver_feed={name: tensor.numpy() for name, tensor in solver_feed.items()},
            moved=moved.numpy(),
            images=model.decode_latents(latents).numpy(),
        )

    def _random_prompts(self, rows: int, longest: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Returns ids and mask, `[R, P]` int64, of prompts of which each is a token longer than the one before."""
        lengths = torch.arange(rows) + longest - rows + 1
        ids = torch.randint(0, len(self.model.tokenizer), (rows, longest), generator=generator)
        ids[ids == self.model.vlm.config.image_token_id] = 0  # an image token without an image has no embedding
        return ids, (torch.arange(longest)[None] < lengths[:, None]).long()

    @cached_property
    def far_case(self) -> FarCase:
        """Random tokens at the end of the context."""
        context = self.model.vlm.config.text_config.max_position_embeddings
        ids, mask = self._random_prompts(1, FAR_TOKENS, torch.Generator().manual_seed(1))
        last = torch.tensor([context, context * 2 // 3, context // 2])
        positions = (last[:, None] - FAR_TOKENS + torch.arange(FAR_TOKENS))[:, None].clamp(min=0)
        with torch.no_grad():
            kv = self.model.encode_tokens(ids, mask, positions).kv
        return FarCase(ids.numpy(), positions.numpy(), tuple(part.numpy() for part in kv))

    @cached_property
    def sampling(self) -> SamplingCase:
        """`STEPS` steps from seeds 0, 1, …; guidance leads away from the empty prompt."""
        config = self.model.config
        noise = initial_latents(range(len(self.prompts)), (config.latent_channels, *config.latent_size))
        steps: list[SampleStep] = []
        negatives = [""] * len(self.prompts)
        final = self.model.sample(
            self.prompts,
            negatives,
            SCALES,
            torch.from_numpy(noise),
            time_grid(STEPS),
            callback_on_step_end=steps.append,
        )
        with torch.no_grad():
            images = self.model.decode_latents(final).numpy()
        return SamplingCase(noise, tuple(time_grid(STEPS)), tuple(steps), images)

    @cached_property
    def questions(self) -> list[QuestionCase]:
        """`QUESTIONS`, about images of noise. Each is answered alone, so that nothing depends on padding."""
        rng = np.random.default_rng(0)
        vision = self.model.vlm.config.vision_config
        side = vision.patch_size * vision.spatial_merge_size
        cases = []
        for sizes, question in QUESTIONS:
            images = [rng.integers(0, 256, (rows * side, columns * side, 3), np.uint8) for rows, columns in sizes]
            with torch.no_grad():
                cases.append(self._question_case(images, question))
        return cases

    def _question_case(self, images: Sequence[np.ndarray], question: str) -> QuestionCase:
        inputs = self.question_inputs(images, question)
        embeds = None
        if images:
            vision = (inputs["pixel_values"], inputs["image_grid_thw"])
            embeds = self.model.vlm.model.visual(*vision).pooler_output.numpy()
        ids, logits = inputs["input_ids"], []
        for _ in range(ANSWER_TOKENS):
            logits.append(self.model.vlm(**self._with_tokens(inputs, ids), logits_to_keep=1).logits[:, -1])
            ids = torch.cat([ids, logits[-1].argmax(dim=-1, keepdim=True)], dim=1)
        tokens = ids[0, -ANSWER_TOKENS:].numpy()
        return QuestionCase(tuple(images), question, inputs, embeds, torch.cat(logits).numpy(), tokens)

    def question_inputs(self, images: Sequence[np.ndarray], question: str) -> dict[str, Tensor]:
        """Returns the arguments of transformers' Qwen2-VL for a question.

        Args:
            images: each `[height, width, 3]` uint8.
        """
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
        text = self._rendered([{"role": "user", "content": content}])
        inputs = {}
        if images:
            inputs = dict(self._image_processor(list(images), return_tensors="pt"))
            merged = self.model.vlm.config.vision_config.spatial_merge_size**2
            counts = [int(grid.prod()) // merged for grid in inputs["image_grid_thw"]]
            token = self.model.tokenizer.convert_ids_to_tokens(self.model.vlm.config.image_token_id)
            pieces = text.split(token)
            text = "".join(piece + token * count for piece, count in zip(pieces, [*counts, 0], strict=True))
        ids = torch.tensor([self.model.tokenizer(text, add_special_tokens=False)["input_ids"]])
        return self._with_tokens(inputs, ids)

    def _with_tokens(self, inputs: Mapping[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
        """Returns the inputs with other tokens, `[1, T]` int64."""
        of_image = (ids == self.model.vlm.config.image_token_id).int()
        return {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": of_image}

    def _rendered(self, messages: Sequence[Mapping[str, Any]]) -> str:
        text: str = self.model.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return text


def shortened(prompt: str, tokenize: Callable[[str], object]) -> str:
    """Returns a prompt without the last words that are too many.

    Args:
        tokenize: raises `InputError` for a prompt that is too long.
    """
    words = prompt.split()
    while words:
        try:
            tokenize(" ".join(words))
        except InputError:
            words.pop()
        else:
            break
    return " ".join(words)


def checkpoint_hash(path: Path) -> str:
    """Returns one SHA-256 over a checkpoint's weights, configs, tokenizer and processor."""
    digest = hashlib.sha256()
    for file in sorted(file for kind in HASHED_FILES for file in path.rglob(kind)):
        if "training" not in file.relative_to(path).parts:
            digest.update(f"{file.relative_to(path).as_posix()} {sha256_of(file)}\n".encode())
    return digest.hexdigest()
