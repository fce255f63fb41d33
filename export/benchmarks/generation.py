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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import onnx
import torch
import typer
from diffusers import AutoencoderDC
from rich.table import Table

from export.benchmarks.generation_report import IMAGE_TOKENS, GenerationReport, plot_generation, report_as_dict
from export.benchmarks.limits import PREFIX_TOKENS, ROWS_PER_IMAGE, active_parameters, step_flops
from export.benchmarks.random_models import (
    export_random_decoder,
    export_random_expert,
    export_random_language_model,
)
from export.benchmarks.report import Against, AsJson, ProviderName, Publisher, app
from export.benchmarks.timing import take_turns
from export.commands import staged
from export.integer_products import weight_bits
from export.quantization import rewrite_engine
from latte.checkpoint import load_config, resolve_checkpoint
from latte.config import LatteFlowConfig, one_group
from latte.model import FlowTransformer
from latte.paper import PAPER, vae_config_of
from runtime.backends import Backend, DeviceTensor, Session, open_backend
from runtime.console import stdout
from runtime.language import LanguageModel
from runtime.machine import products_saturate
from runtime.manifest import EngineEntry, TensorSpec, file_entry

IMAGE_VOCABULARY = 16_384
"""Of the autoregressive twin's image tokens, as in Janus."""
IMAGES = (1, 2, 8)
Size = Literal["shapes", "paper"]
GEMM_SHAPES = ((128, 1536, 1536), (128, 1536, 8960), (128, 8960, 1536), (512, 1536, 8960))
"""(rows, inner, columns) of the products tried for the machine's peak."""


def measure_generation(
    size: str,
    config: LatteFlowConfig,
    vae_config: Mapping[str, Any],
    provider: str,
    rounds: int,
    images: tuple[int, ...],
    compile_reference: bool,
    on_stage: Callable[[str], None],
) -> GenerationReport:
    """Measures all sides; experts and dense twin are in memory together, the other models one at a time.

    Args:
        config: sizes of the flow layers; the VLM's layers have the same.
        vae_config: the config of the `AutoencoderDC`.
        rounds: number of rounds of each measurement; the median counts.
    """
    experts, layers = config.layers_per_group, config.num_hidden_layers
    report = GenerationReport(
        size,
        step_flops=step_flops(config, experts),
        groups=config.schedule.num_groups,
        active={
            "experts": active_parameters(config, experts),
            "dense twin": active_parameters(config, layers),
        },
    )
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
                runs = {name: _step(session, config, ROWS_PER_IMAGE * count) for name, session in sides.items()}
                report.add_steps(count, take_turns(runs, rounds))
                runs = {name: _step(session, config, count) for name, session in sides.items() if session is not dense}
                for name, times in take_turns(runs, rounds).items():
                    report.one_row.setdefault(name, {})[count] = times
        on_stage("decoder: export and time")
        _time_decoder(report, Path(folder) / "decoder", provider, config, vae_config, rounds, images)
        on_stage("PyTorch: time")
        _time_reference(report, config, rounds, compile_reference, images)
        on_stage("autoregressive twin: export")
        _time_language_model(report, Path(folder) / "language", provider, config, rounds, images, on_stage)
    report.notes.append(
        f"one expert group was timed and stands for all {config.schedule.num_groups}, which have the same graph; "
        f"image tokens were timed at {', '.join(map(str, next(iter(report.token.values()))))} tokens before them"
    )
    return report


def gemm_peak(provider: str, folder: Path, rounds: int) -> float:
    """Measures the best rate of ONNX Runtime's own matrix product on this machine, in FLOP/s."""
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
    """Yields the experts with every product in INT8, or None on other providers than the CPU."""
    if provider != "cpu":
        yield None
        return
    bits = weight_bits(products_saturate())
    quantized = rewrite_engine(folder / "experts", entry, folder / "int8", bits=bits)
    with open_backend(provider).load(folder / "int8", quantized) as session:
        yield session


def _time_decoder(
    report: GenerationReport,
    folder: Path,
    provider: str,
    config: LatteFlowConfig,
    vae_config: Mapping[str, Any],
    rounds: int,
    images: tuple[int, ...],
) -> None:
    rng = np.random.default_rng(0)
    with open_backend(provider).load(folder, export_random_decoder(folder, config, vae_config)) as session:
        for count in images:
            latents = rng.standard_normal((count, config.latent_channels, *config.latent_size), np.float32)
            feed = {"latents": latents}
            report.decoder[count] = take_turns({"decoder": _decoding(session, feed)}, rounds)["decoder"]


