"""Verification: whether a bundle computes what PyTorch computes, measured on five rungs.

    engine       every engine against its PyTorch module, for several batch sizes, prefix lengths and latent sizes
    step         every sampling step, with the reference's latents as input
    trajectory   the final latents, from the same noise
    image        the decoded images, as PSNR
    answer       the logits of every token of an answer about two images

Each row names its rung, step and group, so that the first row that fails shows where the error begins. A reference
that is constant or not finite is a failure too: it would agree with anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from export.components import geometry_of
from latte.model import LatteFlow
from latte.sampling import SampleStep
from runtime.backends import Backend, open_backend, to_host
from runtime.backends.observed import ObservedBackend, ObservedRun
from runtime.chat import ChatInputs, user_message
from runtime.errors import InputError
from runtime.flow_time import initial_latents, time_grid
from runtime.language import LanguageModel
from runtime.manifest import ParityRow, Precision, load_manifest
from runtime.pipeline import LatteFlowPipeline


@dataclass(frozen=True)
class Tolerances:
    """The largest accepted relative error, ‖a − b‖ / ‖b‖, and the smallest accepted PSNR in dB."""

    engine: float
    trajectory: float
    image_psnr_db: float


TOLERANCES: dict[Precision, Tolerances] = {
    "fp32": Tolerances(engine=1e-4, trajectory=1e-3, image_psnr_db=50.0),
    "fp16": Tolerances(engine=1e-2, trajectory=3e-2, image_psnr_db=35.0),
    "bf16": Tolerances(engine=5e-2, trajectory=1.5e-1, image_psnr_db=25.0),
    "int8": Tolerances(engine=1e-1, trajectory=1e-1, image_psnr_db=35.0),
}
PSNR_OF_EQUAL_IMAGES = 100.0
"""Reported if no pixel differs."""
SIZES = ((1, 0, (0, 0)), (2, 3, (0, 0)), (3, 17, (1, 2)))
"""Rows, prefix tokens beyond the shortest prompt, and latent rows and columns beyond the default size."""
STEPS = 8
ANSWER_TOKENS = 4
FLOATING = {"float32", "float16", "bfloat16"}
PROMPTS = ("a", "a small red circle", "a large green star above a small blue square on a white background")


def verify_bundle(bundle: Path, model: LatteFlow, provider: str = "cpu") -> list[ParityRow]:
    """Measures all rungs, in order.

    Args:
        bundle: a folder with a manifest.
        model: the checkpoint that the bundle was exported from, in fp32.
        provider: runs the engines.

    Raises:
        InputError: the checkpoint and the bundle have different sizes.
    """
    manifest = load_manifest(bundle)
    if (manifest.geometry, manifest.schedule) != (geometry_of(model.config), model.config.schedule):
        raise InputError(f"{bundle} was exported from a checkpoint of another form; verify it against that checkpoint")
    tolerances = TOLERANCES[manifest.precision]
    watch = FiniteWatch(open_backend(provider))
    rows = []
    with LatteFlowPipeline(bundle, manifest, watch) as pipeline, torch.no_grad():
        for rung in (_engine_rows, _sampling_rows, _answer_rows):
            for row in rung(pipeline, model, tolerances):
                rows.append(row if watch.first is None else row.model_copy(update={"note": watch.first}))
                watch.reset()
    return rows


def _engine_rows(pipeline: LatteFlowPipeline, model: LatteFlow, tolerances: Tolerances) -> Iterator[ParityRow]:
    """Compares engines one by one, on random inputs of several sizes and with the reference's prefix."""
    generator = torch.Generator().manual_seed(0)
    config = model.config
    engines = pipeline.engines
    for batch, extra, (more_rows, more_columns) in SIZES:
        ids, mask = _random_prompts(batch, 2 + extra, len(model.tokenizer), generator)
        prefix = model.encode_tokens(ids, mask)
        height, width = config.latent_size[0] + more_rows, config.latent_size[1] + more_columns
        size = f"{batch} rows, {mask.shape[1]} tokens, {height}x{width}"
        outputs = LanguageModel(engines).forward(ids.numpy(), mask.bool().numpy())
        for group, reference in enumerate(prefix.kv):
            # Padding is masked wherever it is read, so its values do not matter.
            kept = mask.bool()[None, None, :, None, :, None].numpy()
            value = outputs.kv[group].numpy() * kept
            yield _relative("engine", f"vlm, {size}", value, reference.numpy() * kept, tolerances.engine, group=group)
        latents = torch.randn((batch, config.latent_channels, height, width), generator=generator)
        for group in range(config.schedule.num_groups):
            start, end = config.schedule.interval(group)
            t = start + (end - start) * torch.rand(batch, generator=generator)
            reference = model.flow(latents, t, prefix.kv[group], prefix.mask, group)
            kv = prefix.kv[group].numpy().astype(pipeline.kv_dtype)
            feed = {
                "latents": latents.numpy(),
                "timestep": t.numpy(),
                "prefix_kv": kv,
                "prefix_mask": prefix.mask.numpy(),
            }
            value = engines[f"expert_{group}"].run(feed)["velocity"].numpy()
            what = f"expert_{group}, {size}"
            yield _relative("engine", what, value, reference.numpy(), tolerances.engine, group=group)
        images = pipeline.decode(latents.numpy())
        reference = model.decode_latents(latents)
        yield _psnr("engine", f"vae_decoder, {size}", images, reference.numpy(), tolerances.image_psnr_db)


