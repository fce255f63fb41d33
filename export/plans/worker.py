"""Builds one plan, in a process of its own: what TensorRT takes and does ends with it.

    python -m export.plans.worker JOB.json      the job as `Job` describes it
    python -m export.plans.worker --describe tensorrt-rtx

Every line on stdout that is a JSON object with "event" is for the parent; the rest is TensorRT's chat.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from export.plans.precision import wrong_built_layers, wrong_layers
from runtime.manifest import PlanBackend, Precision

MODULES: dict[PlanBackend, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


class Job(BaseModel):
    """What to build."""

    backend: PlanBackend
    graph: Path
    plan: Path
    """Written to; the parent renames it."""
    precision: Precision
    profiles: list[dict[str, tuple[list[int], list[int], list[int]]]]
    """Smallest, best and largest shape of every input, for each profile."""
    optimization_level: int | None
    workspace_bytes: int
    timing_cache: Path | None
    version_compatible: bool
    hardware_compatibility: str
    compute_capabilities: list[str]
    """For TensorRT for RTX: "8.9", or "current"."""


def tell(event: str, **content: Any) -> None:
    """A line for the parent."""
    print(json.dumps({"event": event} | content), flush=True)


def describe(backend: PlanBackend) -> None:
    """Tells the version of TensorRT, None if it is not installed, and the GPU's architecture, None if there is none."""
    try:
        version = _module(backend).__version__
    except ImportError:
        version = None
    tell("described", version=version, architecture=_architecture())


def build(job: Job) -> None:
    """Parses, proves the precision, builds, and inspects where it can."""
    trt = _module(job.backend)
    from polygraphy.backend.trt import engine_bytes_from_network, network_from_onnx_path

    started = time.monotonic()
    builder, network, parser = network_from_onnx_path(str(job.graph))
    _fix_static_shapes(network, job.profiles)
    wrong = wrong_layers(network, trt, job.precision)
    if wrong:
        tell("wrong", layers=wrong)
        return
    config = _config(trt, job, _progress_monitor(trt))
    cache = str(job.timing_cache) if job.timing_cache else None
    plan = engine_bytes_from_network((builder, network, parser), config=config, save_timing_cache=cache)
    job.plan.write_bytes(memoryview(plan))
    inspected = _inspect(trt, job.plan)
    if inspected is not None and (wrong := wrong_built_layers(inspected, job.precision)):
        tell("wrong", layers=wrong)
        return
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    tell("built", seconds=time.monotonic() - started, peak_bytes=peak, inspected=inspected is not None)


def _module(backend: PlanBackend) -> Any:
    # Polygraphy asks this once, when it is imported, which is why it is never imported above.
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1" if backend == "tensorrt-rtx" else "0"
    module = __import__(MODULES[backend])
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.ERROR
    return module


def _architecture() -> str | None:
    """ "sm_89", or None where there is no GPU."""
    try:
        from cuda.bindings import runtime as cudart
    except ImportError:
        return None
    error, properties = cudart.cudaGetDeviceProperties(0)
    return None if int(error) else f"sm_{properties.major}{properties.minor}"


def _fix_static_shapes(network: Any, profiles: list[dict[str, tuple[list[int], list[int], list[int]]]]) -> None:
    """Gives axes that are the same in all profiles their number in the network, so TensorRT need not ask."""
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        sizes = [list(axis) for axis in zip(*(shape for p in profiles for shape in p[tensor.name]), strict=True)]
        tensor.shape = tuple(axis[0] if len(set(axis)) == 1 else -1 for axis in sizes)


def _config(trt: Any, job: Job, monitor: Any) -> Any:
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
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,
    }
    if job.timing_cache is not None and job.timing_cache.is_file():
        options["load_timing_cache"] = str(job.timing_cache)
    if job.hardware_compatibility != "none":
        level = job.hardware_compatibility.replace("-", "_").upper()
        options["hardware_compatibility_level"] = getattr(trt.HardwareCompatibilityLevel, level)
    if job.backend == "tensorrt":
        return CreateConfig(**options)
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

    current = "current" in job.compute_capabilities
    numbers = [tuple(map(int, name.split("."))) for name in job.compute_capabilities if name != "current"]
    config = CreateConfigRTX(**options, use_gpu=current, compute_capabilities=numbers or None)

    def without_tf32(_: Any, __: Any, config: Any) -> None:
        config.clear_flag(trt.BuilderFlag.TF32)

    return PostprocessConfig(config, without_tf32)


def _progress_monitor(trt: Any) -> Any:
    """Tells the parent of the outermost phase's steps."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps
            tell("progress", phase=phase_name, done=0, total=num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            tell("progress", phase=phase_name, done=step + 1, total=self._steps.get(phase_name, 0))
            return True

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

    return Monitor()


def _inspect(trt: Any, plan: Path) -> str | None:
    """The engine's layers as JSON; None where it cannot be deserialised, as without a driver."""
    if _architecture() is None:
        return None
    engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        return None
    inspector = engine.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


if __name__ == "__main__":
    if sys.argv[1] == "--describe":
        describe(sys.argv[2])  # type: ignore[arg-type]
    else:
        build(Job.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8")))
