"""What timestep experts and engines buy: the expert engines beside models that must do without the one or the other.

    experts         the engines of this project: a step runs the M layers of its group
    experts, int8   the same, every matrix product in INT8
    dense twin      the same runtime and sizes, all L layers at every step: a flow model without timestep experts
    autoregressive  the same L layers writing image tokens one by one, with a KV cache and guidance (arXiv 2410.13848)
    PyTorch         the reference's expert, eager and compiled

Weights are random: time does not depend on them. What would take long is timed on a sample and scaled, and
the report says so. All sides take turns in one run, each on its own engines in ONNX Runtime.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch

from export.paper_size import export_random_expert, export_random_language_model, one_group
from export.quantization import rewrite_engine, weight_bits
from latte.config import LatteFlowConfig
from latte.model import FlowTransformer
from runtime.backends import Session, open_backend
from runtime.doctor import products_saturate
from runtime.language import LanguageModel
from runtime.manifest import EngineEntry, TensorSpec, file_entry

PREFIX_TOKENS = 32
"""Of a prompt in its chat template."""
IMAGE_VOCABULARY = 16_384
"""Of the autoregressive twin's image tokens, as in Janus."""
IMAGE_TOKENS = (576, 64)
"""A 24x24 grid, as Janus writes, and as many as the flow has latents."""
STEPS = (10, 20, 40)
IMAGES = (1, 2, 8)
Size = Literal["shapes", "paper"]
ROWS_PER_IMAGE = 2
"""With guidance."""
GEMM_SHAPES = ((128, 1536, 1536), (128, 1536, 8960), (128, 8960, 1536), (512, 1536, 8960))
"""(rows, inner, columns) of the products tried for the machine's peak."""


@dataclass(frozen=True)
class Timing:
    """One side at one number of images."""

    side: str
    images: int
    seconds: list[float]
    """Of a step, of a token, or of a prefix, one for each round."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass
class GenerationReport:
    """All that one run measured."""

    size: str
    step: dict[str, dict[int, Timing]] = field(default_factory=dict)
    """Of a sampling step with guidance, by side and images."""
    prefix: dict[int, Timing] = field(default_factory=dict)
    """Of encoding the prompts."""
    token: dict[int, dict[int, Timing]] = field(default_factory=dict)
    """Of one token of the autoregressive twin, by images and tokens already there."""
    gemm_peak: float = 0.0
    """Best rate of ONNX Runtime's matrix product, in FLOP/s."""
    step_flops: int = 0
    """Multiplications and additions of the products of an expert step of one image."""
    notes: list[str] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Of an expert step with the fewest images, in FLOP/s."""
        fewest = min(self.step["experts"])
        return fewest * self.step_flops / self.step["experts"][fewest].median

    @property
    def efficiency(self) -> float:
        """The rate in proportion to the peak."""
        return self.rate / self.gemm_peak

    def calls(self) -> Iterator[tuple[str, Callable[[int], float], Callable[[int], float]]]:
        """Whole calls: name, seconds by images, and those of the experts that they are compared with."""
        for steps in STEPS:
            experts = partial(self.total, "experts", steps)
            for side in self.step:
                yield f"{side}, {steps} steps", partial(self.total, side, steps), experts
        for tokens in IMAGE_TOKENS:
            yield (
                f"autoregressive twin, {tokens} tokens",
                partial(self.autoregressive, tokens),
                partial(self.total, "experts", 20),
            )

    def total(self, side: str, steps: int, images: int) -> float:
        """Seconds of a call without the autoencoder, which is the same for all flow models."""
        return self.prefix[images].median + steps * self.step[side][images].median

    def autoregressive(self, tokens: int, images: int) -> float:
        """Seconds to write so many image tokens; a token's time is a line in the tokens before it."""
        places = self.token[images]
        (first, a), (last, b) = ((place, places[place].median) for place in (min(places), max(places)))
        slope = (b - a) / (last - first)
        mean_place = (tokens - 1) / 2
        return self.prefix[images].median + tokens * (a + slope * (mean_place - first))


def report_as_dict(report: GenerationReport) -> dict[str, Any]:
    """For JSON: all times, and what follows from them."""
    images = sorted(report.step["experts"])  # keys are text, as in JSON, so that reports compare before and after
    return {
        "size": report.size,
        "step_seconds": {side: {str(n): t.seconds for n, t in times.items()} for side, times in report.step.items()},
        "prefix_seconds": {str(n): timing.seconds for n, timing in report.prefix.items()},
        "token_seconds": {str(n): {str(p): t.seconds for p, t in of.items()} for n, of in report.token.items()},
        "call_seconds": {name: {str(n): seconds(n) for n in images} for name, seconds, _ in report.calls()},
        "gemm_peak": report.gemm_peak,
        "efficiency": report.efficiency,
        "notes": report.notes,
    }


