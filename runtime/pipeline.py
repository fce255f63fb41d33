"""A loaded bundle: pictures from prompts, with the call arguments of diffusers' pipelines, and answers to questions."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from PIL import Image

from runtime.answers import DEFAULT_MAX_NEW_TOKENS, Answerer, AnswerSettings
from runtime.backends import Backend, open_backend, to_host
from runtime.chat import ChatProcessor, Message, user_message
from runtime.engines import EngineSet
from runtime.errors import InputError
from runtime.images import Picture
from runtime.language import LanguageModel
from runtime.manifest import Manifest, load_manifest
from runtime.noise import initial_latents
from runtime.prefixes import PrefixRow, arrange_rows
from runtime.prompts import PromptEncoder
from runtime.sampler import GuidedBatch, Sampler, SamplerStep
from runtime.schedule import time_grid

OutputType = Literal["pil", "np", "latent"]
DEFAULT_STEPS = 20
DEFAULT_GUIDANCE_SCALE = 3.0
CACHED_NEGATIVE_PROMPTS = 16
Callback = Callable[["LatteFlowPipeline", int, float, Mapping[str, np.ndarray]], Mapping[str, np.ndarray] | None]


@dataclass
class PipelineOutput:
    """What a call made."""

    images: Any
    """A list of PIL images ("pil"), `[B, height, width, 3]` uint8 ("np") or `[B, C, H, W]` float32 ("latent")."""
    seeds: list[int | None]
    """The seed that makes each image alone; None where latents or a generator were given."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time per stage."""
    steps_per_group: list[int] = field(default_factory=list)


