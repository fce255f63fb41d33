"""The gain from timestep experts and from engines: the expert engines against models without the one or the other.

    experts         the engines of this project: a step runs the M layers of its group
    experts, int8   the same, with every matrix product in INT8
    distilled       the same engines with guidance built in, one row for an image, in as many steps as there are groups
    dense twin      the same runtime and sizes, all L layers in every step: a flow model without timestep experts
    autoregressive  the same L layers writing image tokens one by one, with a KV cache and guidance (arXiv 2410.13848)
    PyTorch         the reference's expert, eager and compiled

Weights are random, because time does not depend on them. Runs that would take long are timed on a sample and scaled,
and the report says so. All sides take turns in one run, each on its own engines in ONNX Runtime.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import onnx
import torch
import typer
from diffusers import AutoencoderDC
from rich.table import Table

from export.benchmarks.generation_report import IMAGE_TOKENS, GenerationReport, plot_generation, report_as_dict
from export.benchmarks.limits import (
    PREFIX_TOKENS,
    ROWS_PER_IMAGE,
    Limits,
    active_parameters,
    limits_of,
    step_work,
    token_work,
)
from export.benchmarks.random_models import (
    export_random_decoder,
    export_random_expert,
    export_random_language_model,
)
from export.benchmarks.report import Against, AsJson, ProviderName, Publisher, app
from export.benchmarks.timing import Turns, take_turns
from export.benchmarks.torch_twins import flow_inputs, measured_limits, modes_of, prepared, random_flow, stopwatch_of
from export.commands import staged
from export.integer_products import weight_bits
from export.plans.build import BuildOptions, with_plan
from export.quantization import rewrite_engine
from export.verify import runs_on
from latte.checkpoint import load_config, resolve_checkpoint
from latte.config import LatteFlowConfig, one_group
from latte.paper import PAPER, vae_config_of
from runtime.backends import Backend, DeviceTensor, Session, open_backend
from runtime.console import stdout
from runtime.errors import InputError
from runtime.language import LanguageModel
from runtime.machine import find_gpu, products_saturate
from runtime.manifest import AxisRange, EngineEntry, PlanProfile, TensorSpec, file_entry
from runtime.plans import TENSORRT

IMAGE_VOCABULARY = 16_384
"""Of the autoregressive twin's image tokens, as in Janus."""
IMAGES = (1, 2, 8)
Size = Literal["shapes", "paper"]
OfFlow = Literal["fp32", "fp16", "bf16"]
PYTORCH: dict[str, str] = {
    "eager": "PyTorch eager",
    "CUDA graph": "PyTorch, CUDA graph",
    "compiled": "torch.compile",
    "compiled, CUDA graph": "torch.compile, CUDA graph",
}
"""The names of the reference's sides, by mode."""
GEMM_SHAPES = ((128, 1536, 1536), (128, 1536, 8960), (128, 8960, 1536), (512, 1536, 8960))
"""(rows, inner, columns) of the products tried for the machine's peak."""


@dataclass(frozen=True)
class GenerationSettings:
    """What is measured, and how."""

    size: str
    provider: str
    precision: OfFlow = "fp32"
    rounds: int = 5
    """Of each measurement; the median counts."""
    images: tuple[int, ...] = IMAGES
    """Numbers of images in a call."""
    compiled: bool = False
    """Whether torch.compile is timed too."""

    def __post_init__(self) -> None:
        if not runs_on(self.precision, self.provider):
            raise InputError(f"{self.provider} does not run {self.precision}; choose fp16 or fp32, or another provider")


