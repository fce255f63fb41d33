"""Verification: whether a bundle computes what PyTorch computes, measured on eight rungs.

    input        the manifest, tokens and pixels, against the checkpoint and transformers
    weights      every weight of every engine, against the checkpoint's
    graph        every engine in fp32 with the checkpoint's weights: what the graph does, apart from rounding
    engine       every engine against its PyTorch module, for several batch sizes, prefix lengths and latent sizes
    step         the guided velocity of every sampling step, with the reference's latents as input
    trajectory   the final latents, from the same noise
    image        the decoded images, as PSNR
    answer       the logits of every token of the answers to a batch of questions about images

Each row names its rung, step and group, so that the first row that fails shows where the error begins. The reference
takes nothing from the bundle.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from export.components import geometry_of, prompt_format_of, understanding_of
from export.engines import load_engine
from export.parity import (
    TOLERANCES,
    Tolerances,
    bias_row,
    differences_row,
    equality_row,
    psnr_row,
    relative_row,
)
from export.reference import ANSWER_TOKENS, DIALOGUE, SCALES, EngineCase, FarCase, QuestionCase, Reference
from export.weight_check import differing_weights, foreign_types, precision_of, quantized_products
from export.weights import ALWAYS_FP32
from export.widened import is_widened_by, widened_bundle
from runtime.backends import Backend, open_backend, to_host
from runtime.backends.observed import ObservedBackend, ObservedRun
from runtime.chat import ChatInputs, user_message
from runtime.errors import InputError
from runtime.files import sha256_of
from runtime.language import LanguageModel
from runtime.manifest import ParityRow, Precision, Quantization, load_manifest
from runtime.pipeline import LatteFlowPipeline
from runtime.plans import most_in_plans

FP32 = TOLERANCES["fp32"]
"""Solver and autoencoder are fp32 in every precision."""
BIAS = 0.05
"""The largest accepted bias of decoded pixels, in levels of 255. A decoder that rounds down has 0.5."""
PIXELS = 1e-5
"""The largest accepted relative error of pixels after the image processor."""
FLOATING = {"float32", "float16", "bfloat16"}
QUANTIZED: tuple[Precision, ...] = ("int8", "fp8")


Graphs = Mapping[str, ir.Model]
"""The graphs of a bundle's engines by name; their weights stay in their files."""
Rung = Callable[[LatteFlowPipeline, Reference, Tolerances], Iterator[ParityRow]]


def verify_bundle(
    bundle: Path, reference: Reference, provider: str = "cpu", provider_options: Mapping[str, str] | None = None
) -> list[ParityRow]:
    """Measures all rungs, in order.

    Args:
        bundle: a folder with a manifest.
        reference: the checkpoint that the bundle was exported from.
        provider: runs the engines. TensorRT plans are verified in the sizes that they were built for: if these do not
            include other latent sizes or batches of answers, the model's own size and single answers are measured.
        provider_options: by the names in the provider's own documentation.

    Raises:
        InputError: the checkpoint and the bundle have different sizes.
    """
    return list(verified_rows(bundle, reference, provider, provider_options))


def runs_on(precision: Precision, provider: str) -> bool:
    """Returns whether a provider runs a precision. If not, only inputs, weights and graphs are verified."""
    return precision != "bf16" or provider != "cpu"


def verified_rows(
    bundle: Path, reference: Reference, provider: str = "cpu", provider_options: Mapping[str, str] | None = None
) -> Iterator[ParityRow]:
    """Yields the rows of `verify_bundle` one by one."""
    manifest = load_manifest(bundle)
    config = reference.model.config
    form = (manifest.geometry, manifest.schedule, manifest.sampling)
    if form != (geometry_of(config), config.schedule, config.sampling):
        raise InputError(f"{bundle} was exported from a checkpoint of another form; verify it against that checkpoint")
    tolerances = TOLERANCES[manifest.precision]
    watch = FiniteWatch(open_backend(provider, provider_options))
    with LatteFlowPipeline(bundle, manifest, watch) as pipeline:
        graphs = {entry.name: load_engine(bundle / entry.name) for entry in manifest.engines}
        rungs: list[Rung] = [partial(_input_rows, graphs), partial(_weight_rows, graphs)]
        if any(is_widened_by(graphs[entry.name], entry) for entry in manifest.engines):
            rungs.append(_graph_rows)
        if runs_on(manifest.precision, provider):
            rungs += [_engine_rows, _sampling_rows, _answer_rows]
        weights_are_right = True
        for rung in rungs:
            if rung is _graph_rows and not weights_are_right:
                continue  # it takes the checkpoint's weights by the graph's names
            for row in rung(pipeline, reference, tolerances):
                weights_are_right = weights_are_right and (row.rung != "weights" or row.passed)
                yield row if watch.first is None else row.model_copy(update={"note": watch.first})
                watch.reset()