def _sampling_rows(pipeline: LatteFlowPipeline, model: LatteFlow, tolerances: Tolerances) -> Iterator[ParityRow]:
    seeds = list(range(len(PROMPTS)))
    scales = [3.0, 1.0, 5.0]
    noise = initial_latents(seeds, (model.config.latent_channels, *model.config.latent_size))
    reference: list[SampleStep] = []
    final = model.generate(
        PROMPTS,
        num_inference_steps=STEPS,
        guidance_scale=scales,
        latents=torch.from_numpy(noise),
        output_type="latent",
        callback_on_step_end=reference.append,
    )
    before = [torch.from_numpy(noise), *(step.latents for step in reference)]
    sampler = pipeline.sampler(list(PROMPTS), negative_prompts=[""] * len(PROMPTS), guidance_scales=scales)
    for step, inputs in zip(reference, sampler.step_inputs(time_grid(STEPS)), strict=True):
        latents = before[step.index].numpy()
        value = sampler.step(latents, sampler.rows_of(latents), inputs)[0].numpy()
        expected = step.latents.numpy()
        yield _relative("step", "next latents", value, expected, tolerances.engine, group=step.group, step=step.index)
    value = to_host(sampler.run(noise, time_grid(STEPS)))  # not the pipeline, which refuses latents that are not finite
    yield _relative("trajectory", f"final latents of {STEPS} steps", value, final, tolerances.trajectory)
    images = pipeline.decode(value)
    expected = model.decode_latents(torch.from_numpy(final)).numpy()
    yield _psnr("image", "decoded images", images, expected, tolerances.image_psnr_db)


def _answer_rows(pipeline: LatteFlowPipeline, model: LatteFlow, tolerances: Tolerances) -> Iterator[ParityRow]:
    """Compares an answer about two noisy images of different sizes; both sides get the reference's tokens."""
    rng = np.random.default_rng(0)
    answerer = pipeline.answerer
    side = pipeline.manifest.understanding.patch_size * pipeline.manifest.understanding.spatial_merge_size
    images = [rng.integers(0, 256, (rows * side, columns * side, 3), np.uint8) for rows, columns in ((3, 4), (5, 2))]
    inputs = answerer.chat.encode_conversations([[user_message(images, PROMPTS[1])]])
    assert inputs.images is not None
    reference_inputs = inputs_of_reference(model, inputs)
    embeds = answerer.encode_images(inputs.images)
    vision = (reference_inputs["pixel_values"], reference_inputs["image_grid_thw"])
    reference = model.vlm.model.visual(*vision).pooler_output
    what = f"vision_encoder, {len(images)} images, {len(reference)} tokens"
    yield _relative("engine", what, to_host(embeds), reference.numpy(), tolerances.engine)

    ids = reference_inputs["input_ids"]
    output = answerer.language.forward(inputs.input_ids, inputs.attention_mask, inputs.position_ids, embeds)
    for step in range(ANSWER_TOKENS):
        written = inputs_of_reference(model, inputs, ids)
        logits = model.vlm(**written, logits_to_keep=1).logits[:, -1]
        value = output.logits.numpy()
        yield _relative("answer", "logits", value, logits.numpy(), tolerances.engine, step=step)
        token = logits.argmax(dim=-1, keepdim=True)
        ids = torch.cat([ids, token], dim=1)
        positions = np.full((3, 1, 1), inputs.next_position[0] + step)
        output = answerer.language.forward(token.numpy(), np.ones(ids.shape, bool), positions, past=output.kv)


