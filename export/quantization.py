"""INT8 for the CPU: the matrix products of an engine in 8 bits, chosen by their effect on what the engine is for.

What counts of an expert is the guided velocity, v_u + s·(v_c − v_u), in which errors of both rows add up s-fold; of the
VLM, the keys and values of new tokens and the logits; of the vision tower, the embeddings.

To choose the products, each is quantised by itself on the tensors of real runs. Then the products are taken in the
order of squared error per weight, each that keeps the error of all taken products within a limit. The reported error
is measured on other runs: other prompts, seeds and times. `export.integer_products` has the arithmetic.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from export.engines import GRAPH_FILE, load_engine, save_engine
from export.integer_products import IntegerForm, weight_bits
from export.parity import relative_error
from export.products import SWITCHES, Form, products_of, replace_products
from export.reference import shortened
from runtime.backends import Backend, open_backend, to_host
from runtime.backends.observed import ObservedBackend, ObservedRun
from runtime.flow_time import ExpertSchedule, initial_latents
from runtime.machine import products_saturate
from runtime.manifest import (
    EngineEntry,
    EngineRole,
    Manifest,
    Precision,
    Quantization,
    file_entry,
    load_manifest,
    save_manifest,
)
from runtime.pipeline import LatteFlowPipeline

QUANTIZED_ROLES: tuple[EngineRole, ...] = ("vision_encoder", "vlm", "expert")
"""Engines that spend their time in matrix products. The autoencoder's convolutions are slower in 8 bits."""
RUNS_PER_EXPERT = 4
GUIDANCE_SCALES = (1.0, 3.0, 5.0)
"""Scales at which the error of a velocity is measured; the largest error counts."""
ANSWER_TOKENS = 2

Feed = Mapping[str, np.ndarray]
Quantize = Callable[[EngineEntry, Sequence[Feed], Sequence[Feed]], EngineEntry]


@dataclass(frozen=True)
class CalibrationSet:
    """What the engines are run on: images, and questions about the first two of them."""

    prompts: tuple[str, ...]
    guidance_scales: tuple[float, ...]
    """One for each prompt."""
    question: str
    first_seed: int
    offset: float
    """Place of the times within their steps, from 0 to 1."""

    def times(self, schedule: ExpertSchedule) -> list[float]:
        """Returns a time grid with as many steps in every expert group, however short its interval is."""
        intervals = [schedule.interval(group) for group in range(schedule.num_groups)]
        places = [(step + self.offset) / RUNS_PER_EXPERT for step in range(RUNS_PER_EXPERT)]
        inside = {start + (end - start) * place for start, end in intervals for place in places}
        return sorted({0.0, *inside, 1.0})


TO_CHOOSE = CalibrationSet(
    (
        "a small red circle in the center on a white background",
        "a large green star above a small blue square on a grey background",
        "a photo of a cat on a sofa",
        "an oil painting of mountains at dawn, with a lake in front",
    ),
    (1.5, 3.0, 5.0, 5.0),
    "describe the image",
    first_seed=0,
    offset=0.0,
)
"""Runs on which the products are chosen."""
TO_REPORT = CalibrationSet(
    (
        "a large blue triangle at the top left on a black background",
        "a small yellow ring to the left of a large red cross on a beige background",
        "a street in the rain at night",
        "a watercolour of two boats",
    ),
    (3.0, 5.0, 5.0, 1.5),
    "what colour is the background?",
    first_seed=1000,
    offset=0.5,
)
"""Runs on which the error is reported."""


