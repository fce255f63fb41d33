"""`latte-flow build`: TensorRT plans of a bundle's engines, rebuilt only when something that they depend on changed.

The manifest records everything that a plan depends on. A build compares that with the current values, so a plan is
never kept just because a file exists, and never rebuilt just because it is old.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from export.plans.profiles import AxisChoices, profiles_of
from export.plans.worker import BuildJob
from runtime.errors import BundleError, EngineError, InputError, MissingExtraError
from runtime.files import link_or_copy, sha256_of
from runtime.manifest import (
    EngineEntry,
    FileEntry,
    Manifest,
    PlanEntry,
    PlanProfile,
    PlanProvider,
    check_file,
    load_manifest,
    save_manifest,
)
from runtime.plans import OLDEST_WITH_FLOAT8, TENSORRT

RTX_ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_120", "sm_121")
"""GPUs that run a plan of TensorRT for RTX, unless it was built for others."""
RTX_WITH_FLOAT8 = ("8.9", "12.0")
"""Compute capabilities for which it builds plans in FP8, unless others are named."""
WEIGHT_TYPES = ("FLOAT", "FLOAT16", "BFLOAT16", "FLOAT8E4M3FN")
"""Types of values that may differ between engines of which one is refitted from the other."""
HardwareCompatibility = Literal["none", "ampere-plus", "same-compute-capability"]


class BuildOptions(BaseModel):
    """The options of a build."""

    model_config = ConfigDict(frozen=True)

    provider: PlanProvider
    optimization_level: int | None = Field(default=None, ge=0, le=5)
    workspace_mib: int = Field(default=4096, ge=1)
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatibility: HardwareCompatibility = "none"
    compute_capabilities: tuple[str, ...] = ()
    refit: bool = False
    """Whether the weights of plans can be replaced. Of engines with equal graphs one is built, and refitted."""

    def check(self) -> None:
        """Raises `InputError` for options that the provider does not have."""
        if self.provider == "tensorrt" and self.compute_capabilities:
            raise InputError(
                "TensorRT builds for the GPU that it runs on; use --hardware-compatibility ampere-plus, or "
                "--provider tensorrt-rtx for --compute-capability"
            )
        if self.provider == "tensorrt-rtx" and (self.version_compatible or self.hardware_compatibility != "none"):
            raise InputError(
                "TensorRT for RTX has neither --version-compatible nor --hardware-compatibility; use "
                "--compute-capability instead"
            )
        for name in self.compute_capabilities:
            major, _, minor = name.partition(".")
            if name != "current" and not (major.isdigit() and minor.isdigit()):
                raise InputError(f'expected --compute-capability like 8.9, or "current", got {name!r}')


@dataclass(frozen=True)
class Decision:
    """Whether one engine's plan is built, and why."""

    engine: str
    build: bool
    reason: str


@dataclass(frozen=True)
class BuildReport:
    """What a build did, and the manifest after it."""

    decisions: tuple[Decision, ...]
    manifest: Manifest


OnProgress = Callable[[str, str, int, int], None]
"""Called with the engine, the phase, the steps done and the number of steps."""