def plot_generation(report: GenerationReport, path: Path) -> None:
    """Whole calls of one image, a dot for each."""
    from matplotlib.figure import Figure

    fewest = min(report.step["experts"])
    names, seconds = zip(*((name, of(fewest)) for name, of, _ in report.calls()), strict=True)
    figure = Figure(figsize=(9, 0.35 * len(names) + 1.2), layout="constrained")
    axes = figure.subplots()
    colours = ["#1f77b4" if name.startswith("experts") else "#999999" for name in names]
    axes.scatter(seconds, range(len(names)), color=colours)
    axes.set_yticks(range(len(names)), names)
    for place, value in enumerate(seconds):
        axes.annotate(f"{value:.3g} s", (value, place), xytext=(7, -4), textcoords="offset points")
    axes.margins(x=0.12)
    axes.grid(axis="x", alpha=0.3)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel(f"seconds for {fewest} image{'s' * (fewest > 1)} with guidance, without the decoder, log scale")
    axes.set_title(f"size {report.size}")
    figure.savefig(path, dpi=120)


def measure_generation(
    size: str,
    config: LatteFlowConfig,
    provider: str,
    rounds: int,
    images: tuple[int, ...],
    compile_reference: bool,
    on_stage: Callable[[str], None],
) -> GenerationReport:
    """Runs everything, one model in memory at a time but for the two that a target compares.

    Args:
        config: sizes of the flow layers, which the VLM's mirror.
        rounds: of each measurement; the median counts.
    """
    report = GenerationReport(size, step_flops=step_flops(config, config.layers_per_group))
    experts, layers = config.layers_per_group, config.num_hidden_layers
    with tempfile.TemporaryDirectory() as folder:
        on_stage("experts and dense twin: export")
        with (
            _session(Path(folder) / "experts", provider, one_group(config, experts)) as expert,
            _session(Path(folder) / "dense", provider, one_group(config, layers)) as dense,
            _quantized_session(Path(folder), provider, expert.entry) as quantized,
        ):
            on_stage("experts and dense twin: time")
            report.gemm_peak = gemm_peak(provider, Path(folder), rounds)
            sides = {"experts": expert, "dense twin": dense} | ({"experts, int8": quantized} if quantized else {})
            for count in images:
                runs = {name: _step(session, config, count) for name, session in sides.items()}
                _take_turns(report.step, runs, count, rounds)
        on_stage("PyTorch: time")
        _time_reference(report, config, rounds, compile_reference, images)
        on_stage("autoregressive twin: export")
        _time_language_model(report, Path(folder) / "language", provider, config, rounds, images, on_stage)
    report.notes.append(
        f"one expert group was timed and stands for all {config.schedule.num_groups}, which have the same graph; "
        f"image tokens were timed at {', '.join(map(str, next(iter(report.token.values()))))} tokens before them"
    )
    return report


def step_flops(config: LatteFlowConfig, layers: int) -> int:
    """Of the matrix products of one guided image's step: rows, latent tokens, and keys of prefix and latents."""
    tokens = config.latent_size[0] * config.latent_size[1]
    hidden, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
    projections = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * config.intermediate_size
    attention = 2 * hidden * (tokens + PREFIX_TOKENS)
    return 2 * ROWS_PER_IMAGE * tokens * layers * (projections + attention)


def gemm_peak(provider: str, folder: Path, rounds: int) -> float:
    """The best rate of ONNX Runtime's own matrix product here, in FLOP/s."""
    best = 0.0
    rng = np.random.default_rng(0)
    for rows, inner, columns in GEMM_SHAPES:
        weight = onnx.numpy_helper.from_array(rng.standard_normal((inner, columns), np.float32), "w")
        graph = onnx.helper.make_graph(
            [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
            "gemm",
            [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [rows, inner])],
            [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [rows, columns])],
            [weight],
        )
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
        onnx.save(model, folder / "gemm.onnx")
        entry = EngineEntry(
            name="gemm",
            precision="fp32",
            opset=18,
            fused=False,
            files=(file_entry(folder, "gemm.onnx"),),
            inputs=(TensorSpec(name="x", dtype="float32", shape=(rows, inner)),),
            outputs=(TensorSpec(name="y", dtype="float32", shape=(rows, columns)),),
        )
        x = rng.standard_normal((rows, inner), np.float32)
        with open_backend(provider).load(folder, entry) as session:
            for _ in range(3 * rounds):
                started = time.perf_counter()
                session.run({"x": x})["y"].numpy()
                best = max(best, 2 * rows * inner * columns / (time.perf_counter() - started))
    return best


