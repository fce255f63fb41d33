"""`latte-flow doctor`: what this machine has, what is wrong with it, and which engines of a bundle can run here.

It needs nothing but the base package: it reports whatever is missing.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from runtime.errors import InputError, LatteFlowError, one_line
from runtime.files import make_writable_folder
from runtime.machine import Gpu, find_gpu, graph_cache, products_saturate
from runtime.manifest import EngineEntry, PlanProvider, load_manifest
from runtime.plans import OLDEST_WITH_FLOAT8, TENSORRT, usable_plan

State = Literal["ok", "missing", "problem"]
NEEDED_FREE_BYTES = 10e9
"""Disk space for an export and its plans at the paper's size."""
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
"""The first driver for each major version of CUDA: it runs all minor versions, without what is new in later ones."""
CUDA_OF_EXTRAS = 13
"""The major version of CUDA for which the GPU extras install their packages."""
OLDEST_WITH_BF16 = 80
"""The first GPU architecture that computes in bf16, as in "sm_80"."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    what: str
    state: State
    found: str
    fix: str = ""


def examine(bundle: Path | None = None) -> list[Finding]:
    """Reports everything that matters for running engines.

    Args:
        bundle: also check the engines of this bundle.
    """
    gpu = find_gpu()
    findings = [_python(), _memory(), _disk(bundle or Path.cwd()), _graph_cache(), _driver(gpu), *_cuda(gpu)]
    findings += [_tensorrt(provider, gpu) for provider in TENSORRT]
    findings += [*_onnxruntime(gpu), _triton()]
    if bundle is not None:
        findings += _bundle(bundle, gpu)
    return findings


def _python() -> Finding:
    return Finding("Python", "ok", f"{platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores")


def _memory() -> Finding:
    try:
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return Finding("memory", "missing", "unknown")
    return Finding("memory", "ok", f"{pages * size / 1e9:.0f} GB")


def _disk(where: Path) -> Finding:
    folder = next(path for path in (where.absolute(), *where.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if free < NEEDED_FREE_BYTES:
        return Finding(
            "disk", "problem", f"{free / 1e9:.1f} GB free", "free some space, or put bundles on another disk"
        )
    return Finding("disk", "ok", f"{free / 1e9:.0f} GB free")


def _graph_cache() -> Finding:
    fix = "exports trace every graph anew; set LATTE_FLOW_CACHE to a folder that can be written"
    folder = graph_cache()
    if folder is None:
        return Finding("graph cache", "missing", "this user has no home folder", fix)
    try:
        make_writable_folder(folder)
        sizes = [file.stat().st_size for file in folder.glob("*/*.onnx")]
    except (InputError, OSError) as error:
        return Finding("graph cache", "missing", f"{folder} cannot be written: {one_line(error)}", fix)
    return Finding("graph cache", "ok", f"{folder}: {len(sizes)} graphs, {sum(sizes) / 1e6:.1f} MB")


def _driver(gpu: Gpu | None) -> Finding:
    if gpu is None:
        return Finding("NVIDIA driver", "missing", "none", "to run on a GPU, install NVIDIA's driver")
    found, needed = f"{gpu.driver}: {gpu.name}, {gpu.architecture}, {gpu.memory}", OLDEST_DRIVER[CUDA_OF_EXTRAS]
    if _major(gpu.driver) < needed:
        fix = f"the packages of the GPU extras are for CUDA {CUDA_OF_EXTRAS}, which needs driver {needed} or later"
        return Finding("NVIDIA driver", "problem", found, fix)
    return Finding("NVIDIA driver", "ok", found)


def _cuda(gpu: Gpu | None) -> Iterator[Finding]:
    runtime = _imported("cuda.bindings.runtime")
    if isinstance(runtime, str):
        state: State = "missing" if runtime == "not installed" else "problem"
        yield Finding(
            "CUDA (cuda-python)", state, runtime, 'native TensorRT needs it: pip install "latte-flow[tensorrt]"'
        )
        return
    error, number = runtime.cudaRuntimeGetVersion()
    _, supported = runtime.cudaDriverGetVersion()
    shown = f"runtime {_dotted(number)}"
    needed = OLDEST_DRIVER.get(number // 1000)
    if gpu is None or (not int(error) and supported >= number):
        yield Finding("CUDA (cuda-python)", "ok", shown)
    elif not int(error) and needed is not None and _major(gpu.driver) >= needed:
        found = f"{shown} on a driver for {_dotted(supported)}, by minor-version compatibility"
        yield Finding("CUDA (cuda-python)", "ok", found, "if a feature is missing, update the driver")
    else:
        oldest = "" if needed is None else f" to {needed} or later"
        fix = f"update the driver{oldest}: it supports CUDA {_dotted(supported)}"
        yield Finding("CUDA (cuda-python)", "problem", shown, fix)


def _tensorrt(provider: PlanProvider, gpu: Gpu | None) -> Finding:
    library = TENSORRT[provider]
    trt = _imported(library.module)
    if isinstance(trt, str):
        return Finding(provider, "missing" if trt == "not installed" else "problem", trt, library.install)
    if gpu is None:
        builds = "builds" if provider == "tensorrt-rtx" else "neither builds nor runs"
        return Finding(provider, "ok", f"{trt.__version__}; without a GPU it {builds}")
    if provider == "tensorrt-rtx" and gpu.architecture == "sm_90":
        return Finding(provider, "ok", f"{trt.__version__}; does not run on {gpu.architecture}: use tensorrt")
    return Finding(provider, "ok", str(trt.__version__))


def _onnxruntime(gpu: Gpu | None) -> Iterator[Finding]:
    ort = _imported("onnxruntime")
    if isinstance(ort, str):
        yield Finding("ONNX Runtime", "missing", ort, 'pip install "latte-flow[cpu]", or [gpu] on a machine with one')
        return
    providers = [name.removesuffix("ExecutionProvider") for name in ort.get_available_providers()]
    both = all(_installed(name) for name in ("onnxruntime", "onnxruntime-gpu"))
    if both:
        fix = "they overwrite each other: pip uninstall onnxruntime onnxruntime-gpu, then install one extra"
        yield Finding("ONNX Runtime", "problem", "onnxruntime and onnxruntime-gpu are both installed", fix)
    elif gpu is not None and "CUDA" not in providers:
        fix = 'for the GPU: pip uninstall onnxruntime && pip install "latte-flow[gpu]"'
        yield Finding("ONNX Runtime", "problem", f"{ort.__version__}: {', '.join(providers)}", fix)
    else:
        yield Finding("ONNX Runtime", "ok", f"{ort.__version__}: {', '.join(providers)}")


def _triton() -> Finding:
    if not _installed("nvidia-pytriton"):
        return Finding("Triton", "missing", "no bundled server", 'to serve here: pip install "latte-flow[triton]"')
    found = f"server of nvidia-pytriton {version('nvidia-pytriton')}"
    numpy_version = version("numpy")
    if int(numpy_version.partition(".")[0]) >= 2:
        fix = 'the bundled server returns wrong values with it: pip install "numpy<2"'
        return Finding("Triton", "problem", f"{found}, numpy {numpy_version}", fix)
    return Finding("Triton", "ok", found)


def _bundle(bundle: Path, gpu: Gpu | None) -> Iterator[Finding]:
    try:
        manifest = load_manifest(bundle)
    except LatteFlowError as error:
        yield Finding("bundle", "problem", str(error))
        return
    yield Finding("bundle", "ok", f"{manifest.precision}, {len(manifest.engines)} engines, {manifest.bundle_hash()}")
    for provider, check in _checks(bundle, gpu).items():
        fits = {engine.name: check(engine) for engine in manifest.engines}
        runnable = [name for name, reason in fits.items() if not reason]
        reasons = sorted({reason for reason in fits.values() if reason})
        shown = f"{len(runnable)} of {len(fits)} engines run here"
        yield Finding(f"  on {provider}", "ok" if not reasons else "missing", shown, "; ".join(reasons[:2]))


def _checks(bundle: Path, gpu: Gpu | None) -> dict[str, Callable[[EngineEntry], str]]:
    """Returns, for each provider, a function that says why an engine cannot run on it here, or ""."""
    ort = _imported("onnxruntime")
    providers = [] if isinstance(ort, str) else ort.get_available_providers()

    def on_cpu(engine: EngineEntry) -> str:
        if not providers:
            return "ONNX Runtime is not installed"
        if engine.precision == "bf16":
            return "ONNX Runtime's CPU does not run bf16"
        full_range = engine.quantization is not None and not engine.quantization.reduced_range
        if full_range and products_saturate():
            return "this CPU has no VNNI, so 8-bit products overflow: export with --precision int8 --reduce-range"
        return ""

    def on_cuda(engine: EngineEntry) -> str:
        if "CUDAExecutionProvider" not in providers:
            return "this ONNX Runtime has no CUDA"
        if gpu is None:
            return "there is no GPU here"
        if engine.precision == "bf16" and int(gpu.architecture.removeprefix("sm_")) < OLDEST_WITH_BF16:
            return f"{gpu.architecture} has no bf16: export in fp16"
        if engine.precision == "fp8" and int(gpu.architecture.removeprefix("sm_")) < OLDEST_WITH_FLOAT8:
            return f"{gpu.architecture} has no fp8: export in fp16"
        return ""

    def with_plan(provider: PlanProvider) -> Callable[[EngineEntry], str]:
        def check(engine: EngineEntry) -> str:
            trt = _imported(TENSORRT[provider].module)
            if isinstance(trt, str):
                return f"{provider} is {trt}"
            try:
                usable_plan(bundle, engine, provider, trt.__version__, gpu.architecture if gpu else None)
            except LatteFlowError as error:
                return str(error).replace(f" of {engine.name}", "")
            return ""

        return check

    return {"cpu": on_cpu, "cuda": on_cuda} | {provider: with_plan(provider) for provider in TENSORRT}


def _imported(module: str) -> Any | str:
    """Imports a module; returns it, or why that is not possible."""
    try:
        return import_module(module)
    except ModuleNotFoundError:
        return "not installed"
    except Exception as error:
        return f"cannot be imported ({type(error).__name__}: {one_line(error)[:80]})"


def _installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _major(driver: str) -> int:
    """Returns a driver's major version, by which it is compatible: "580.82.07" as 580."""
    return int(driver.partition(".")[0])


def _dotted(number: int) -> str:
    """Returns CUDA's version 13040 as "13.4"."""
    return f"{number // 1000}.{number % 1000 // 10}"
