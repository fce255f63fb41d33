"""Builds one plan in a process of its own, so that TensorRT's memory and crashes end with it.

    python -m export.plans.worker JOB.json      a `BuildJob`
    python -m export.plans.worker --describe tensorrt-rtx

Each line on stdout that is a JSON object with "event" is for the parent process; the rest is TensorRT's own output.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from export.plans.precision import float8_products, score_layers, wrong_built_layers, wrong_layers
from runtime.manifest import PlanProvider, Precision
from runtime.plans import TENSORRT


class BuildJob(BaseModel):
    """A plan to build."""

    provider: PlanProvider
    graph: Path
    plan: Path
    """A temporary file, which the parent renames."""
    precision: Precision
    float8_products: int = 0
    """Number of products that must be of numbers in FP8."""
    profiles: list[dict[str, tuple[list[int], list[int], list[int]]]]
    """For each profile, the smallest, best and largest shape of every input."""
    optimization_level: int | None
    workspace_bytes: int
    timing_cache: Path
    """It may not exist yet; what is measured is added."""
    version_compatible: bool
    hardware_compatibility: str
    compute_capabilities: list[str]
    """For TensorRT for RTX: "8.9", or "current"."""
    refit: bool = False
    """Whether the plan's weights can be replaced."""
    refit_from: Path | None = None
    """A plan of an engine with the same graph: it gets the weights of this one, and nothing is built."""


def send(event: str, **content: Any) -> None:
    """Sends a message to the parent."""
    print(json.dumps({"event": event} | content), flush=True)


def describe(provider: PlanProvider) -> None:
    """Sends the version of TensorRT and the architecture of the GPU; None for what is missing."""
    try:
        version = _module(provider).__version__
    except ImportError:
        version = None
    send("described", version=version, architecture=_architecture())


def build(job: BuildJob) -> None:
    """Parses a graph, checks its precision, builds the plan, and inspects it if there is a GPU."""
    trt = _module(job.provider)
    from polygraphy.backend.trt import engine_bytes_from_network, network_from_onnx_path

    started = time.monotonic()
    builder, network, parser = network_from_onnx_path(str(job.graph), strongly_typed=_must_ask_for_types(trt))
    _fix_static_shapes(network, job.profiles)
    wrong = wrong_layers(network, trt, job.precision)
    if (found := float8_products(network)) != job.float8_products:
        wrong.append(f"of {job.float8_products} products in FP8, {found} are")
    if wrong:
        send("wrong", layers=wrong)
        return
    scores = score_layers(network)
    config = _config(trt, job, _progress_monitor(trt))
    parsed = (builder, network, parser)
    plan = engine_bytes_from_network(parsed, config=config, save_timing_cache=str(job.timing_cache))
    job.plan.write_bytes(memoryview(plan))
    inspected = _inspect(trt, job)
    if inspected is not None and (wrong := wrong_built_layers(inspected, job.precision, scores)):
        send("wrong", layers=wrong)
        return
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    send("built", seconds=time.monotonic() - started, peak_bytes=peak, inspected=inspected is not None)