def _input_rows(
    graphs: Graphs, pipeline: LatteFlowPipeline, reference: Reference, _: Tolerances
) -> Iterator[ParityRow]:
    """Compares what the engines get."""
    manifest, model = pipeline.manifest, reference.model
    expected = understanding_of(model).model_copy(update={"eos_token_ids": tuple(reference.eos_token_ids)})
    for name, part, of_checkpoint in (
        ("prompt", manifest.prompt, prompt_format_of(model)),
        ("understanding", manifest.understanding, expected),
    ):
        yield equality_row("input", f"manifest, {name}", part.model_dump(), of_checkpoint.model_dump())
    right: dict[str, Precision] = {
        entry.name: "fp32" if entry.role in ALWAYS_FP32 else manifest.precision for entry in manifest.engines
    }
    precisions = {entry.name: (entry.precision, precision_of(graphs[entry.name], entry)) for entry in manifest.engines}
    pairs = {name: (precision, precision) for name, precision in right.items()}
    yield equality_row("input", "precision of the engines, by the manifest and by their weights", precisions, pairs)
    faults = [f"{name}: {fault}" for name, graph in graphs.items() for fault in foreign_types(graph, right[name])]
    yield differences_row("input", "types of the engines' graphs", faults)
    if manifest.precision in QUANTIZED:
        said = {entry.name: _products_of(entry.quantization) for entry in manifest.engines}
        found = {
            name: quantized_products(graph) if right[name] in QUANTIZED else None for name, graph in graphs.items()
        }
        yield equality_row("input", "quantised products", said, found)
    if reference.folder is not None:
        hashes = (manifest.checkpoint_sha256, reference.sha256)
        yield equality_row("input", "hash of the checkpoint", *hashes)
        names = [file.path for file in manifest.tokenizer_files if (reference.folder / file.path).is_file()]
        files = ({name: sha256_of(folder / name) for name in names} for folder in (pipeline.bundle, reference.folder))
        yield equality_row("input", "files of tokenizer and processor", *files)
    tokens = [pipeline.chat.prompt_tokens(prompt) for prompt in reference.prompts]
    yield equality_row("input", f"tokens of {len(tokens)} prompts", tokens, reference.prompt_tokens)
    dialogue = pipeline.chat.encode_conversations([DIALOGUE]).input_ids[0].tolist()
    yield equality_row("input", "tokens of a dialogue", dialogue, reference.dialogue_tokens)
    for case in reference.questions:
        of_bundle = _inputs_of(pipeline, [case])
        what = f"a question about {len(case.images)} images"
        ids = case.inputs["input_ids"][0].tolist()
        yield equality_row("input", f"tokens of {what}", of_bundle.input_ids[0].tolist(), ids)
        if case.images:
            pixels = case.inputs["pixel_values"].numpy()
            given = np.zeros(0) if of_bundle.images is None else of_bundle.images.pixel_values
            yield relative_row("input", f"pixels of {what}", given.reshape(-1, pixels.shape[1]), pixels, PIXELS)


def _products_of(quantization: Quantization | None) -> dict[str, list[str]] | None:
    if quantization is None:
        return None
    return {"quantized": sorted(quantization.quantized), "kept": sorted(quantization.kept)}


def _weight_rows(
    graphs: Graphs, pipeline: LatteFlowPipeline, reference: Reference, _: Tolerances
) -> Iterator[ParityRow]:
    """Compares weights with the checkpoint's, rounded to the engine's precision."""
    for entry in pipeline.manifest.engines:
        differing, count = differing_weights(graphs[entry.name], entry, reference.model)
        if count or differing:
            yield differences_row("weights", f"{count} weights of {entry.name}", differing, group=entry.group)


