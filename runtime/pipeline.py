"""A loaded bundle: images from prompts, with the call arguments of diffusers' pipelines, and answers to questions."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from PIL import Image

from runtime.answers import DEFAULT_MAX_NEW_TOKENS, Answerer, AnswerSettings
from runtime.arguments import numbers_for_each, seeds_for_each, text_for_each, text_list, whole_number
from runtime.backends import Backend, Value, open_backend, to_host
from runtime.chat import ChatProcessor, Message, user_message
from runtime.engines import EngineSet
from runtime.errors import InputError
from runtime.flow_time import (
    SamplingDefaults,
    check_finite,
    check_guidance_scale,
    check_moved,
    check_seeds,
    initial_latents,
    is_decodable,
    time_grid,
)
from runtime.images import ImageInput
from runtime.language import LanguageModel
from runtime.manifest import Manifest, load_manifest
from runtime.plans import most_in_plans
from runtime.prefixes import PREFIX_CACHE_BYTES, PromptEncoder
from runtime.rows import PrefixRow, arrange_rows, is_guided
from runtime.sampler import Sampler, SamplerStep

OutputType = Literal["pil", "np", "latent"]
Callback = Callable[["LatteFlowPipeline", int, float, Mapping[str, np.ndarray]], Mapping[str, np.ndarray] | None]


@dataclass
class PipelineOutput:
    """The images of a call, and how they were made."""

    images: Any
    """A list of PIL images ("pil"), `[B, height, width, 3]` uint8 ("np") or `[B, C, H, W]` float32 ("latent")."""
    seeds: list[int | None]
    """The seed that reproduces each image; None where latents or a generator were given."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time per stage."""
    steps_per_group: list[int] = field(default_factory=list)
    """Number of steps that each expert group ran."""