class QuantizationSettings(BaseModel):
    """How far quantisation may go."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_error: float = Field(default=0.05, ge=0, description="largest relative error of what an engine is for")
    reduce_range: bool | None = Field(default=None, description="7 bits for weights; None: if this CPU needs it")


@dataclass(frozen=True)
class Sensitivity:
    """The error of an engine when one product is quantised by itself."""

    name: str
    size: int
    error: float


class RunRecorder(ObservedBackend):
    """A backend that keeps the inputs of every run of the engines that can be quantised."""

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self.feeds: dict[str, list[Feed]] = {}

    def observe(self, run: ObservedRun) -> None:
        if run.entry.role in QUANTIZED_ROLES:
            feed = {name: to_host(value) for name, value in run.feed.items()}
            self.feeds.setdefault(run.entry.name, []).append(feed)


def record_runs(bundle: Path, calibration: CalibrationSet) -> dict[str, list[Feed]]:
    """Returns the inputs of a bundle's engines while they draw and answer; every engine runs."""
    recorder = RunRecorder(open_backend("cpu"))
    count = len(calibration.prompts)
    # One engine at a time: a model that is large enough to need INT8 hardly fits into memory in fp32.
    with LatteFlowPipeline(bundle, load_manifest(bundle), recorder, low_memory=True) as pipe:
        geometry = pipe.manifest.geometry
        seeds = [calibration.first_seed + image for image in range(count)]
        noise = initial_latents(seeds, (geometry.latent_channels, *geometry.latent_size))
        prompts = [shortened(prompt, pipe.chat.prompt_tokens) for prompt in calibration.prompts]
        distilled = pipe.manifest.sampling.guidance_distilled
        scales = [1.0] * count if distilled else calibration.guidance_scales
        sampler = pipe.sampler(prompts, [""] * count, scales)
        images = pipe.decode(sampler.run(noise, calibration.times(pipe.manifest.schedule)))
        pipe.ask(list(images[:2]), [calibration.question] * 2, max_new_tokens=ANSWER_TOKENS)
    return recorder.feeds


def quantize_engines(
    bundle: Path, fp32: Path, precision: Precision, quantize: Quantize, on_engine: Callable[[str], None]
) -> Manifest:
    """Replaces the engines of a bundle that can be quantised, and saves its manifest.

    Args:
        fp32: the fp32 bundle whose runs count, of the same checkpoint; it may be the bundle itself.
        precision: that of the new engines.
        quantize: replaces the files of an engine; it gets the inputs of the runs on which products are chosen, and of
            those on which the error is reported.
        on_engine: called with the name of each engine before it is quantised.
    """
    manifest = load_manifest(bundle)
    seen, unseen = (record_runs(fp32, calibration) for calibration in (TO_CHOOSE, TO_REPORT))
    engines = []
    for entry in manifest.engines:
        if entry.role in QUANTIZED_ROLES:
            on_engine(entry.name)
            entry = quantize(entry, seen[entry.name], unseen[entry.name])
        engines.append(entry)
    manifest = manifest.model_copy(update={"precision": precision, "engines": tuple(engines)})
    save_manifest(manifest, bundle)
    return manifest


def quantize_bundle(
    bundle: Path, settings: QuantizationSettings, on_engine: Callable[[str], None] = lambda _: None
) -> Manifest:
    """Quantises the engines of an fp32 bundle to INT8 in place, and saves its manifest.

    Args:
        on_engine: called with the name of each engine before it is quantised.
    """
    reduce_range = products_saturate() if settings.reduce_range is None else settings.reduce_range
    bits = weight_bits(reduce_range)

    def quantize(entry: EngineEntry, seen: Sequence[Feed], unseen: Sequence[Feed]) -> EngineEntry:
        chosen = choose_products(bundle, entry, IntegerForm(bits), seen, unseen, settings.max_error)
        rewritten = rewrite_engine(bundle, entry, bundle, set(chosen.quantized), bits)
        described = chosen.model_copy(update={"reduced_range": reduce_range})
        return rewritten.model_copy(update={"quantization": described})

    return quantize_engines(bundle, bundle, "int8", quantize, on_engine)


def choose_products(
    bundle: Path, entry: EngineEntry, form: Form, seen: Sequence[Feed], unseen: Sequence[Feed], max_error: float
) -> Quantization:
    """Chooses the products of an fp32 engine that can have another form, and measures the error of all of them.

    Args:
        seen: inputs of the runs on which the products are chosen.
        unseen: inputs of the runs on which the error is reported.
    """
    with tempfile.TemporaryDirectory(dir=bundle) as temporary:  # as large as the engine, so not in the system's folder
        engine = _SwitchableEngine(bundle, entry, Path(temporary), form)
        chosen = engine.choose(seen, max_error)
        return Quantization(
            reduced_range=False,
            error=engine.error(unseen, chosen, engine.references(unseen)),
            quantized=tuple(name for name in engine.products if name in chosen),
            kept=tuple(name for name in engine.products if name not in chosen),
        )


def rewrite_engine(
    bundle: Path, entry: EngineEntry, target: Path, chosen: set[str] | None = None, bits: int = 8
) -> EngineEntry:
    """Writes the INT8 form of an engine into a bundle, the same or another; returns its entry.

    Args:
        chosen: weights of the products to quantise; None for all.
    """
    return rewrite_in_form(bundle, entry, target, IntegerForm(bits), "int8", chosen)