def measure_generation(
    settings: GenerationSettings,
    config: LatteFlowConfig,
    vae_config: Mapping[str, Any],
    on_stage: Callable[[str], None],
) -> GenerationReport:
    """Measures all sides; experts and dense twin are in memory together, the other models one at a time.

    Args:
        config: sizes of the flow layers; the VLM's layers have the same.
        vae_config: the config of the `AutoencoderDC`.
    """
    experts, layers = config.layers_per_group, config.num_hidden_layers
    report = GenerationReport(
        settings.size,
        settings.precision,
        groups=config.schedule.num_groups,
        active={
            "experts": active_parameters(config, experts),
            "dense twin": active_parameters(config, layers),
        },
    )
    backend = open_backend(settings.provider)
    bench = Bench(settings, config, report, backend, on_stage)
    with tempfile.TemporaryDirectory() as temporary, closing(backend):
        folder = Path(temporary)
        on_stage("device: measure its limits")
        report.limits = _limits(settings, folder)
        bench.time_flow_models(folder)
        bench.time_decoder(folder / "decoder", vae_config)
        on_stage("PyTorch: time")
        bench.time_reference()
        bench.time_language_model(folder / "language")
    report.notes.append(
        f"one expert group was timed and stands for all {config.schedule.num_groups}, which have the same graph; "
        f"image tokens were timed at {', '.join(map(str, next(iter(report.token.values()))))} tokens before them"
    )
    return report


def _limits(settings: GenerationSettings, folder: Path) -> list[Limits]:
    """Returns the rates of the device: measured ones first, if they can be measured, then those of its data sheet."""
    if settings.provider == "cpu":
        return [replace(measured_limits("fp32", "cpu"), flops=gemm_peak(folder, settings.rounds))]
    gpu = find_gpu()
    sheet = limits_of(gpu.name, settings.precision) if gpu else None
    measured = measured_limits(settings.precision, "cuda") if torch.cuda.is_available() else None
    return [found for found in (measured, sheet) if found is not None]


def gemm_peak(folder: Path, rounds: int) -> float:
    """Measures the best rate of ONNX Runtime's own matrix product on this CPU, in FLOP/s."""
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
            role="solver_step",
            precision="fp32",
            opset=18,
            fused=False,
            files=(file_entry(folder, "gemm.onnx"),),
            inputs=(TensorSpec(name="x", dtype="float32", shape=(rows, inner)),),
            outputs=(TensorSpec(name="y", dtype="float32", shape=(rows, columns)),),
        )
        x = rng.standard_normal((rows, inner), np.float32)
        with open_backend("cpu").load(folder, entry) as session:
            for _ in range(3 * rounds):
                started = time.perf_counter()
                session.run({"x": x})["y"].numpy()
                best = max(best, 2 * rows * inner * columns / (time.perf_counter() - started))
    return best