@contextmanager
def _session(folder: Path, provider: str, config: LatteFlowConfig) -> Iterator[Session]:
    with open_backend(provider).load(folder, export_random_expert(folder, "fp32", config)) as session:
        yield session


@contextmanager
def _quantized_session(folder: Path, provider: str, entry: EngineEntry) -> Iterator[Session | None]:
    """The experts with every product in INT8, which is for the CPU."""
    if provider != "cpu":
        yield None
        return
    bits = weight_bits(products_saturate())
    quantized = rewrite_engine(folder / "experts", entry, folder / "int8", bits=bits)
    with open_backend(provider).load(folder / "int8", quantized) as session:
        yield session


def _take_turns(
    into: dict[str, dict[int, Timing]], runs: Mapping[str, Callable[[], object]], images: int, rounds: int
) -> None:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if turn:  # the first warms up
                times[name].append(time.perf_counter() - started)
    for name, seconds in times.items():
        into.setdefault(name, {})[images] = Timing(name, images, seconds)


def _step(session: Session, config: LatteFlowConfig, images: int) -> Callable[[], object]:
    feed = _flow_inputs(config, session.entry.inputs[2].shape[0], images)
    return lambda: session.run(feed)["velocity"].numpy()


def _flow_inputs(config: LatteFlowConfig, layers: int | str, images: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    rows = images * ROWS_PER_IMAGE
    kv = (int(layers), 2, rows, config.num_key_value_heads, PREFIX_TOKENS, config.head_dim)
    return {
        "latents": rng.standard_normal((rows, config.latent_channels, *config.latent_size), np.float32),
        "timestep": np.full(rows, 0.3, np.float32),
        "prefix_kv": rng.standard_normal(kv, np.float32),
        "prefix_mask": np.ones((rows, PREFIX_TOKENS), bool),
    }


def _time_reference(
    report: GenerationReport, config: LatteFlowConfig, rounds: int, compiled: bool, images: tuple[int, ...]
) -> None:
    flow = FlowTransformer(one_group(config, config.layers_per_group)).eval()
    sides: dict[str, Any] = {"PyTorch eager": flow}
    if compiled:
        sides["torch.compile"] = torch.compile(flow, dynamic=False)
    with torch.no_grad():
        for count in images:
            inputs = _flow_inputs(config, config.layers_per_group, count)
            tensors = [torch.from_numpy(inputs[name]) for name in ("latents", "timestep", "prefix_kv", "prefix_mask")]
            runs = {name: _reference_step(side, tensors) for name, side in sides.items()}
            _take_turns(report.step, runs, count, max(1, rounds // 2))


def _reference_step(side: Any, tensors: list[torch.Tensor]) -> Callable[[], object]:
    return lambda: side(*tensors, 0)


def _time_language_model(
    report: GenerationReport,
    folder: Path,
    provider: str,
    config: LatteFlowConfig,
    rounds: int,
    images: tuple[int, ...],
    on_stage: Callable[[str], None],
) -> None:
    entry = export_random_language_model(folder, "fp32", config, IMAGE_VOCABULARY)
    backend, groups, layers = open_backend(provider), config.schedule.num_groups, config.layers_per_group
    with backend.load(folder, entry) as session:
        language = LanguageModel({"vlm": session})
        on_stage("autoregressive twin: time")
        rng = np.random.default_rng(0)
        for count in images:
            rows = count * ROWS_PER_IMAGE
            ids = rng.integers(1, IMAGE_VOCABULARY, (rows, PREFIX_TOKENS))
            # Prompts alone: the unconditional prefix is made once for all calls.
            prompts = {"prefix": lambda ids=ids, n=count: language.forward(ids[:n], np.ones((n, PREFIX_TOKENS), bool))}
            into: dict[str, dict[int, Timing]] = {}
            _take_turns(into, prompts, count, rounds)
            report.prefix[count] = into["prefix"][count]
            report.token[count] = {}
            for place in (0, max(IMAGE_TOKENS) - 1):
                # Drawn, not computed: to read that many tokens would take longer than all that is timed.
                kv = (layers, 2, rows, config.num_key_value_heads, PREFIX_TOKENS + place, config.head_dim)
                past = tuple(backend.upload(rng.standard_normal(kv, np.float32)) for _ in range(groups))
                total = PREFIX_TOKENS + place + 1
                token = {
                    "token": lambda ids=ids[:, :1], past=past, total=total, rows=rows: language.forward(
                        ids,
                        np.ones((rows, total), bool),
                        np.full((3, rows, 1), total - 1, np.int64),
                        past=past,
                    ).logits.numpy()
                }
                into = {}
                _take_turns(into, token, count, rounds)
                report.token[count][place] = into["token"][count]