def rewrite_in_form(
    bundle: Path, entry: EngineEntry, target: Path, form: Form, precision: Precision, chosen: set[str] | None
) -> EngineEntry:
    """Writes an engine into a bundle, the same or another, with products in another form; returns its entry.

    Args:
        precision: that of the new engine.
        chosen: weights of the products; None for all.
    """
    graph = load_engine(bundle / entry.name)
    replace_products(graph, {p.name for p in products_of(graph)} if chosen is None else chosen, form)
    files = save_engine(graph, target / entry.name)
    entries = tuple(file_entry(target, f"{entry.name}/{file}") for file in files)
    return entry.model_copy(update={"precision": precision, "opset": graph.opset_imports[""], "files": entries})


def quiet_session(folder: Path) -> Any:
    """Opens an engine's graph in ONNX Runtime on the CPU, as it is, without its warnings."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(str(folder / GRAPH_FILE), options, providers=["CPUExecutionProvider"])


class _SwitchableEngine:
    """An fp32 engine that computes every product both ways, and an input that selects one of the two for each."""

    def __init__(self, bundle: Path, entry: EngineEntry, folder: Path, form: Form) -> None:
        graph = load_engine(bundle / entry.name)
        self.products = {product.name: product.size for product in products_of(graph)}
        """Number of weights of every product, by the name of its weight."""
        replace_products(graph, set(self.products), form, switchable=True)
        save_engine(graph, folder)
        self._session = quiet_session(folder)
        self._entry = entry

    def references(self, feeds: Sequence[Feed]) -> list[list[np.ndarray]]:
        """Returns what counts of the outputs of the fp32 engine, for every run."""
        return [self._run(feed, set()) for feed in feeds]

    def error(self, feeds: Sequence[Feed], quantized: set[str], references: Sequence[Sequence[np.ndarray]]) -> float:
        """Returns the largest relative error of anything that counts, in any run."""
        return max(
            relative_error(value, reference)
            for feed, expected in zip(feeds, references, strict=True)
            for value, reference in zip(self._run(feed, quantized), expected, strict=True)
        )

    def choose(self, feeds: Sequence[Feed], max_error: float) -> set[str]:
        """Chooses products that together stay within `max_error`, those first that save most for their error.

        Errors of products are nearly independent, so their squares add up; that gives the order. Whether a product
        still fits is measured.
        """
        references = self.references(feeds)
        if self.error(feeds, set(self.products), references) <= max_error:
            return set(self.products)
        sensitivities = [
            Sensitivity(name, size, self.error(feeds, {name}, references)) for name, size in self.products.items()
        ]
        chosen: set[str] = set()
        for product in sorted(sensitivities, key=lambda s: s.error**2 / s.size):
            if product.error <= max_error and self.error(feeds, chosen | {product.name}, references) <= max_error:
                chosen.add(product.name)
        return chosen

    def _run(self, feed: Feed, quantized: set[str]) -> list[np.ndarray]:
        names = [spec.name for spec in self._entry.outputs]
        switches = np.array([name in quantized for name in self.products])
        outputs = self._session.run(names, {**feed, SWITCHES: switches})
        return list(what_counts(self._entry.role, feed, dict(zip(names, outputs, strict=True))))


def what_counts(role: EngineRole, feed: Feed, outputs: Mapping[str, np.ndarray]) -> Iterator[np.ndarray]:
    """Yields the tensors by which an engine's accuracy is judged.

    Args:
        feed: inputs of the run. An expert's rows are the conditional rows of all images, then their unconditional rows.
    """
    if role == "expert":
        conditional, unconditional = np.split(outputs["velocity"], 2)
        for scale in GUIDANCE_SCALES:
            yield unconditional + np.float32(scale) * (conditional - unconditional)
    elif role == "vlm":
        tokens = feed["input_ids"].shape[1]
        is_token = feed["attention_mask"][:, -tokens:]  # [B, S]; the past is the same, and padding is never read
        yield outputs["logits"]
        for name, kv in outputs.items():
            if name.startswith("kv_"):
                new = np.moveaxis(kv[..., -tokens:, :], (2, 4), (0, 1))[is_token]  # [tokens, M, 2, Hkv, D]
                yield from (new[:, :, part] for part in range(2))  # keys are larger than values
    else:
        yield from outputs.values()