def _decoding(session: Session, feed: dict[str, np.ndarray]) -> Callable[[int], object]:
    return lambda _: session.run(feed)["image"].numpy()


def _step(session: Session, config: LatteFlowConfig, rows: int) -> Callable[[int], object]:
    feed = _flow_inputs(config, session.entry.input("prefix_kv").shape[0], rows)
    return lambda _: session.run(feed)["velocity"].numpy()


def _flow_inputs(config: LatteFlowConfig, layers: int | str, rows: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
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
            inputs = _flow_inputs(config, config.layers_per_group, ROWS_PER_IMAGE * count)
            tensors = [torch.from_numpy(inputs[name]) for name in ("latents", "timestep", "prefix_kv", "prefix_mask")]
            runs = {name: _reference_step(side, tensors) for name, side in sides.items()}
            report.add_steps(count, take_turns(runs, max(1, rounds // 2)))


def _reference_step(side: Any, tensors: list[torch.Tensor]) -> Callable[[int], object]:
    return lambda _: side(*tensors, 0)


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
    backend = open_backend(provider)
    with backend.load(folder, entry) as session:
        language = LanguageModel({"vlm": session})
        on_stage("autoregressive twin: time")
        rng = np.random.default_rng(0)
        for count in images:
            rows = count * ROWS_PER_IMAGE
            ids = rng.integers(1, IMAGE_VOCABULARY, (rows, PREFIX_TOKENS))
            # Only prompts: the unconditional prefix is encoded once for all calls.
            report.prefix[count] = take_turns({"prefix": _encoding(language, ids[:count])}, rounds)["prefix"]
            places = (0, max(IMAGE_TOKENS) - 1)
            # The past is random: computing that many tokens would take longer than everything that is timed.
            pasts = {place: _random_past(backend, config, rows, PREFIX_TOKENS + place, rng) for place in places}
            report.token[count] = {
                place: take_turns({"token": _writing(language, ids[:, :1], past)}, rounds)["token"]
                for place, past in pasts.items()
            }


def _random_past(
    backend: Backend, config: LatteFlowConfig, rows: int, tokens: int, rng: np.random.Generator
) -> tuple[DeviceTensor, ...]:
    kv = (config.layers_per_group, 2, rows, config.num_key_value_heads, tokens, config.head_dim)
    return tuple(backend.upload(rng.standard_normal(kv, np.float32)) for _ in range(config.schedule.num_groups))


def _encoding(language: LanguageModel, ids: np.ndarray) -> Callable[[int], object]:
    def encode(_: int) -> None:
        language.forward(ids, np.ones(ids.shape, bool))

    return encode


def _writing(language: LanguageModel, ids: np.ndarray, past: tuple[DeviceTensor, ...]) -> Callable[[int], object]:
    rows, total = len(ids), past[0].shape[4] + 1
    mask, positions = np.ones((rows, total), bool), np.full((3, rows, 1), total - 1, np.int64)
    return lambda _: language.forward(ids, mask, positions, past=past).logits.numpy()


def load_vae_config(checkpoint: str) -> Mapping[str, Any]:
    """Returns the config of a checkpoint's `AutoencoderDC`."""
    return dict(AutoencoderDC.load_config(resolve_checkpoint(checkpoint) / "vae"))


@app.command(no_args_is_help=False)
def generation(
    size: Annotated[Size, typer.Option(help="Size of the models; their weights are random.")] = "shapes",
    provider: ProviderName = "cpu",
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
      latte-flow bench generation --json > old.json; latte-flow bench generation --compare old.json
    """
    publisher = Publisher(as_json, against)
    config = PAPER if size == "paper" else load_config(resolve_checkpoint("shapes"))
    vae_config = vae_config_of(PAPER.latent_channels) if size == "paper" else load_vae_config("shapes")
    counts = tuple(images or IMAGES)
    with staged() as on_stage:
        report = measure_generation(size, config, vae_config, provider, rounds, counts, compiled, on_stage)
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
        stdout.print(
            f"an expert step of one image runs at {report.rate / 1e9:.1f} GFLOP/s, {report.efficiency:.0%} of the "
            f"{report.gemm_peak / 1e9:.1f} that ONNX Runtime's matrix product reaches here"
        )
        for side, parameters in report.active.items():
            stdout.print(f"a step of {side} reads {parameters / 1e6:.0f} million parameters of the flow model")
        for note in report.notes:
            stdout.print(f"note: {note}")

    publisher.publish({"provider": provider} | report_as_dict(report), show)