class Bench:
    """Times the sides one after another and adds what it finds to a report."""

    def __init__(
        self,
        settings: GenerationSettings,
        config: LatteFlowConfig,
        report: GenerationReport,
        backend: Backend,
        on_stage: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._config = config
        self._report = report
        self._backend = backend
        self._on_stage = on_stage

    def time_flow_models(self, folder: Path) -> None:
        """Times experts and dense twin, on the CPU also the experts in INT8."""
        settings, config, report = self._settings, self._config, self._report
        layers = {"experts": config.layers_per_group, "dense twin": config.num_hidden_layers}
        self._on_stage("experts and dense twin: export")
        sides: dict[str, Session] = {}
        with ExitStack() as stack:
            for name, count in layers.items():
                entry = export_random_expert(folder / name, settings.precision, one_group(config, count))
                sizes = self._latent_sizes() | {"rows": (1, ROWS_PER_IMAGE * max(settings.images))}
                sides[name] = stack.enter_context(self._load(folder / name, entry, sizes))
            if settings.provider == "cpu" and settings.precision == "fp32":
                bits = weight_bits(products_saturate())
                experts = sides["experts"].entry
                entry = rewrite_engine(folder / "experts", experts, folder / "int8", bits=bits)
                sides["experts, int8"] = stack.enter_context(self._load(folder / "int8", entry))
            self._on_stage("experts and dense twin: time")
            for count in settings.images:
                runs = {name: self._step(session, ROWS_PER_IMAGE * count) for name, session in sides.items()}
                report.add_steps(count, self._take_turns(runs))
                for name, of_step in layers.items():
                    work = step_work(config, of_step, count, settings.precision)
                    report.work.setdefault(name, {})[count] = work
                runs = {name: self._step(session, count) for name, session in sides.items() if name != "dense twin"}
                for name, times in self._take_turns(runs).items():
                    report.one_row.setdefault(name, {})[count] = times

    def time_decoder(self, folder: Path, vae_config: Mapping[str, Any]) -> None:
        """Times the decoder, which is in fp32 always."""
        self._on_stage("decoder: export and time")
        config, settings = self._config, self._settings
        rng = np.random.default_rng(0)
        entry = export_random_decoder(folder, config, vae_config)
        sizes = self._latent_sizes() | {"batch": (1, max(settings.images))}
        with self._load(folder, entry, sizes) as session:
            for count in settings.images:
                latents = rng.standard_normal((count, config.latent_channels, *config.latent_size), np.float32)
                feed = {"latents": self._backend.upload(latents)}
                self._report.decoder[count] = self._take_turns({"decoder": _running(session, feed)})["decoder"]

    def time_reference(self) -> None:
        """Times the reference: on the GPU in the engines' precision where PyTorch has one, else on the CPU in fp32."""
        settings, config = self._settings, self._config
        on_gpu = settings.provider != "cpu" and torch.cuda.is_available()
        device, precision = ("cuda", settings.precision) if on_gpu else ("cpu", "fp32")
        flow = random_flow(one_group(config, config.layers_per_group), precision, device)
        modes = [*modes_of(device, False), *(modes_of(device, True) if settings.compiled else ())]
        with torch.no_grad():
            for count in settings.images:
                latents, timestep, kv, mask = flow_inputs(config, count, precision, device)
                rows = latents.repeat(ROWS_PER_IMAGE, 1, 1, 1).to(kv.dtype)
                inputs = [(rows, timestep, kv, mask, 0)]
                runs = {PYTORCH[mode]: _ignoring_turn(prepared([flow], inputs, mode)) for mode in modes}
                rounds = max(1, settings.rounds // 2)
                self._report.add_steps(count, take_turns(runs, rounds, stopwatch=stopwatch_of(device)))

    def time_language_model(self, folder: Path) -> None:
        """Times prompts and image tokens of the autoregressive twin."""
        config, settings, report = self._config, self._settings, self._report
        self._on_stage("autoregressive twin: export")
        entry = export_random_language_model(folder, settings.precision, config, IMAGE_VOCABULARY)
        most, places = max(settings.images), (0, max(IMAGE_TOKENS) - 1)
        lengths = tuple(PREFIX_TOKENS + place for place in places)
        prompts = {"batch": (1, most), "tokens": (PREFIX_TOKENS,), "past": (0,), "image_tokens": (1,)}
        tokens = {"batch": (ROWS_PER_IMAGE, ROWS_PER_IMAGE * most), "tokens": (1,), "past": lengths}
        tokens |= {"image_tokens": (1,), "total": tuple(length + 1 for length in lengths)}
        with self._load(folder, entry, prompts | {"total": (PREFIX_TOKENS,)}, tokens) as session:
            language = LanguageModel({"vlm": session})
            self._on_stage("autoregressive twin: time")
            rng = np.random.default_rng(0)
            for count in settings.images:
                rows = count * ROWS_PER_IMAGE
                ids = rng.integers(IMAGE_VOCABULARY - 1, size=(rows, PREFIX_TOKENS))  # the last one is an image's place
                # Only prompts: the unconditional prefix is encoded once for all calls.
                report.prefix[count] = self._take_turns({"prefix": _encoding(language, ids[:count])})["prefix"]
                # The past is random: computing that many tokens would take longer than everything that is timed.
                pasts = {place: self._random_past(entry, rows, PREFIX_TOKENS + place, rng) for place in places}
                report.token[count] = {
                    place: self._take_turns({"token": _writing(language, ids[:, :1], past)})["token"]
                    for place, past in pasts.items()
                }
                work = token_work(config, IMAGE_VOCABULARY, lengths[-1], count, settings.precision)
                report.work.setdefault("autoregressive twin, a token", {})[count] = work

    def _load(self, folder: Path, entry: EngineEntry, *uses: Mapping[str, tuple[int, ...]]) -> Session:
        """Loads an engine. A provider that runs TensorRT plans gets one for these sizes of the axes, in each use."""
        if self._settings.provider in TENSORRT:
            profiles = tuple(
                PlanProfile(
                    name=f"use {index}",
                    axes={axis: AxisRange(min=min(s), opt=min(s), max=max(s)) for axis, s in use.items()},
                )
                for index, use in enumerate(uses)
            )
            options = BuildOptions(provider=self._settings.provider)
            entry = with_plan(folder, entry, options, profiles)
        return self._backend.load(folder, entry)

    def _latent_sizes(self) -> dict[str, tuple[int, ...]]:
        height, width = self._config.latent_size
        return {"prefix": (PREFIX_TOKENS,), "latent_height": (height,), "latent_width": (width,)}

    def _take_turns(self, sides: Mapping[str, Callable[[int], object]]) -> dict[str, Turns[object]]:
        if self._settings.provider in TENSORRT:
            for side in sides.values():  # the third run is a CUDA graph's, and the first of `take_turns` is not timed
                side(0)
                side(0)
        return take_turns(sides, self._settings.rounds, stopwatch=self._backend.timed)

    def _step(self, session: Session, rows: int) -> Callable[[int], object]:
        """Returns a run of an expert, whose inputs are on the device, as they are in the sampling loop."""
        config, rng = self._config, np.random.default_rng(0)
        spec = session.entry.input("prefix_kv")
        kv = (int(spec.shape[0]), 2, rows, config.num_key_value_heads, PREFIX_TOKENS, config.head_dim)
        feed = {
            "latents": rng.standard_normal((rows, config.latent_channels, *config.latent_size), np.float32),
            "timestep": np.full(rows, 0.3, np.float32),
            "prefix_kv": rng.standard_normal(kv, np.float32).astype(spec.dtype),
            "prefix_mask": np.ones((rows, PREFIX_TOKENS), bool),
        }
        return _running(session, {name: self._backend.upload(value) for name, value in feed.items()})

    def _random_past(
        self, entry: EngineEntry, rows: int, tokens: int, rng: np.random.Generator
    ) -> tuple[DeviceTensor, ...]:
        config = self._config
        kv = (config.layers_per_group, 2, rows, config.num_key_value_heads, tokens, config.head_dim)
        dtype = entry.input("past_kv_0").dtype
        groups = range(config.schedule.num_groups)
        return tuple(self._backend.upload(rng.standard_normal(kv, np.float32).astype(dtype)) for _ in groups)


def _running(session: Session, feed: Mapping[str, DeviceTensor]) -> Callable[[int], object]:
    """Returns a run that keeps no output, so that the next one gets the same memory, as in the loop, and is a graph."""

    def run(_: int) -> None:
        session.run(feed)

    return run


def _ignoring_turn(run: Callable[[], object]) -> Callable[[int], object]:
    return lambda _: run()


def _encoding(language: LanguageModel, ids: np.ndarray) -> Callable[[int], object]:
    def encode(_: int) -> None:
        language.forward(ids, np.ones(ids.shape, bool))

    return encode


def _writing(language: LanguageModel, ids: np.ndarray, past: tuple[DeviceTensor, ...]) -> Callable[[int], object]:
    rows, total = len(ids), past[0].shape[4] + 1
    mask, positions = np.ones((rows, total), bool), np.full((3, rows, 1), total - 1, np.int64)

    def write(_: int) -> None:
        language.forward(ids, mask, positions, past=past)

    return write


def load_vae_config(checkpoint: str) -> Mapping[str, Any]:
    """Returns the config of a checkpoint's `AutoencoderDC`."""
    return dict(AutoencoderDC.load_config(resolve_checkpoint(checkpoint) / "vae"))


@app.command(no_args_is_help=False)
def generation(
    size: Annotated[Size, typer.Option(help="Size of the models; their weights are random.")] = "shapes",
    provider: ProviderName = "cpu",
    precision: Annotated[OfFlow, typer.Option(help="Of experts and language model; the decoder is in fp32.")] = "fp32",
    rounds: Annotated[int, typer.Option(help="Number of rounds of each measurement.", min=1)] = 5,
    images: Annotated[list[int] | None, typer.Option(help="Images in a call; 1, 2 and 8 by default.")] = None,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Also time torch.compile.")] = True,
    plot: Annotated[Path | None, typer.Option(help="Draw the comparison here.")] = None,
    against: Against = None,
    as_json: AsJson = False,
) -> None:
    """Compare the expert engines with a dense twin, an autoregressive twin and PyTorch, in one run.

    \b
    Examples:
      latte-flow bench generation
      latte-flow bench generation --size paper --rounds 3 --plot generation.png
      latte-flow bench generation --size paper --provider cuda --precision bf16
      latte-flow bench generation --json > old.json; latte-flow bench generation --compare old.json
    """
    publisher = Publisher(as_json, against)
    counts = tuple(images or IMAGES)
    settings = GenerationSettings(size, provider, precision, rounds, counts, compiled)
    config = PAPER if size == "paper" else load_config(resolve_checkpoint("shapes"))
    vae_config = vae_config_of(PAPER.latent_channels) if size == "paper" else load_vae_config("shapes")
    with staged() as on_stage:
        report = measure_generation(settings, config, vae_config, on_stage)
    if plot is not None:
        plot_generation(report, plot)

    def show() -> None:
        table = Table("a guided step", *(f"{n} image{'s' * (n > 1)}" for n in counts), "experts are faster by")
        for side, timings in report.step.items():
            ratio = timings[counts[0]].median / report.step["experts"][counts[0]].median
            shown = (f"{1000 * timings[n].median:.1f} ms" if n in timings else "" for n in counts)
            table.add_row(side, *shown, "" if side == "experts" else f"{ratio:.2f}x")
        stdout.print(table)
        table = Table("a call, without the decoder", *(f"{n} image{'s' * (n > 1)}" for n in counts), "to experts")
        for name, seconds, base in report.calls():
            shown = (f"{seconds(n):.2f} s" for n in counts)
            table.add_row(name, *shown, f"{seconds(counts[0]) / base(counts[0]):.2f}x")
        stdout.print(table)
        heads = (f"{n} image{'s' * (n > 1)}" for n in counts)
        table = Table("a call with prefix and decoder", *heads, *(f"to experts, {n}" for n in counts))
        (_, first), *_ = report.whole_calls()
        for name, seconds in report.whole_calls():
            shown = (f"{seconds(n):.3f} s" for n in counts)
            table.add_row(name, *shown, *(f"{seconds(n) / first(n):.2f}x" for n in counts))
        stdout.print(table)
        table = Table("image, seconds", "here", "to experts", "paper's model", "there", "to theirs")
        for row in report.beside_the_paper():
            here = (row["side"], f"{row['seconds']:.3f}", f"{row['to_experts']:.2f}x")
            table.add_row(*here, row["model"], f"{row['paper_seconds']:.3f}", f"{row['paper_to_experts']:.2f}x")
        stdout.print(table)
        for limits in report.limits:
            rates = f"{limits.flops / 1e9:,.1f} GFLOP/s and {limits.bytes_per_second / 1e9:,.1f} GB/s"
            table = Table(f"{limits.source}: {rates}", *(f"{n} image{'s' * (n > 1)}" for n in counts), "bound by")
            for side, shares in report.of_limits(limits).items():
                bound = report.work[side][counts[0]].bound(limits)
                table.add_row(side, *(f"{shares[n]:.0%} of the limit" for n in counts), bound)
            stdout.print(table)
        for side, parameters in report.active.items():
            stdout.print(f"a step of {side} reads {parameters / 1e6:.0f} million parameters of the flow model")
        for note in report.notes:
            stdout.print(f"note: {note}")

    publisher.publish({"provider": provider, "precision": precision} | report_as_dict(report), show)