def _graph_rows(pipeline: LatteFlowPipeline, reference: Reference, _: Tolerances) -> Iterator[ParityRow]:
    """Compares the graphs in fp32, which run on the CPU whatever the provider and the precision."""
    beside = pipeline.bundle.parent  # temporary folders are often small
    where = beside if os.access(beside, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix=".latte-flow-", dir=where) as folder:
        manifest = widened_bundle(pipeline.bundle, reference.model, Path(folder))
        with LatteFlowPipeline(Path(folder), manifest, open_backend("cpu"), low_memory=True) as wide:
            for rung in (_engine_rows, _answer_rows):
                for row in rung(wide, reference, FP32):
                    yield row.model_copy(update={"rung": "graph"})


def _engine_rows(pipeline: LatteFlowPipeline, reference: Reference, tolerances: Tolerances) -> Iterator[ParityRow]:
    """Compares engines one by one, on random inputs of several sizes and with the reference's prefix."""
    cases = reference.engine_cases if _takes_all_latents(pipeline, reference) else reference.fixed_size_cases
    for case in cases:
        yield from _language_rows(pipeline, case, tolerances)
    yield from _far_rows(pipeline, reference.far_case, tolerances)
    for group in range(pipeline.manifest.schedule.num_groups):
        name = f"expert_{group}"
        for case in cases:
            feed = {
                "latents": case.latents,
                "timestep": case.timesteps[group],
                "prefix_kv": case.prefix_kv[group].astype(pipeline.kv_dtype),
                "prefix_mask": case.mask,
            }
            value, expected = pipeline.engines[name].run(feed)["velocity"].numpy(), case.velocities[group]
            yield relative_row("engine", f"{name}, {case.size}", value, expected, tolerances.engine, group=group)
    for case in cases:
        outputs = pipeline.engines["solver_step"].run(case.solver_feed)
        following, rows = (outputs[name].numpy() for name in ("next_latents", "row_latents"))
        yield relative_row("engine", f"solver_step, {case.size}", following - case.latents, case.moved, FP32.engine)
        copies = following[case.solver_feed["row_of"]]
        yield relative_row("engine", f"solver_step rows, {case.size}", rows, copies, FP32.engine)
    for case in cases:
        value = pipeline.decode(case.latents)
        yield psnr_row("engine", f"vae_decoder, {case.size}", value, case.images, FP32.image_psnr_db)
        yield bias_row("engine", f"vae_decoder's rounding, {case.size}", value, case.images, BIAS)


def _takes_all_latents(pipeline: LatteFlowPipeline, reference: Reference) -> bool:
    """Returns whether the engines take latents of all sizes that are measured, or have plans that do not."""
    largest = {
        f"latent_{axis}": max(case.latents.shape[place] for case in reference.engine_cases)
        for axis, place in (("height", 2), ("width", 3))
    }
    limits = [
        (most_in_plans(pipeline.manifest, pipeline.backend.name, entry.name, axis), size)
        for entry in pipeline.manifest.engines
        for axis, size in largest.items()
        if axis in entry.axes
    ]
    return all(limit is None or size <= limit for limit, size in limits)


def _language_rows(pipeline: LatteFlowPipeline, case: EngineCase, tolerances: Tolerances) -> Iterator[ParityRow]:
    outputs = LanguageModel(pipeline.engines).forward(case.input_ids, case.mask)
    # Padding is masked wherever it is read, so its values do not matter.
    kept = case.mask[None, None, :, None, :, None]  # [1, 1, R, 1, P, 1]
    expected = [kv * kept for kv in case.prefix_kv]
    yield from _key_value_rows([kv.numpy() * kept for kv in outputs.kv], expected, case.size, tolerances)


def _far_rows(pipeline: LatteFlowPipeline, case: FarCase, tolerances: Tolerances) -> Iterator[ParityRow]:
    seen = np.ones_like(case.input_ids, bool)
    outputs = LanguageModel(pipeline.engines).forward(case.input_ids, seen, case.position_ids)
    yield from _key_value_rows([kv.numpy() for kv in outputs.kv], case.kv, "at the end of the context", tolerances)