class LatteFlowPipeline:
    """A loaded bundle, which generates images and answers questions about images.

    Example:
        >>> pipe = LatteFlowPipeline.from_pretrained("bundle")
        >>> image = pipe("a small red circle", seed=7).images[0]
        >>> pipe.ask(image, "what colour is the circle?")
        'red'
    """

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        backend: Backend,
        *,
        low_memory: bool = False,
        prefix_cache_bytes: int = PREFIX_CACHE_BYTES,
    ) -> None:
        self.bundle = bundle
        self.manifest = manifest
        self.backend = backend
        self.engines = EngineSet(bundle, manifest, backend, low_memory=low_memory)
        self.chat = ChatProcessor(bundle, manifest)
        self._language = LanguageModel(self.engines)
        shares_head = most_in_plans(manifest, backend.name, "vlm", "tokens") is None
        self.prompts = PromptEncoder(self.chat, self._language, prefix_cache_bytes, shares_head=shares_head)
        """Encodes prompts, and keeps those that were used last."""

    @classmethod
    def from_pretrained(
        cls,
        bundle: str | Path,
        provider: str = "cpu",
        provider_options: Mapping[str, str] | None = None,
        *,
        low_memory: bool = False,
        prefix_cache_bytes: int = PREFIX_CACHE_BYTES,
    ) -> Self:
        """Opens a bundle. Engines are loaded when a call needs them.

        Args:
            provider: runs the engines; one of `runtime.backends.PROVIDERS`.
            provider_options: options by the names in the provider's own documentation, such as "device_id".
            low_memory: keep only one engine with weights in memory at a time; each call loads them again.
            prefix_cache_bytes: memory for encoded prompts, so that a prompt that comes again is not encoded again;
                0 keeps none.

        Raises:
            BundleError: the bundle cannot be used.
            InputError: the provider is unknown.
        """
        path = Path(bundle)
        manifest, backend = load_manifest(path), open_backend(provider, provider_options)
        return cls(path, manifest, backend, low_memory=low_memory, prefix_cache_bytes=prefix_cache_bytes)

    @property
    def kv_dtype(self) -> np.dtype[Any]:
        """NumPy dtype of the prefix KV cache."""
        return np.dtype(self.manifest.engine("expert_0").input("prefix_kv").dtype)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        shift: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        generator: np.random.Generator | None = None,
        latents: np.ndarray | None = None,
        output_type: OutputType = "pil",
        callback_on_step_end: Callback | None = None,
    ) -> PipelineOutput:
        """Generates images from prompts.

        Args:
            prompt: one or several; with `num_images_per_prompt`, the images of a prompt come one after another.
            negative_prompt: what the images should not show: one for all, or one for each prompt.
            height, width: in pixels; multiples of the autoencoder's factor. Default: the model's size.
            num_inference_steps: number of Euler steps. Its default is the model's, like those of the next two.
            guidance_scale: s in v = v_u + s·(v_c − v_u), one for all or one for each prompt. 1 disables guidance and
                halves the cost.
            shift: time-grid shift, as in diffusers' flow-matching schedulers. Above 1 the steps are shorter near the
                noise; try 2 with few steps.
            guidance_interval: flow times [start, end) with guidance (arXiv 2404.07724); elsewhere the scale is 1, which
                halves the cost of those steps. Default: the model's, mostly all times.
            seed: one for each image, or an int s for s, s + 1, … An image depends only on its own seed.
            generator: draws the noise of all images in order, instead of seeds.
            latents: the noise itself, `[B, C, H, W]` float32.
            output_type: "pil", "np" or "latent".
            callback_on_step_end: called as `callback(pipe, step, t, {"latents": array})` after each step. If it
                returns a dict with "latents", sampling continues with those.

        Raises:
            InputError: an argument cannot work.
        """
        prompts = text_list("prompt", prompt)
        if whole_number("num_images_per_prompt", num_images_per_prompt) < 1:
            raise InputError(f"num_images_per_prompt must be at least 1, got {num_images_per_prompt}")
        if output_type not in ("pil", "np", "latent"):
            raise InputError(f'output_type must be "pil", "np" or "latent", got {output_type!r}')
        negatives = text_for_each("negative_prompt", negative_prompt or "", len(prompts))
        defaults = self.manifest.sampling.guided_in(guidance_interval)
        scale = defaults.guidance_scale if guidance_scale is None else guidance_scale
        scales = numbers_for_each("guidance_scale", scale, len(prompts))
        sampling, *_ = [
            defaults.choose(num_inference_steps, each, shift, negative)
            for each, negative in zip(scales, negatives, strict=True)
        ]
        times = time_grid(sampling.num_inference_steps, sampling.shift)
        prompts, negatives = (
            [text for text in texts for _ in range(num_images_per_prompt)] for texts in (prompts, negatives)
        )
        scales = [scale for scale in scales for _ in range(num_images_per_prompt)]
        noise, seeds = self._noise(len(prompts), seed, generator, latents, height, width)
        clock = _Clock()
        parts = self._parts(prompts, negatives, scales, times, defaults)
        clock.lap("prefix")
        on_step = None if callback_on_step_end is None else _adapt(self, callback_on_step_end)
        final: Value = noise
        for sampler, first, last in parts:
            final = sampler.run(final, times[first : last + 1], on_step, first)
        on_host = to_host(final)
        check_finite(on_host)
        check_moved(noise, on_host)
        clock.lap("sample")
        images: Any = on_host if output_type == "latent" else self.decode(final)
        if output_type == "pil":
            images = [Image.fromarray(image) for image in images]
        clock.lap("decode")
        return PipelineOutput(images, seeds, clock.seconds, self.manifest.schedule.steps_per_group(times))

    def ask(
        self,
        images: ImageInput | Sequence[Any] | None = None,
        question: str | Sequence[str] | None = None,
        *,
        messages: Sequence[Any] | None = None,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> str | list[str]:
        """Answers a question about images, or continues a conversation.

        Args:
            images: an image (path, PIL image or `[H, W, 3]` uint8), several images for one question, or None. With
                several questions: a list with the image or images of each question.
            question: text, or a list of texts for a batch; the result is then a list.
            messages: instead of both, a conversation in the Hugging Face chat format, or a list of conversations.
            max_new_tokens: largest number of tokens of an answer; it also ends where the model's context ends.
            temperature: 0 takes the most likely token.
            top_p: sample from the most likely tokens that together have this probability.
            seed: seed of the sampling.
            stop: texts that end an answer; the answer stops before the first of them.

        Raises:
            InputError: an image or a question cannot be used, or together they are too long for the model.
        """
        conversations, single = _conversations(images, question, messages)
        settings = AnswerSettings(max_new_tokens, temperature, top_p, seed, tuple(stop))
        answers = self.answerer.answer(conversations, settings)
        return answers[0] if single else answers

    def ask_stream(
        self,
        images: ImageInput | Sequence[ImageInput] | None = None,
        question: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> Iterator[str]:
        """Answers like `ask` for one conversation, and yields the answer piece by piece as it is written."""
        conversations, single = _conversations(images, question, messages)
        if not single:
            raise InputError("ask_stream answers one conversation; for several, call ask")
        settings = AnswerSettings(max_new_tokens, temperature, top_p, seed, tuple(stop))
        return (piece for (piece,) in self.answerer.stream(conversations, settings) if piece)

    @cached_property
    def answerer(self) -> Answerer:
        """The part that answers questions; made when the first question comes."""
        limit = most_in_plans(self.manifest, self.backend.name, "vlm", "past", tokens=1)
        if limit is None:
            limit = self.manifest.understanding.max_context_tokens - 1  # with the new token it is full
        key_values = partial(self.backend.key_values, limit=limit)
        return Answerer(self.engines, self.chat, self.manifest.understanding, self._language, key_values)

    def sampler(
        self, prompts: Sequence[str], negative_prompts: Sequence[str], guidance_scales: Sequence[float]
    ) -> Sampler:
        """Encodes prompts and returns a sampler for them.

        Args:
            prompts, negative_prompts, guidance_scales: one of each for each image.
        """
        return self._sampler(self.encode_prompts(prompts), negative_prompts, guidance_scales)

    def _sampler(
        self, encoded: Sequence[PrefixRow], negative_prompts: Sequence[str], guidance_scales: Sequence[float]
    ) -> Sampler:
        for scale in guidance_scales:
            check_guidance_scale(scale)
        guided = [
            negative for negative, scale in zip(negative_prompts, guidance_scales, strict=True) if is_guided(scale)
        ]
        return self.sampler_of(encoded, self.encode_prompts(guided), guidance_scales)

    def sampler_of(
        self, conditional: Sequence[PrefixRow], unconditional: Sequence[PrefixRow], guidance_scales: Sequence[float]
    ) -> Sampler:
        """Returns a sampler for encoded prompts; see `arrange_rows`."""
        limit = most_in_plans(self.manifest, self.backend.name, "expert_0", "prefix") or self.manifest.prompt.max_tokens
        batch = arrange_rows(self.backend, conditional, unconditional, guidance_scales, limit)
        return Sampler(self.engines, self.manifest.schedule, batch)

    def _parts(
        self,
        prompts: Sequence[str],
        negative_prompts: Sequence[str],
        guidance_scales: Sequence[float],
        times: Sequence[float],
        defaults: SamplingDefaults,
    ) -> list[tuple[Sampler, int, int]]:
        """Returns samplers for parts of a time grid, each with its first and last index: guidance ends and begins."""
        encoded = self.encode_prompts(prompts)
        scales_at = [tuple(defaults.row_scale(scale, t) for scale in guidance_scales) for t in times[:-1]]
        samplers = {scales: self._sampler(encoded, negative_prompts, scales) for scales in dict.fromkeys(scales_at)}
        parts = []
        first = 0
        for scales, steps in itertools.groupby(scales_at):
            last = first + len(list(steps))
            parts.append((samplers[scales], first, last))
            first = last
        return parts

    def decode(self, latents: Value) -> np.ndarray:
        """Decodes latents `[B, C, H, W]` float32 to pixels `[B, height, width, 3]` uint8."""
        return self.engines["vae_decoder"].run({"latents": latents})["image"].numpy()

    def refit(self, bundle: str | Path) -> None:
        """Takes the weights of another bundle with the same graphs, such as one with a LoRA merged, or back.

        Only TensorRT does this, with plans of `latte-flow build --refit`. The other bundle needs no plans. Nothing may
        be drawn or answered meanwhile.

        Raises:
            InputError: the bundles differ in more than weights.
            BundleError: the other bundle cannot be used.
            EngineError: the provider, or a plan, cannot do it.
        """
        manifest = load_manifest(Path(bundle))
        if _form(manifest) != _form(self.manifest):
            raise InputError(f"{bundle} differs from this bundle in more than weights; open it instead")
        self.engines.refit(Path(bundle), manifest)
        plans = {engine.name: engine.plans for engine in self.manifest.engines}
        engines = tuple(engine.model_copy(update={"plans": plans[engine.name]}) for engine in manifest.engines)
        self.manifest = manifest.model_copy(update={"engines": engines})
        self.prompts.forget()

    def check_prompt(self, prompt: str) -> None:
        """Raises `InputError` for a prompt that cannot be encoded."""
        self.chat.prompt_tokens(prompt)

    def encode_prompts(self, prompts: Sequence[str]) -> list[PrefixRow]:
        """Returns the keys and values of each prompt."""
        return self.prompts(prompts)

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
            if pixels is not None and (whole_number(name, pixels) < factor or pixels % factor):
                raise InputError(f"{name} must be a positive multiple of {factor} pixels, got {pixels}")
        rows = geometry.latent_size[0] if height is None else height // factor
        columns = geometry.latent_size[1] if width is None else width // factor
        shape = (geometry.latent_channels, rows, columns)
        if latents is not None:
            latents = np.asarray(latents)
            if latents.dtype.kind not in "fiu":
                raise InputError(f"latents must be an array of numbers, got one of {latents.dtype}")
            if height is None and width is None and latents.ndim == 4:
                shape = (geometry.latent_channels, latents.shape[2], latents.shape[3])
            if latents.shape != (count, *shape) or 0 in latents.shape:
                raise InputError(f"latents must have shape {(count, *shape)}, got {latents.shape}")
            if not np.isfinite(latents).all():
                raise InputError("latents must be finite numbers, got NaN or infinity")
            if not is_decodable(latents):
                raise InputError(f"latents must be noise of variance 1, got a magnitude of {np.abs(latents).max():g}")
            return np.ascontiguousarray(latents, np.float32), [None] * count
        if generator is not None:
            if not isinstance(generator, np.random.Generator):
                raise InputError(f"generator must be a numpy.random.Generator, got {type(generator).__name__}")
            return generator.standard_normal((count, *shape), np.float32), [None] * count
        if seed is None:
            seed = int(np.random.SeedSequence().generate_state(1)[0])
        seeds = seeds_for_each("seed", seed, count)
        check_seeds(seeds)
        return initial_latents(seeds, shape), list(seeds)

    def close(self) -> None:
        """Frees the engines and the backend."""
        self.engines.close()
        self.backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _form(manifest: Manifest) -> tuple[Any, ...]:
    """Returns what two bundles have in common that differ in weights only."""
    engines = [(e.name, e.precision, e.quantization, e.inputs, e.outputs) for e in manifest.engines]
    return manifest.geometry, manifest.schedule, manifest.prompt, manifest.understanding, engines


def _adapt(pipeline: LatteFlowPipeline, callback: Callback) -> Callable[[SamplerStep], np.ndarray | None]:
    def on_step(step: SamplerStep) -> np.ndarray | None:
        result = callback(pipeline, step.index, step.t, _OnDemand(step))
        if result is None or result.get("latents") is None:
            return None
        latents = np.asarray(result["latents"])
        if latents.dtype.kind not in "fiu" or latents.shape != tuple(step.latents.shape):
            expected = f"an array of numbers of shape {tuple(step.latents.shape)}"
            raise InputError(
                f"callback_on_step_end must return latents as {expected}, got {latents.dtype} of shape {latents.shape}"
            )
        return np.ascontiguousarray(latents, np.float32)

    return on_step


class _OnDemand(Mapping[str, np.ndarray]):
    """The tensors that a callback gets, {"latents": array}: the host waits for the device only if they are read."""

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
    """Returns the conversations, and whether the caller gave a single one rather than a list."""
    if messages is not None:
        if images is not None or question is not None:
            raise InputError("give either messages, or images and a question")
        single = not messages or isinstance(messages[0], Mapping)
        return ([messages] if single else list(messages)), single
    if question is None:
        raise InputError("there is no question; give one, or messages")
    if isinstance(question, str):
        return [[user_message(_image_list(images), question)]], True
    questions = text_list("question", question)
    about = [None] * len(questions) if images is None else list(images)
    if len(about) != len(questions):
        raise InputError(f"images must have one entry for each of {len(questions)} questions, got {len(about)}")
    return [[user_message(_image_list(of_one), text)] for of_one, text in zip(about, questions, strict=True)], False


def _image_list(images: Any) -> list[ImageInput]:
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]


class _Clock:
    """Wall time between laps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now