def refit(job: BuildJob) -> None:
    """Makes a plan of another one, which has the same graph and other weights."""
    trt = _module(job.provider)
    from runtime.backends.tensorrt import refit as give_weights

    assert job.refit_from is not None
    started = time.monotonic()
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine(job.refit_from.read_bytes())
    if engine is None or not give_weights(trt, engine, job.graph):
        raise RuntimeError(f"Error: {job.refit_from.name} takes no weights of {job.graph}")
    config = engine.create_serialization_config()
    config.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
    config.set_flag(trt.SerializationFlag.INCLUDE_REFIT)
    job.plan.write_bytes(memoryview(engine.serialize_with_config(config)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    # Its layers are those of the plan that it is made of, which was inspected when it was built.
    send("built", seconds=time.monotonic() - started, peak_bytes=peak, inspected=True)


def _module(provider: PlanProvider) -> Any:
    # Polygraphy reads this when it is imported, so it is never imported at the top.
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1" if provider == "tensorrt-rtx" else "0"
    module = import_module(TENSORRT[provider].module)
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.ERROR
    return module


def _architecture() -> str | None:
    """Returns the GPU's architecture, such as "sm_89"; None without a GPU."""
    try:
        from cuda.bindings import runtime as cudart
    except ImportError:
        return None
    error, properties = cudart.cudaGetDeviceProperties(0)
    return None if int(error) else f"sm_{properties.major}{properties.minor}"


def _fix_static_shapes(network: Any, profiles: list[dict[str, tuple[list[int], list[int], list[int]]]]) -> None:
    """Fixes axes in the network that have the same size in all profiles."""
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        sizes = [list(axis) for axis in zip(*(shape for p in profiles for shape in p[tensor.name]), strict=True)]
        tensor.shape = tuple(axis[0] if len(set(axis)) == 1 else -1 for axis in sizes)


def _config(trt: Any, job: BuildJob, monitor: Any) -> Any:
    from polygraphy.backend.trt import CreateConfig, PostprocessConfig, Profile

    profiles = []
    for shapes in job.profiles:
        profile = Profile()
        for name, (smallest, best, largest) in shapes.items():
            profile.add(name, smallest, best, largest)
        profiles.append(profile)
    options: dict[str, Any] = {
        "profiles": profiles,
        "memory_pool_limits": {trt.MemoryPoolType.WORKSPACE: job.workspace_bytes},
        "builder_optimization_level": job.optimization_level,
        "version_compatible": job.version_compatible,
        "progress_monitor": monitor,
        "refittable": job.refit,
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,
    }
    if job.timing_cache.is_file():
        options["load_timing_cache"] = str(job.timing_cache)
    if job.hardware_compatibility != "none":
        level = job.hardware_compatibility.replace("-", "_").upper()
        options["hardware_compatibility_level"] = getattr(trt.HardwareCompatibilityLevel, level)
    # fp32 products of a half-precision engine are scores of attention, whose inputs are exact in TF32.
    tf32 = job.precision != "fp32"
    if job.provider == "tensorrt":
        return CreateConfig(**options, tf32=tf32)
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

    current = "current" in job.compute_capabilities
    numbers = [tuple(map(int, name.split("."))) for name in job.compute_capabilities if name != "current"]
    config = CreateConfigRTX(**options, use_gpu=current, compute_capabilities=numbers or None)

    def set_tf32(_: Any, __: Any, config: Any) -> None:
        (config.set_flag if tf32 else config.clear_flag)(trt.BuilderFlag.TF32)

    return PostprocessConfig(config, set_tf32)


def _progress_monitor(trt: Any) -> Any:
    """Returns a monitor that sends the parent the steps of each phase."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps
            send("progress", phase=phase_name, done=0, total=num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            send("progress", phase=phase_name, done=step + 1, total=self._steps.get(phase_name, 0))
            return True

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

    return Monitor()


def _must_ask_for_types(trt: Any) -> bool:
    """Returns whether a network is weakly typed unless it is asked for: of TensorRT 10, which then ignores casts."""
    return hasattr(getattr(trt, "NetworkDefinitionCreationFlag", None), "STRONGLY_TYPED")


def _inspect(trt: Any, job: BuildJob) -> str | None:
    """Returns the engine's layers as JSON; None if it cannot be deserialised, for example without a driver."""
    if _architecture() is None:
        return None
    engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(job.plan.read_bytes())
    if engine is None:
        return None
    inspector = engine.create_engine_inspector()
    # Without shapes, the types of tensors whose shapes vary are "N/A due to dynamic shapes".
    context = engine.create_execution_context()
    for name, (_, best, _) in job.profiles[0].items():
        context.set_input_shape(name, tuple(best))
    inspector.execution_context = context
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


if __name__ == "__main__":
    if sys.argv[1] == "--describe":
        describe(sys.argv[2])  # type: ignore[arg-type]
    else:
        given = BuildJob.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
        build(given) if given.refit_from is None else refit(given)
