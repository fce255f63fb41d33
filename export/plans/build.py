"""`latte-flow build`: TensorRT plans of a bundle's engines, rebuilt when what they depend on has changed and only then.

A plan's ingredients are recorded beside it in the manifest. Building compares them with what they would
be now, so a plan is never kept because a file of its name exists, and never rebuilt because it is old.
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
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from export.plans.profiles import AxisChoices, profiles_of
from export.plans.worker import Job
from runtime.errors import BundleError, EngineError, InputError, MissingExtraError
from runtime.files import link_or_copy
from runtime.manifest import (
    EngineEntry,
    FileEntry,
    Manifest,
    PlanBackend,
    PlanEntry,
    PlanProfile,
    check_file,
    load_manifest,
    save_manifest,
    sha256_of,
)

PLAN_FILES: dict[PlanBackend, str] = {"tensorrt": "model.plan", "tensorrt-rtx": "model.rtx.plan"}
EXTRAS: dict[PlanBackend, str] = {"tensorrt": "gpu", "tensorrt-rtx": "rtx"}
RTX_ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_120", "sm_121")
"""Where a plan of TensorRT for RTX runs that was not built for others."""
HardwareCompatibility = Literal["none", "ampere-plus", "same-compute-capability"]


class BuildOptions(BaseModel):
    """What a user may choose."""

    model_config = ConfigDict(frozen=True)

    backend: PlanBackend
    optimization_level: int | None = Field(default=None, ge=0, le=5)
    workspace_mib: int = Field(default=4096, ge=1)
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatibility: HardwareCompatibility = "none"
    compute_capabilities: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises `InputError` for options that the backend does not have."""
        if self.backend == "tensorrt" and self.compute_capabilities:
            raise InputError(
                "TensorRT builds for the GPU that it runs on; use --hardware-compatibility ampere-plus, or "
                "--backend tensorrt-rtx for --compute-capability"
            )
        if self.backend == "tensorrt-rtx" and (self.version_compatible or self.hardware_compatibility != "none"):
            raise InputError(
                "TensorRT for RTX has neither --version-compatible nor --hardware-compatibility: name "
                "--compute-capability instead"
            )
        for name in self.compute_capabilities:
            major, _, minor = name.partition(".")
            if name != "current" and not (major.isdigit() and minor.isdigit()):
                raise InputError(f'expected --compute-capability like 8.9, or "current", got {name!r}')


@dataclass(frozen=True)
class Decision:
    """What is to be done about one engine's plan, and why."""

    engine: str
    build: bool
    reason: str


@dataclass(frozen=True)
class Report:
    """What a build did."""

    decisions: tuple[Decision, ...]
    manifest: Manifest


OnProgress = Callable[[str, str, int, int], None]
"""Engine, phase, steps done, steps in all."""


def build_plans(
    bundle: Path,
    options: BuildOptions,
    engines: Sequence[str] = (),
    choices: Mapping[str, AxisChoices] | None = None,
    *,
    dry_run: bool = False,
    on_progress: OnProgress = lambda *_: None,
) -> Report:
    """Builds the plans that are missing or stale; the manifest names each as soon as it is there.

    Args:
        engines: names; all by default.
        choices: ranges of named axes, by axis.
        dry_run: only decide.

    Raises:
        InputError: engines or options that cannot be.
        MissingExtraError: TensorRT is not installed.
        EngineError: a graph could not be built, or is not in the precision that the bundle says.
    """
    options.check()
    manifest = load_manifest(bundle)
    chosen = [manifest.engine(name) for name in engines] if engines else list(manifest.engines)
    fused = [engine.name for engine in chosen if engine.fused]
    if fused:
        raise InputError(
            f"{', '.join(fused)}: graphs in ONNX Runtime's own operators cannot be built; export without --fuse"
        )
    quantized = [engine.name for engine in chosen if engine.precision == "int8"]
    if quantized:
        raise InputError(
            f"{', '.join(quantized)}: int8 is ONNX Runtime's, for the CPU; export in fp16 or bf16 for TensorRT"
        )
    machine = _describe(options.backend)
    architectures = _architectures(options, machine["architecture"])
    decisions = []
    for engine in chosen:
        profiles = profiles_of(manifest, engine, choices or {})
        ingredients = _ingredients(engine, options, profiles, machine["version"], architectures)
        decision = _decide(bundle, engine, options.backend, ingredients)
        decisions.append(decision)
        if decision.build and not dry_run:
            plan = _build(bundle, engine, options, profiles, ingredients, architectures, on_progress)
            manifest = _with_plan(manifest, engine.name, plan)
            save_manifest(manifest, bundle)
    return Report(tuple(decisions), manifest)


def carry_plans(old: Path, new: Path, manifest: Manifest) -> Manifest:
    """The plans of a bundle that is being replaced, for the engines of the new one that are the same."""
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
    """All that decides what a plan is. The timing cache decides only how long it takes."""
    graph, *weights = engine.files
    chosen = options.model_dump(mode="json", exclude={"timing_cache", "backend", "compute_capabilities"})
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