def _key_value_rows(
    values: Sequence[np.ndarray], expected: Sequence[np.ndarray], where: str, tolerances: Tolerances
) -> Iterator[ParityRow]:
    """Compares keys and values, `[M, 2, R, Hkv, P, D]` of each expert group."""
    for group, (value, right) in enumerate(zip(values, expected, strict=True)):
        for index, part in enumerate(("keys", "values")):
            pair = (value[:, index], right[:, index])
            yield relative_row("engine", f"vlm {part}, {where}", *pair, tolerances.engine, group=group)


def _sampling_rows(pipeline: LatteFlowPipeline, reference: Reference, tolerances: Tolerances) -> Iterator[ParityRow]:
    case = reference.sampling
    prompts = reference.prompts
    sampler = pipeline.sampler(prompts, negative_prompts=[""] * len(prompts), guidance_scales=list(SCALES))
    for step, inputs in zip(case.steps, sampler.step_inputs(case.times), strict=True):
        latents = case.latents_before(step.index)
        value = sampler.step(latents, sampler.rows_of(latents), inputs)[0].numpy()
        # Not the next latents: the latents before would hide the error of the velocity.
        velocity = (value - latents) / (case.times[step.index + 1] - case.times[step.index])
        expected = step.velocity.numpy()
        at = {"group": step.group, "step": step.index}
        yield relative_row("step", "velocity", velocity, expected, tolerances.engine, **at)
    value = to_host(sampler.run(case.noise, case.times))  # the pipeline refuses latents that are not finite
    what = f"final latents of {len(case.steps)} steps"
    yield relative_row("trajectory", what, value, case.final, tolerances.trajectory)
    yield psnr_row("image", "decoded images", pipeline.decode(value), case.images, tolerances.image_psnr_db)


def _answer_rows(pipeline: LatteFlowPipeline, reference: Reference, tolerances: Tolerances) -> Iterator[ParityRow]:
    """Compares answers, written as one batch if the engine takes it; both sides get the reference's answers so far."""
    count = len(reference.questions)
    limits = [
        most_in_plans(pipeline.manifest, pipeline.backend.name, "vlm", "batch", **use)
        for use in ({"past": 0, "image_tokens": 2}, {"past": 1, "tokens": 1})
    ]
    together = min([limit for limit in limits if limit is not None], default=count)
    for first in range(0, count, together):
        cases = reference.questions[first : first + together]
        names = [f"answer {first + row + 1} of {count}" for row in range(len(cases))]
        yield from _rows_of_answers(pipeline, cases, names, tolerances)


def _rows_of_answers(
    pipeline: LatteFlowPipeline, cases: list[QuestionCase], names: list[str], tolerances: Tolerances
) -> Iterator[ParityRow]:
    """Compares the answers of one batch."""
    answerer = pipeline.answerer
    inputs = _inputs_of(pipeline, cases)
    embeds = None
    if inputs.images is not None:
        embeds = answerer.encode_images(inputs.images)
        expected = np.concatenate([case.embeds for case in cases if case.embeds is not None])
        what = f"vision_encoder, {sum(len(case.images) for case in cases)} images, {len(expected)} tokens"
        yield relative_row("engine", what, to_host(embeds), expected, tolerances.engine)
    mask = inputs.attention_mask
    output = answerer.language.forward(inputs.input_ids, mask, inputs.position_ids, embeds)
    kv = answerer.key_values(output.kv, mask)
    for step in range(ANSWER_TOKENS):
        if output.best_token is not None:
            best = np.argmax(output.logits.numpy(), axis=-1).tolist()
            what = f"token {step + 1} of {len(cases)} answers, the likeliest by the logits"
            yield equality_row("answer", what, output.best_token.numpy().tolist(), best)
        for row, (case, name) in enumerate(zip(cases, names, strict=True)):
            value = output.logits.numpy()[row]
            yield relative_row("answer", f"logits of {name}", value, case.logits[step], tolerances.engine, step=step)
        tokens = np.array([case.tokens[step] for case in cases])[:, None]
        positions = np.broadcast_to((inputs.next_position + step)[None, :, None], (3, len(cases), 1))
        output = answerer.language.forward(tokens, kv.mask, positions, past=kv.past)
        kv.add(output.kv)


def _inputs_of(pipeline: LatteFlowPipeline, cases: list[QuestionCase]) -> ChatInputs:
    return pipeline.chat.encode_conversations([[user_message(case.images, case.question)] for case in cases])


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