def build_plans(
    bundle: Path,
    options: BuildOptions,
    engines: Sequence[str] = (),
    choices: Mapping[str, AxisChoices] | None = None,
    *,
    dry_run: bool = False,
    on_progress: OnProgress = lambda *_: None,
) -> BuildReport:
    """Builds the plans that are missing or stale, and adds each to the manifest as soon as it is built.

    Args:
        engines: names of the engines; all by default.
        choices: ranges of named axes, by axis.
        dry_run: decide what to build, and build nothing.

    Raises:
        InputError: an engine or an option cannot be used.
        MissingExtraError: TensorRT is not installed.
        EngineError: a graph cannot be built, or does not have the precision that the manifest says.
    """
    options.check()
    manifest = load_manifest(bundle)
    chosen = [manifest.engine(name) for name in engines] if engines else list(manifest.engines)
    fused = [engine.name for engine in chosen if engine.fused]
    if fused:
        raise InputError(
            f"{', '.join(fused)}: graphs with ONNX Runtime's own operators cannot be built; export without --fuse"
        )
    quantized = [engine.name for engine in chosen if engine.precision == "int8"]
    if quantized:
        raise InputError(
            f"{', '.join(quantized)}: int8 is for ONNX Runtime on the CPU; export in fp16 or bf16 for TensorRT"
        )
    machine = _describe(options.provider)
    if any(engine.precision == "fp8" for engine in chosen) and options.provider == "tensorrt-rtx":
        options = options.model_copy(update={"compute_capabilities": options.compute_capabilities or RTX_WITH_FLOAT8})
    architectures = _architectures(options, machine["architecture"])
    if any(engine.precision == "fp8" for engine in chosen):
        _check_float8(architectures)
    if options.refit and machine["architecture"] is None:
        raise InputError("plans whose weights can be replaced are built on a machine with a GPU; leave out --refit")
    decisions = []
    like: dict[str, Path] = {}
    """Plans of this build, by what engines that can be refitted from them have in common."""
    with TemporaryDirectory(prefix="latte-flow-timing-") as folder:
        # Experts have equal graphs: what TensorRT measures for the first one serves the others.
        cache = options.timing_cache or Path(folder) / "timing.cache"
        for engine in chosen:
            profiles = profiles_of(manifest, engine, choices or {})
            ingredients = _ingredients(engine, options, profiles, machine["version"], architectures)
            decision = _decide(bundle, engine, options.provider, ingredients)
            decisions.append(decision)
            if decision.build and not dry_run:
                job = _job(bundle, engine, options, cache, profiles)
                if options.refit:
                    form = graph_form(job.graph) + job.model_dump_json(include={"precision", "profiles"})
                    job.refit_from = like.get(form)
                plan = _build(bundle, engine, job, profiles, ingredients, architectures, on_progress)
                if options.refit:
                    like.setdefault(form, (bundle / plan.file.path).absolute())
                manifest = _with_plan(manifest, engine.name, plan)
                save_manifest(manifest, bundle)
    return BuildReport(tuple(decisions), manifest)


def with_plan(
    bundle: Path, engine: EngineEntry, options: BuildOptions, profiles: tuple[PlanProfile, ...]
) -> EngineEntry:
    """Builds the plan of an engine that no manifest names; returns its entry with the plan.

    Raises:
        see `build_plans`.
    """
    options.check()
    machine = _describe(options.provider)
    architectures = _architectures(options, machine["architecture"])
    ingredients = _ingredients(engine, options, profiles, machine["version"], architectures)
    with TemporaryDirectory(prefix="latte-flow-timing-") as folder:
        cache = options.timing_cache or Path(folder) / "timing.cache"
        job = _job(bundle, engine, options, cache, profiles)
        plan = _build(bundle, engine, job, profiles, ingredients, architectures, lambda *_: None)
    return engine.model_copy(update={"plans": (plan,)})


def _check_float8(architectures: Sequence[str]) -> None:
    """Raises `InputError` for GPUs that have no products in FP8."""
    old = [name for name in architectures if int(name.removeprefix("sm_").rstrip("+")) < OLDEST_WITH_FLOAT8]
    if old:
        raise InputError(
            f"{', '.join(old)} has no FP8, which needs compute capability 8.9 or later; export in fp16, or leave out "
            "--compute-capability and --hardware-compatibility for those"
        )


def carry_plans(old: Path, new: Path, manifest: Manifest) -> Manifest:
    """Keeps the plans of a bundle that is being replaced, for engines that did not change."""
    try:
        before = {engine.name: engine for engine in load_manifest(old).engines}
    except BundleError:
        return manifest
    engines = []
    for engine in manifest.engines:
        same = before.get(engine.name)
        plans = same.plans if same is not None and same.files == engine.files else ()
        kept = tuple(plan for plan in plans if _is_whole(old, plan.file))
        for plan in kept:
            link_or_copy(old / plan.file.path, new / plan.file.path)
        engines.append(engine.model_copy(update={"plans": kept}))
    return manifest.model_copy(update={"engines": tuple(engines)})