def inputs_of_reference(model: LatteFlow, inputs: ChatInputs, ids: Tensor | None = None) -> dict[str, Tensor]:
    """Converts the runtime's inputs with images to the arguments of transformers' Qwen2-VL.

    Args:
        ids: the tokens `[B, S]` int64, if some were written since.
    """
    assert inputs.images is not None
    ids = torch.from_numpy(inputs.input_ids) if ids is None else ids
    merge = model.vlm.config.vision_config.spatial_merge_size
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == model.vlm.config.image_token_id).int(),
        "pixel_values": torch.from_numpy(inputs.images.pixel_values).flatten(0, 1),
        "image_grid_thw": torch.tensor([(1, rows * merge, columns * merge) for rows, columns in inputs.images.grids]),
    }


def _random_prompts(batch: int, shortest: int, vocabulary: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns token ids and mask, `[B, P]` int64, of prompts with the lengths shortest, shortest + 1, …"""
    lengths = torch.arange(batch) + shortest
    ids = torch.randint(0, vocabulary, (batch, int(lengths.max())), generator=generator)
    mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
    return ids, mask


def relative_error(value: np.ndarray, reference: np.ndarray) -> float | None:
    """Returns ‖value − reference‖ / ‖reference‖; None if either is not finite or the reference is constant."""
    value, reference = np.asarray(value, np.float64), np.asarray(reference, np.float64)
    if value.shape != reference.shape or not np.isfinite(value).all() or not np.isfinite(reference).all():
        return None
    if reference.size > 1 and np.ptp(reference) == 0:
        return None
    return float(np.linalg.norm(value - reference) / np.linalg.norm(reference))


def psnr_db(value: np.ndarray, reference: np.ndarray) -> float | None:
    """Returns the peak signal-to-noise ratio of uint8 images; None if the reference is constant or shapes differ."""
    if value.shape != reference.shape or np.ptp(reference) == 0:
        return None
    error = np.mean((value.astype(np.float64) - reference.astype(np.float64)) ** 2)
    return PSNR_OF_EQUAL_IMAGES if error == 0 else min(PSNR_OF_EQUAL_IMAGES, float(10 * np.log10(255.0**2 / error)))


def _relative(
    rung: str,
    what: str,
    value: np.ndarray,
    reference: np.ndarray,
    tolerance: float,
    *,
    group: int | None = None,
    step: int | None = None,
) -> ParityRow:
    error = relative_error(value, reference)
    passed = error is not None and error <= tolerance
    return ParityRow.model_validate(
        {
            "rung": rung,
            "what": what,
            "group": group,
            "step": step,
            "metric": "relative_error",
            "value": error,
            "tolerance": tolerance,
            "passed": passed,
        }
    )


def _psnr(rung: str, what: str, value: np.ndarray, reference: np.ndarray, tolerance: float) -> ParityRow:
    number = psnr_db(value, reference)
    passed = number is not None and number >= tolerance
    return ParityRow.model_validate(
        {
            "rung": rung,
            "what": what,
            "metric": "psnr_db",
            "value": number,
            "tolerance": tolerance,
            "passed": passed,
        }
    )


class FiniteWatch(ObservedBackend):
    """A backend that records which engine first puts out a value that is not finite."""

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self.reset()

    def reset(self) -> None:
        """Forgets earlier runs."""
        self.first: str | None = None
        """Description of the first output that is not finite."""
        self._step = 0

    def observe(self, run: ObservedRun) -> None:
        for name, tensor in run.outputs.items():
            if self.first is None and tensor.dtype in FLOATING:
                values = tensor.numpy()
                lost = values.size - int(np.isfinite(values).sum())
                if lost:
                    group = "" if run.entry.group is None else f" (group {run.entry.group})"
                    after = f" after {self._step} steps" if self._step else ""
                    self.first = (
                        f"{lost} of {values.size} values of {run.entry.name}'s {name}{group} are not finite{after}"
                    )
        self._step += run.entry.role == "solver_step"