class LatteFlowPipeline:
    """A loaded bundle.

    Example:
        >>> pipe = LatteFlowPipeline.from_pretrained("bundle")
        >>> picture = pipe("a small red circle", seed=7).images[0]
        >>> pipe.ask(picture, "what colour is the circle?")
        'red'
    """

    def __init__(self, bundle: Path, manifest: Manifest, backend: Backend, *, low_memory: bool = False) -> None:
        self.bundle = bundle
        self.manifest = manifest
        self.backend = backend
        self.engines = EngineSet(bundle, manifest, backend, low_memory=low_memory)
        self._prompts = PromptEncoder.from_bundle(bundle, manifest)
        self._language = LanguageModel(self.engines)
        self._negative_prefixes: OrderedDict[str, PrefixRow] = OrderedDict()

    @classmethod
    def from_pretrained(
        cls,
        bundle: str | Path,
        provider: str = "cpu",
        provider_options: Mapping[str, str] | None = None,
        *,
        low_memory: bool = False,
    ) -> Self:
        """Opens a bundle. Engines are loaded when a call needs them.

        Args:
            provider: what runs the engines, one of `runtime.backends.PROVIDERS`.
            provider_options: by the names of the provider's own documentation, such as "device_id".
            low_memory: keep one engine with weights in memory at a time; each call then loads them anew.

        Raises:
            BundleError: it cannot be used.
            InputError: unknown provider.
        """
        path = Path(bundle)
        return cls(path, load_manifest(path), open_backend(provider, provider_options), low_memory=low_memory)

    @property
    def kv_dtype(self) -> np.dtype[Any]:
        """NumPy dtype of the prefix KV cache."""
        return np.dtype(self.manifest.engine("expert_0").inputs[2].dtype)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = DEFAULT_STEPS,
        guidance_scale: float | Sequence[float] = DEFAULT_GUIDANCE_SCALE,
        shift: float = 1.0,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        generator: np.random.Generator | None = None,
        latents: np.ndarray | None = None,
        output_type: OutputType = "pil",
        callback_on_step_end: Callback | None = None,
    ) -> PipelineOutput:
        """Draws pictures.

        Args:
            prompt: one or several; with `num_images_per_prompt`, the images of a prompt stand together.
            negative_prompt: what guidance leads away from: one for all, or one for each prompt.
            height, width: in pixels; multiples of the autoencoder's factor. Default: the model's size.
            num_inference_steps: steps of Euler's method.
            guidance_scale: s in v = v_u + s·(v_c − v_u), one for all or one for each prompt. 1 costs half.
            shift: of the time grid, as in diffusers' flow-matching schedulers; above 1 the steps are shorter near the
                noise, which is what few steps want.
            seed: one for each image, or an int s for s, s + 1, … An image depends on its own seed alone.
            generator: draws the noise of all images in order, instead of seeds.
            latents: the noise itself, `[B, C, H, W]` float32.
            output_type: "pil", "np" or "latent".
            callback_on_step_end: called as `callback(pipe, step, t, {"latents": array})`; a dict that it
                returns may hold other "latents" to go on with.

        Raises:
            InputError: an argument that cannot work.
        """
        prompts = _as_list("prompt", prompt)
        if num_images_per_prompt < 1:
            raise InputError(f"num_images_per_prompt must be at least 1, got {num_images_per_prompt}")
        if output_type not in ("pil", "np", "latent"):
            raise InputError(f'output_type must be "pil", "np" or "latent", got {output_type!r}')
        times = time_grid(num_inference_steps, shift)
        negatives = _one_for_each("negative_prompt", negative_prompt or "", str, len(prompts))
        scales = _one_for_each("guidance_scale", guidance_scale, (int, float), len(prompts))
        prompts, negatives, scales = (
            [value for value in values for _ in range(num_images_per_prompt)] for values in (prompts, negatives, scales)
        )
        noise, seeds = self._noise(len(prompts), seed, generator, latents, height, width)
        clock = _Clock()
        run = self.prepare(prompts, negatives, scales)
        clock.lap("prefix")
        on_step = None if callback_on_step_end is None else _adapt(self, callback_on_step_end)
        final = run.sampler.run(noise, times, on_step)
        clock.lap("sample")
        images: Any
        if output_type == "latent":
            images = to_host(final)
        else:
            images = self.engines["vae_decoder"].run({"latents": final})["image"].numpy()
            if output_type == "pil":
                images = [Image.fromarray(image) for image in images]
        clock.lap("decode")
        return PipelineOutput(images, seeds, clock.seconds, self.manifest.schedule.steps_per_group(times))

    def ask(
        self,
        images: Picture | Sequence[Any] | None = None,
        question: str | Sequence[str] | None = None,
        *,
        messages: Sequence[Any] | None = None,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> str | list[str]:
        """Answers a question about images, or goes on with a conversation.

        Args:
            images: a picture (path, PIL image or `[H, W, 3]` uint8), several for one question, or None. With
                several questions: what each is about, one entry for each.
            question: text, or a list of texts for a batch; the result is then a list.
            messages: instead of both, a conversation in the Hugging Face chat format, or a list of such.
            max_new_tokens: an answer is cut here, and where the model's context ends.
            temperature: 0 is greedy.
            top_p: sample from the likeliest tokens of this probability together.
            seed: of the sampling.
            stop: an answer ends before the first of these texts.

        Raises:
            InputError: something is no picture or no question, or all together are too long for the model.
        """
        conversations, single = _conversations(images, question, messages)
        settings = AnswerSettings(max_new_tokens, temperature, top_p, seed, tuple(stop))
        answers = self.answerer.answer(conversations, settings)
        return answers[0] if single else answers

    def ask_stream(
        self,
        images: Picture | Sequence[Picture] | None = None,
        question: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> Iterator[str]:
        """As `ask` for one conversation, piece by piece as the answer is written."""
        conversations, single = _conversations(images, question, messages)
        if not single:
            raise InputError("ask_stream answers one conversation; for several, call ask")
        settings = AnswerSettings(max_new_tokens, temperature, top_p, seed, tuple(stop))
        return (piece for (piece,) in self.answerer.stream(conversations, settings) if piece)

    @cached_property
    def answerer(self) -> Answerer:
        """What answers; made when the first question comes."""
        chat = ChatProcessor.from_bundle(self.bundle, self.manifest, self._prompts.tokenizer)
        return Answerer(self.engines, chat, self._prompts.tokenizer, self.manifest.understanding)

    def prepare(
        self, prompts: Sequence[str], negative_prompts: Sequence[str], guidance_scales: Sequence[float]
    ) -> PreparedRun:
        """Encodes prompts and arranges them in rows; the result can step and sample.

        Args:
            prompts, negative_prompts, guidance_scales: one of each per image.
        """
        for scale in guidance_scales:
            if not np.isfinite(scale):
                raise InputError(f"guidance_scale must be a finite number, got {scale}")
        guided = [i for i, scale in enumerate(guidance_scales) if scale != 1.0]
        conditional = self.encode_prompts(prompts)
        unconditional = self.encode_negative_prompts([negative_prompts[i] for i in guided])
        batch = arrange_rows(self.backend, conditional, unconditional, guidance_scales)
        return PreparedRun(Sampler(self.engines, self.manifest.schedule, batch), batch)

    def check_prompt(self, prompt: str) -> None:
        """Raises `InputError` for a prompt that cannot be encoded."""
        self._prompts.tokens(prompt)

    def encode_prompts(self, prompts: Sequence[str]) -> list[PrefixRow]:
        """What the experts read of each prompt. Equal prompts go through the VLM once."""
        distinct = list(dict.fromkeys(prompts))
        ids, mask = self._prompts.batch(distinct)
        groups = [kv.numpy() for kv in self._language.forward(ids, mask).kv]
        lengths = mask.sum(axis=1)
        rows = {
            prompt: PrefixRow(tuple(kv[:, :, i, :, : lengths[i]] for kv in groups)) for i, prompt in enumerate(distinct)
        }
        return [rows[prompt] for prompt in prompts]

    def encode_negative_prompts(self, prompts: Sequence[str]) -> list[PrefixRow]:
        """The same for negative prompts, most often the one empty one: each is encoded once per pipeline."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._negative_prefixes]
        if new:
            self._negative_prefixes.update(zip(new, self.encode_prompts(new), strict=True))
        rows = [self._negative_prefixes[prompt] for prompt in prompts]
        for prompt in prompts:
            self._negative_prefixes.move_to_end(prompt)
        while len(self._negative_prefixes) > CACHED_NEGATIVE_PROMPTS:
            self._negative_prefixes.popitem(last=False)
        return rows

    def _noise(
        self,
        count: int,
        seed: int | Sequence[int] | None,
        generator: np.random.Generator | None,
        latents: np.ndarray | None,
        height: int | None,
        width: int | None,
    ) -> tuple[np.ndarray, list[int | None]]:
        if sum(value is not None for value in (seed, generator, latents)) > 1:
            raise InputError("seed, generator and latents exclude each other; give one")
        geometry = self.manifest.geometry
        factor = geometry.vae_scale_factor
        for name, pixels in (("height", height), ("width", width)):
            if pixels is not None and (pixels < factor or pixels % factor):
                raise InputError(f"{name} must be a positive multiple of {factor} pixels, got {pixels}")
        rows = geometry.latent_size[0] if height is None else height // factor
        columns = geometry.latent_size[1] if width is None else width // factor
        shape = (geometry.latent_channels, rows, columns)
        if latents is not None:
            if height is None and width is None and latents.ndim == 4:
                shape = (geometry.latent_channels, latents.shape[2], latents.shape[3])
            if latents.shape != (count, *shape) or 0 in latents.shape:
                raise InputError(f"latents must have shape {(count, *shape)}, got {latents.shape}")
            if not np.isfinite(latents).all():
                raise InputError("latents must be finite numbers, got NaN or infinity")
            return np.ascontiguousarray(latents, np.float32), [None] * count
        if generator is not None:
            return generator.standard_normal((count, *shape), np.float32), [None] * count
        if seed is None:
            seed = int(np.random.SeedSequence().generate_state(1)[0])
        seeds = [seed + i for i in range(count)] if isinstance(seed, (int, np.integer)) else [int(s) for s in seed]
        if len(seeds) != count:
            raise InputError(f"seed must be one number or one for each of {count} images, got {len(seeds)}")
        if min(seeds) < 0:
            raise InputError(f"a seed must not be negative, got {min(seeds)}")
        return initial_latents(seeds, shape), list(seeds)

    def close(self) -> None:
        """Frees the engines."""
        self.engines.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class PreparedRun:
    """Encoded prompts, ready to be sampled from."""

    sampler: Sampler
    batch: GuidedBatch

    def step(self, latents: np.ndarray, t: float, t_next: float) -> np.ndarray:
        """One step from `latents` `[B, C, H, W]` float32; returns the next ones."""
        return self.sampler.step(latents, self.sampler.rows_of(latents), t, t_next)[0].numpy()


def _adapt(pipeline: LatteFlowPipeline, callback: Callback) -> Callable[[SamplerStep], np.ndarray | None]:
    def on_step(step: SamplerStep) -> np.ndarray | None:
        result = callback(pipeline, step.index, step.t, _OnDemand(step))
        if result is None or "latents" not in result:
            return None
        return np.ascontiguousarray(result["latents"], np.float32)

    return on_step


class _OnDemand(Mapping[str, np.ndarray]):
    """What a callback gets: {"latents": array}. The host waits for the device only if it is read."""

    def __init__(self, step: SamplerStep) -> None:
        self._step = step

    def __getitem__(self, name: str) -> np.ndarray:
        if name != "latents":
            raise KeyError(name)
        return self._step.latents.numpy()

    def __iter__(self) -> Iterator[str]:
        return iter(("latents",))

    def __len__(self) -> int:
        return 1


def _conversations(
    images: Any, question: str | Sequence[str] | None, messages: Sequence[Any] | None
) -> tuple[list[Sequence[Message]], bool]:
    """Conversations, and whether there is one alone rather than a list of one."""
    if messages is not None:
        if images is not None or question is not None:
            raise InputError("give either messages, or images and a question")
        single = not messages or isinstance(messages[0], Mapping)
        return ([messages] if single else list(messages)), single
    if question is None:
        raise InputError("there is no question; give one, or messages")
    if isinstance(question, str):
        return [[user_message(_pictures(images), question)]], True
    questions = _as_list("question", question)
    about = [None] * len(questions) if images is None else list(images)
    if len(about) != len(questions):
        raise InputError(f"images must have one entry for each of {len(questions)} questions, got {len(about)}")
    return [[user_message(_pictures(of_one), text)] for of_one, text in zip(about, questions, strict=True)], False


def _pictures(images: Any) -> list[Picture]:
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]


def _as_list(name: str, value: str | Sequence[str]) -> list[str]:
    if not isinstance(value, Iterable):
        raise InputError(f"{name} must be text or a list of texts, got {type(value).__name__}")
    values = [value] if isinstance(value, str) else list(value)
    if not values:
        raise InputError(f"{name} is an empty list; give at least one")
    return values


def _one_for_each(name: str, value: Any, kind: type | tuple[type, ...], count: int) -> list[Any]:
    if isinstance(value, kind):
        return [value] * count
    values = list(value)
    if len(values) != count:
        raise InputError(f"{name} must be one value or one for each of {count} prompts, got {len(values)}")
    return values


class _Clock:
    """Wall time between laps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now