def _ingredients(
    engine: EngineEntry,
    options: BuildOptions,
    profiles: tuple[PlanProfile, ...],
    version: str,
    architectures: tuple[str, ...],
) -> dict[str, str]:
    """Returns everything that a plan depends on. A timing cache only changes how long a build takes."""
    graph, *weights = engine.files
    chosen = options.model_dump(mode="json", exclude={"timing_cache", "provider", "compute_capabilities"})
    shapes = json.dumps([profile.model_dump() for profile in profiles], sort_keys=True)
    return {
        "graph": graph.sha256,
        "weights": hashlib.sha256("".join(file.sha256 for file in weights).encode()).hexdigest(),
        "shapes": shapes,
        "precision": engine.precision,
        "options": json.dumps(chosen, sort_keys=True),
        "TensorRT": version,
        "GPU architecture": ", ".join(architectures),
    }


def _decide(bundle: Path, engine: EngineEntry, provider: PlanProvider, ingredients: dict[str, str]) -> Decision:
    plan = engine.plan(provider)
    if plan is None:
        return Decision(engine.name, True, "there is no plan yet")
    changed = [name for name, value in ingredients.items() if plan.ingredients.get(name) != value]
    if changed:
        return Decision(engine.name, True, f"changed: {', '.join(changed)}")
    if not _is_whole(bundle, plan.file):
        return Decision(engine.name, True, f"{plan.file.path} is missing or was altered")
    return Decision(engine.name, False, "it is up to date")


def _is_whole(bundle: Path, entry: FileEntry) -> bool:
    path = bundle / entry.path
    return path.is_file() and path.stat().st_size == entry.size and sha256_of(path) == entry.sha256


def graph_form(graph: Path) -> str:
    """Returns a hash of a graph without the values of its weights: engines with the same one are refitted."""
    import onnx  # only refits need it, and machines that build may lack it

    model = onnx.load(graph, load_external_data=False)
    for tensor in model.graph.initializer:
        if onnx.TensorProto.DataType.Name(tensor.data_type) in WEIGHT_TYPES:
            for field in ("external_data", "raw_data", "float_data", "int32_data"):
                tensor.ClearField(field)
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


def _job(
    bundle: Path, engine: EngineEntry, options: BuildOptions, timing_cache: Path, profiles: tuple[PlanProfile, ...]
) -> BuildJob:
    target = bundle / engine.name / TENSORRT[options.provider].plan_file
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    return BuildJob(
        provider=options.provider,
        graph=(bundle / engine.files[0].path).absolute(),
        plan=temporary.absolute(),
        precision=engine.precision,
        float8_products=len(engine.quantization.quantized) if engine.quantization is not None else 0,
        profiles=[_shapes(engine, profile) for profile in profiles],
        optimization_level=options.optimization_level,
        workspace_bytes=options.workspace_mib << 20,
        timing_cache=timing_cache.absolute(),
        version_compatible=options.version_compatible,
        hardware_compatibility=options.hardware_compatibility,
        compute_capabilities=list(options.compute_capabilities),
        refit=options.refit,
    )


def _build(
    bundle: Path,
    engine: EngineEntry,
    job: BuildJob,
    profiles: tuple[PlanProfile, ...],
    ingredients: dict[str, str],
    architectures: tuple[str, ...],
    on_progress: OnProgress,
) -> PlanEntry:
    for file in engine.files:
        check_file(bundle, file)
    target = bundle / engine.name / TENSORRT[job.provider].plan_file
    started = time.monotonic()
    try:
        built = _run(engine.name, job, on_progress)
        os.replace(job.plan, target)
    finally:
        job.plan.unlink(missing_ok=True)
    path = target.relative_to(bundle).as_posix()
    return PlanEntry(
        provider=job.provider,
        file=FileEntry(path=path, sha256=sha256_of(target), size=target.stat().st_size),
        version=ingredients["TensorRT"],
        version_compatible=job.version_compatible,
        architectures=architectures,
        profiles=profiles,
        ingredients=ingredients,
        inspected=built["inspected"],
        build_seconds=time.monotonic() - started,
        build_peak_bytes=built["peak_bytes"],
    )