def _decide(bundle: Path, engine: EngineEntry, backend: PlanBackend, ingredients: dict[str, str]) -> Decision:
    plan = engine.plan(backend)
    if plan is None:
        return Decision(engine.name, True, "there is none yet")
    changed = [name for name, value in ingredients.items() if plan.ingredients.get(name) != value]
    if changed:
        return Decision(engine.name, True, f"changed: {', '.join(changed)}")
    if not _is_whole(bundle, plan.file):
        return Decision(engine.name, True, f"{plan.file.path} is missing or was altered")
    return Decision(engine.name, False, "nothing that it depends on has changed")


def _is_whole(bundle: Path, entry: FileEntry) -> bool:
    path = bundle / entry.path
    return path.is_file() and path.stat().st_size == entry.size and sha256_of(path) == entry.sha256


def _build(
    bundle: Path,
    engine: EngineEntry,
    options: BuildOptions,
    profiles: tuple[PlanProfile, ...],
    ingredients: dict[str, str],
    architectures: tuple[str, ...],
    on_progress: OnProgress,
) -> PlanEntry:
    for file in engine.files:
        check_file(bundle, file)
    target = bundle / engine.name / PLAN_FILES[options.backend]
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    job = Job(
        backend=options.backend,
        graph=(bundle / engine.files[0].path).absolute(),
        plan=temporary.absolute(),
        precision=engine.precision,
        profiles=[_shapes(engine, profile) for profile in profiles],
        optimization_level=options.optimization_level,
        workspace_bytes=options.workspace_mib << 20,
        timing_cache=options.timing_cache.absolute() if options.timing_cache else None,
        version_compatible=options.version_compatible,
        hardware_compatibility=options.hardware_compatibility,
        compute_capabilities=list(options.compute_capabilities),
    )
    started = time.monotonic()
    try:
        built = _run(engine.name, job, on_progress)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    path = target.relative_to(bundle).as_posix()
    return PlanEntry(
        backend=options.backend,
        file=FileEntry(path=path, sha256=sha256_of(target), size=target.stat().st_size),
        version=ingredients["TensorRT"],
        version_compatible=options.version_compatible,
        architectures=architectures,
        profiles=profiles,
        ingredients=ingredients,
        inspected=built["inspected"],
        build_seconds=time.monotonic() - started,
        build_peak_bytes=built["peak_bytes"],
    )


def _run(name: str, job: Job, on_progress: OnProgress) -> dict[str, Any]:
    """The worker's last word, its progress passed on."""
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        file.write(job.model_dump_json())
        file.flush()
        last: dict[str, Any] = {}
        chat: list[str] = []
        for line in _worker(file.name):
            if not line.startswith('{"event"'):
                chat.append(line.strip())
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
        reason = next((line for line in reversed(chat) if "rror" in line), chat[-1] if chat else "it said nothing")
        raise EngineError(f"engine {name} cannot be built by {job.backend}: {' '.join(reason.split())[:300]}")
    return last


def _describe(backend: PlanBackend) -> dict[str, Any]:
    """Version and architecture, as the worker finds them."""
    for line in _worker("--describe", backend):
        if line.startswith('{"event"'):
            described: dict[str, Any] = json.loads(line)
            if described["version"] is None:
                raise MissingExtraError(
                    f'{backend} is not installed; install it with: pip install "latte-flow[{EXTRAS[backend]}]"'
                )
            return described
    raise EngineError(f"{backend} is installed but does not start; `latte-flow doctor` says more")


def _worker(*arguments: str) -> Iterator[str]:
    """Lines of a worker's stdout and stderr."""
    command = [sys.executable, "-m", "export.plans.worker", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        try:
            yield from process.stdout
        finally:
            process.kill()


def _architectures(options: BuildOptions, current: str | None) -> tuple[str, ...]:
    """The GPUs that a plan will run on, as `PlanEntry.architectures` writes them."""
    if options.backend == "tensorrt":
        if current is None:
            raise InputError(
                "TensorRT builds for the GPU that it runs on, and there is none here; build on the target machine, or "
                "use --backend tensorrt-rtx, which needs no GPU"
            )
        return ("sm_80+",) if options.hardware_compatibility == "ampere-plus" else (current,)
    names = [name for name in options.compute_capabilities if name != "current"]
    if "current" in options.compute_capabilities:
        if current is None:
            raise InputError("--compute-capability current: there is no GPU here; name one, like 8.9")
        names.append(current.removeprefix("sm_"))
    return tuple(f"sm_{name.replace('.', '')}" for name in names) or RTX_ARCHITECTURES


def _shapes(engine: EngineEntry, profile: PlanProfile) -> dict[str, tuple[list[int], list[int], list[int]]]:
    """Smallest, best and largest shape of every input."""
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
            others = tuple(other for other in engine.plans if other.backend != plan.backend)
            engine = engine.model_copy(update={"plans": (*others, plan)})
        engines.append(engine)
    return manifest.model_copy(update={"engines": tuple(engines)})
