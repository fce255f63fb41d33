"""A first day on a GPU: parity, speed and memory of the reference in PyTorch, then ONNX Runtime on CUDA, in one JSON.

    python3 -m export.benchmarks.gpu_day --out gpu-day.json
    python3 -m export.benchmarks.gpu_day --device cpu --size tiny      what the tests run

It is for machines without a network and without a virtual environment. It needs PyTorch, NumPy, transformers and
pydantic; what else is missing leaves out the sections that need it, and the JSON says so. Packages in
`build/gpu-packages`, where `make gpu-packages` puts them, are used where the machine has none. Each section runs in a
process of its own, so one that fails, crashes or takes too long costs none of the others. The JSON is written after
each section.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

BROUGHT = Path(__file__).parents[2] / "build" / "gpu-packages"
"""Packages that came with the checkout; the machine's own come first."""
sys.path.append(str(BROUGHT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

from export.benchmarks.limits import (  # noqa: E402
    PREFIX_TOKENS,
    Limits,
    Work,
    limits_of,
    step_work,
    token_work,
)
from export.benchmarks.timing import take_turns  # noqa: E402
from export.benchmarks.torch_twins import (  # noqa: E402
    GuidedStep,
    Run,
    flow_inputs,
    measured_limits,
    modes_of,
    peak_memory,
    prepared,
    prompt_inputs,
    random_flow,
    random_token_twin,
    stopwatch_of,
)
from export.parity import TOLERANCES, relative_error  # noqa: E402
from latte.config import LatteFlowConfig, one_group  # noqa: E402
from latte.model import FlowTransformer  # noqa: E402
from latte.paper import COUNTERPARTS, DECODER_CHANNELS, PAPER, PUBLISHED, vae_config_of  # noqa: E402
from latte.precision import TORCH_DTYPES, cast_parameters  # noqa: E402
from runtime.files import write_text  # noqa: E402
from runtime.flow_time import ExpertSchedule  # noqa: E402
from runtime.machine import cpu_name, find_gpu  # noqa: E402

TINY = LatteFlowConfig(
    schedule=ExpertSchedule.uniform(2),
    num_hidden_layers=4,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    mrope_section=(2, 1, 1),
    latent_channels=4,
    latent_size=(4, 4),
    vae_scale_factor=4,
    latents_mean=(0.0,) * 4,
    latents_std=(1.0,) * 4,
)
PRECISIONS = ("bf16", "fp16")
IMAGE_VOCABULARY = {"paper": 16_384, "tiny": 64}
"""Of the autoregressive twin's image tokens, as in Janus."""
IMAGE_TOKENS = {"paper": 576, "tiny": 4}
STEPS = 40
PACKAGES = ("torch", "numpy", "pydantic", "transformers", "diffusers", "onnx", "onnxscript", "onnxruntime", "triton")
Report = Callable[[Any], None]
"""Takes what a section has measured so far; the last counts."""


@dataclass(frozen=True)
class Settings:
    """How everything is measured."""

    device: str
    size: str
    rounds: int
    images: tuple[int, ...]
    compile: bool

    @property
    def config(self) -> LatteFlowConfig:
        """Sizes of the flow layers."""
        return PAPER if self.size == "paper" else TINY


class LeftOutError(Exception):
    """A section cannot run here, for a reason that is no mistake."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the sections in turn; returns 1 if one failed."""
    parser = argparse.ArgumentParser(prog="gpu_day", description="Measures everything on this machine's GPU.")
    parser.add_argument("--out", type=Path, default=Path("gpu-day.json"), help="Where to write the JSON.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("paper", "tiny"), default="paper", help="Of the models of random weights.")
    parser.add_argument("--rounds", type=int, default=20, help="Of each measurement; the median counts.")
    parser.add_argument("--images", type=int, nargs="+", default=[1, 2, 8], help="Images in a call.")
    parser.add_argument("--no-compile", action="store_true", help="Leave torch.compile out.")
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="Run only sections that begin so.")
    parser.add_argument("--timeout", type=float, default=300.0, help="Of a section, in seconds.")
    given = parser.parse_args(arguments)
    settings = Settings(given.device, given.size, given.rounds, tuple(given.images), not given.no_compile)
    report: dict[str, Any] = {"machine": _machine(), "settings": asdict(settings), "published": _published()}
    report |= {"sections": {}, "finished": False}
    for name, section in _sections(settings):
        if given.only and not name.startswith(tuple(given.only)):
            continue
        print(f"{name} …", end=" ", file=sys.stderr, flush=True)
        report["sections"][name] = entry = _run(section, settings, given.timeout)
        print(entry["state"], entry.get("reason", ""), file=sys.stderr, flush=True)
        _write(given.out, report)
    report["finished"] = True
    _write(given.out, report)
    return int(any(entry["state"] == "failed" for entry in report["sections"].values()))


def _write(path: Path, report: dict[str, Any]) -> None:
    write_text(path, json.dumps(report, indent=1) + "\n")


def _machine() -> dict[str, Any]:
    gpu = find_gpu()
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "missing"
    return {
        "gpu": None if gpu is None else asdict(gpu),
        "processor": cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "packages": versions,
    }


def _published() -> dict[str, Any]:
    rows = {name: row._asdict() | {"counterpart": COUNTERPARTS.get(name)} for name, row in PUBLISHED.items()}
    return {"source": "arXiv 2506.06952, ImageNet 256x256, on a GPU that is not named", "models": rows}


# ---- sections ----------------------------------------------------------------------------------------


def _sections(settings: Settings) -> Iterator[tuple[str, Callable[[Settings, Report], None]]]:
    yield "limits", limits
    yield "parity", parity
    yield "images", images
    for precision in PRECISIONS:
        yield f"twins, {precision}", _twins(precision, compiled=False)
    for precision in PRECISIONS if settings.compile else ():
        yield f"compiled twins, {precision}", _twins(precision, compiled=True)
    for precision in PRECISIONS if settings.device == "cuda" else ("fp16",):
        yield f"ONNX Runtime, {precision}", _onnxruntime(precision)


def limits(settings: Settings, report: Report) -> None:
    """Measures the device's best rates, and looks up its data sheet."""
    gpu = find_gpu()
    found: dict[str, list[dict[str, Any]]] = {}
    for precision in TOLERANCES if settings.device == "cuda" else ("fp32",):
        if precision in ("int8", "fp8"):
            continue
        known = [measured_limits(precision, settings.device), limits_of(gpu.name if gpu else "", precision)]
        found[precision] = [asdict(each) for each in known if each is not None]
        report(found)


def parity(settings: Settings, report: Report) -> None:
    """Compares the guided step of every expert group, and of all groups in turn, with fp32 on the CPU."""
    rows = []
    groups = settings.config.schedule.num_groups
    flow = random_flow(settings.config, "fp32", "cpu")
    exact = _steps(flow, "fp32", "cpu")
    for precision in ("fp32", "fp16", "bf16"):
        narrow = cast_parameters(copy.deepcopy(flow).to(settings.device), TORCH_DTYPES[precision])
        for index, (value, expected) in enumerate(zip(_steps(narrow, precision, settings.device), exact, strict=True)):
            what = f"step of group {index}" if index < groups else "steps of all groups"
            limit = TOLERANCES[precision].engine if index < groups else TOLERANCES[precision].trajectory
            error = relative_error(value, expected)
            row = {"precision": precision, "what": what, "error": error, "tolerance": limit}
            rows.append(row | {"passed": error <= limit})
        report(rows)
    if not all(row["passed"] for row in rows):
        raise ArithmeticError("a relative error is beyond its tolerance")


def _steps(flow: FlowTransformer, precision: str, device: str) -> list[np.ndarray]:
    """Returns how the latents change by a step of each group from the same noise, then by the steps in turn."""
    schedule = flow.config.schedule
    noise, timestep, kv, mask = flow_inputs(flow.config, 1, precision, device)
    changes, x = [], noise
    for group in range(schedule.num_groups):
        at = timestep.new_full(timestep.shape, sum(schedule.interval(group)) / 2)
        step = GuidedStep(flow, group)
        changes.append(step(noise, at, kv, mask) - noise)
        x = step(x, at, kv, mask)
    return [change.cpu().numpy() for change in (*changes, x - noise)]


def images(settings: Settings, report: Report) -> None:
    """Draws with the shipped checkpoint on the device and on the CPU, from the same noise."""
    from export.parity import psnr_db
    from latte.checkpoint import load_checkpoint

    prompts = ["a small red circle", "a large blue star above a green square"]
    drawn = {}
    for device in dict.fromkeys(("cpu", settings.device)):
        model = load_checkpoint("shapes").to(device)
        drawn[device] = model.generate(prompts, num_inference_steps=8, seed=0)
    psnr = psnr_db(drawn[settings.device], drawn["cpu"])
    limit = TOLERANCES["fp32"].image_psnr_db
    report({"what": "images of shapes in fp32", "psnr_db": psnr, "tolerance": limit})
    if psnr is None or psnr < limit:
        raise ArithmeticError("the images differ")


def _twins(precision: str, *, compiled: bool) -> Callable[[Settings, Report], None]:
    def section(settings: Settings, report: Report) -> None:
        result: dict[str, Any] = {"step": [], "calls": []}
        known = measured_limits(precision, settings.device)
        # Compilation takes a minute for each shape.
        for count in settings.images[:1] if compiled else settings.images:
            for side in ("experts", "dense twin", "autoregressive twin"):
                for mode in modes_of(settings.device, compiled):
                    result["step"].append(_measured(settings, precision, side, mode, count, known))
                    result["calls"] = _calls(settings, result["step"])
                    report(result)

    return section


def _measured(settings: Settings, precision: str, side: str, mode: Any, count: int, known: Limits) -> dict[str, Any]:
    """Measures one side in one mode: the seconds of a step or a token, on the device, and its memory."""
    row: dict[str, Any] = {"side": side, "mode": mode, "images": count}
    peak_memory(settings.device)  # forgets what was in use before
    try:
        modules, inputs, work, prefix = _side(settings, precision, side, count)
        run = prepared(modules, inputs, mode)
        (turns,) = take_turns(
            {side: lambda _: run()}, settings.rounds, stopwatch=stopwatch_of(settings.device)
        ).values()
        seconds = [total / len(modules) for total in turns.seconds]
        row |= {"seconds": statistics.median(seconds), "fastest_seconds": min(seconds)}
        row |= {"memory_bytes": peak_memory(settings.device), "work": asdict(work)}
        row |= {"limit_seconds": work.seconds(known), "bound": work.bound(known)}
        row["of_limit"] = work.seconds(known) / row["seconds"]
        if prefix is not None:
            row["prefix_seconds"] = statistics.median(_seconds(prepared(*prefix, mode), settings))
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"[:2000]
    finally:
        torch._dynamo.reset()
        if settings.device == "cuda":
            torch.cuda.empty_cache()
    return row


def _seconds(run: Run, settings: Settings) -> list[float]:
    """Returns the times of a run in each round, on the device."""
    turns = take_turns({"": lambda _: run()}, settings.rounds, stopwatch=stopwatch_of(settings.device))
    return turns[""].seconds


Runnable = tuple[list[nn.Module], list[tuple[torch.Tensor, ...]]]


def _side(
    settings: Settings, precision: str, side: str, count: int
) -> tuple[list[nn.Module], list[tuple[torch.Tensor, ...]], Work, Runnable | None]:
    """Returns what a side runs, the least work of one run, and the same layers over a prompt if it has them."""
    config, device = settings.config, settings.device
    if side == "autoregressive twin":
        vocabulary, tokens = IMAGE_VOCABULARY[settings.size], IMAGE_TOKENS[settings.size]
        twin = random_token_twin(config, vocabulary, precision, device)
        prompt, places, kv = prompt_inputs(twin, count, PREFIX_TOKENS + tokens)
        last = places.new_full((1,), PREFIX_TOKENS + tokens - 1)
        # Attention is over the whole capacity in each token, and weights are nearly all that is read.
        work = token_work(config, vocabulary, PREFIX_TOKENS + tokens - 1, count, precision)
        return [twin], [(prompt[:, :1], last, kv)], work, ([twin], [(prompt, places, kv)])
    layers = config.layers_per_group if side == "experts" else config.num_hidden_layers
    flow_config = config if side == "experts" else one_group(config, layers)
    flow = random_flow(flow_config, precision, device)
    modules: list[nn.Module] = [GuidedStep(flow, group) for group in range(flow_config.schedule.num_groups)]
    inputs = [flow_inputs(flow_config, count, precision, device)] * len(modules)
    return modules, inputs, step_work(config, layers, count, precision), None


def _calls(settings: Settings, steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the seconds of an image in calls of the paper's length, without the decoder, and the paper's own."""
    found = {(row["side"], row["mode"], row["images"]): row for row in steps if "seconds" in row}
    models = {side: name for name, side in COUNTERPARTS.items()}
    calls = []
    for (side, mode, count), row in found.items():
        prefix = found.get(("autoregressive twin", mode, count), {}).get("prefix_seconds")
        experts = found.get(("experts", mode, count))
        if prefix is None or experts is None:
            continue
        runs = IMAGE_TOKENS[settings.size] if side == "autoregressive twin" else STEPS
        seconds = prefix + runs * row["seconds"]
        paper, base = PUBLISHED[models[side]], PUBLISHED[models["experts"]]
        calls.append(
            {
                "side": side,
                "mode": mode,
                "images": count,
                "runs": runs,
                "seconds_per_image": seconds / count,
                "to_experts": seconds / (prefix + STEPS * experts["seconds"]),
                "paper_seconds_per_image": paper.seconds,
                "paper_to_experts": paper.seconds / base.seconds,
            }
        )
    return calls


def _onnxruntime(precision: Any) -> Callable[[Settings, Report], None]:
    def section(settings: Settings, report: Report) -> None:
        import onnxruntime as ort

        if settings.device == "cuda" and "CUDAExecutionProvider" not in ort.get_available_providers():
            raise LeftOutError("this ONNX Runtime has no CUDA")
        from export.benchmarks.generation import GenerationSettings, measure_generation
        from export.benchmarks.generation_report import report_as_dict

        channels = DECODER_CHANNELS if settings.size == "paper" else (32, 32, 32)
        vae = vae_config_of(settings.config.latent_channels, channels)
        rounds, images = settings.rounds, settings.images
        how = GenerationSettings(settings.size, settings.device, precision, rounds, images)
        report(report_as_dict(measure_generation(how, settings.config, vae, lambda stage: None)))

    return section


# ---- processes ---------------------------------------------------------------------------------------


def _run(section: Callable[[Settings, Report], None], settings: Settings, timeout: float) -> dict[str, Any]:
    """Runs a section in a process of its own; returns its state, its seconds, and what it measured."""
    context = multiprocessing.get_context("fork")  # everything is imported; CUDA is first used in the child
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(section, settings, sender))
    started = time.monotonic()
    process.start()
    sender.close()
    entry: dict[str, Any] = {"state": "failed", "reason": f"took longer than {timeout:g} s"}
    result = None
    try:
        while receiver.poll(max(0.0, started + timeout - time.monotonic())):
            kind, value = receiver.recv()
            if kind == "result":
                result = value
                continue
            entry = {"state": kind} | value
            break
    except EOFError:
        process.join()
        entry["reason"] = f"its process ended with {process.exitcode}"
    if process.is_alive() and entry["state"] == "failed":
        process.kill()
    process.join()
    return entry | {"seconds": round(time.monotonic() - started, 1), "result": result}


def _child(section: Callable[[Settings, Report], None], settings: Settings, sender: Connection) -> None:
    results: list[Any] = []

    def report(value: Any) -> None:
        results[:] = [value]
        sender.send(("result", value))

    try:
        if settings.device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("PyTorch finds no GPU here")
        torch.set_float32_matmul_precision("highest")  # no TF32
        torch.backends.cudnn.allow_tf32 = False
        with torch.no_grad():
            section(settings, report)
        if errors := _errors(results):
            sender.send(("failed", {"reason": f"{len(errors)} measurements failed, first: {errors[0]}"}))
        else:
            sender.send(("ok", {}))
    except LeftOutError as error:
        sender.send(("left out", {"reason": str(error)}))
    except ImportError as error:
        sender.send(("left out", {"reason": f"a package is missing: {error}"}))
    except Exception as error:
        trace = traceback.format_exc().splitlines()[-12:]
        sender.send(("failed", {"reason": f"{type(error).__name__}: {error}"[:500], "trace": trace}))


def _errors(results: list[Any]) -> list[str]:
    """Returns the errors of single measurements, which did not end their section."""
    return [
        row["error"]
        for result in results
        if isinstance(result, dict)
        for row in result.get("step", ())
        if "error" in row
    ]


if __name__ == "__main__":
    sys.exit(main())