def _run(name: str, job: BuildJob, on_progress: OnProgress) -> dict[str, Any]:
    """Runs a worker and passes its progress on; returns its last message."""
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        file.write(job.model_dump_json())
        file.flush()
        last: dict[str, Any] = {}
        output: list[str] = []
        for line in _worker(file.name):
            if not line.startswith('{"event"'):
                output.append(line.strip())
                continue
            message = json.loads(line)
            if message["event"] == "progress":
                on_progress(name, message["phase"], message["done"], message["total"])
            else:
                last = message
    if last.get("event") == "wrong":
        layers = last["layers"]
        raise EngineError(
            f"engine {name} is not in {job.precision} in {len(layers)} layers, first {layers[0]}; export it again"
        )
    if last.get("event") != "built":
        reason = next((line for line in reversed(output) if "rror" in line), output[-1] if output else "no output")
        raise EngineError(f"engine {name} cannot be built by {job.provider}: {' '.join(reason.split())[:300]}")
    return last


def _describe(provider: PlanProvider) -> dict[str, Any]:
    """Asks a worker for the version of TensorRT and the architecture of the GPU."""
    for line in _worker("--describe", provider):
        if line.startswith('{"event"'):
            described: dict[str, Any] = json.loads(line)
            if described["version"] is None:
                raise MissingExtraError(f"{provider} is not installed; install it with: {TENSORRT[provider].install}")
            return described
    raise EngineError(f"{provider} is installed but does not start; run: latte-flow doctor")


def _worker(*arguments: str) -> Iterator[str]:
    """Runs a worker; yields the lines of its stdout and stderr."""
    command = [sys.executable, "-m", "export.plans.worker", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        try:
            yield from process.stdout
        finally:
            process.kill()


def _architectures(options: BuildOptions, current: str | None) -> tuple[str, ...]:
    """Returns the GPUs that a plan will run on, in the form of `PlanEntry.architectures`."""
    if options.provider == "tensorrt":
        if current is None:
            raise InputError(
                "TensorRT builds for the GPU that it runs on, and there is none here; build on the target machine, or "
                "use --provider tensorrt-rtx, which needs no GPU"
            )
        return ("sm_80+",) if options.hardware_compatibility == "ampere-plus" else (current,)
    names = [name for name in options.compute_capabilities if name != "current"]
    if "current" in options.compute_capabilities:
        if current is None:
            raise InputError("--compute-capability current: there is no GPU here; name one, like 8.9")
        names.append(current.removeprefix("sm_"))
    return tuple(f"sm_{name.replace('.', '')}" for name in names) or RTX_ARCHITECTURES


def _shapes(engine: EngineEntry, profile: PlanProfile) -> dict[str, tuple[list[int], list[int], list[int]]]:
    """Returns the smallest, best and largest shape of every input."""
    return {
        spec.name: (
            [axis if isinstance(axis, int) else profile.axes[axis].min for axis in spec.shape],
            [axis if isinstance(axis, int) else profile.axes[axis].opt for axis in spec.shape],
            [axis if isinstance(axis, int) else profile.axes[axis].max for axis in spec.shape],
        )
        for spec in engine.inputs
    }


def _with_plan(manifest: Manifest, name: str, plan: PlanEntry) -> Manifest:
    engines = []
    for engine in manifest.engines:
        if engine.name == name:
            others = tuple(other for other in engine.plans if other.provider != plan.provider)
            engine = engine.model_copy(update={"plans": (*others, plan)})
        engines.append(engine)
    return manifest.model_copy(update={"engines": tuple(engines)})
