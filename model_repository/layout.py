"""From a bundle to a Triton model repository: configurations through protobuf, the models' sources, and the bundle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from model_repository.schema import ENGINE_FILE, INPUTS, MODEL, OUTPUTS, Field, Layout, Platform, engine_model
from runtime.errors import InputError
from runtime.files import check_replaceable, link_or_copy, replaced_directory, write_text
from runtime.manifest import FILE_NAME, EngineEntry, FileEntry, Manifest, check_file, load_manifest
from runtime.serving.requests import Limits

LogFormat = Literal["text", "json"]
CONFIG_FILE = "config.pbtxt"
VERSION = "1"
TRITON_TYPES = {
    "float32": model_config_pb2.TYPE_FP32,
    "float16": model_config_pb2.TYPE_FP16,
    "bfloat16": model_config_pb2.TYPE_BF16,
    "int64": model_config_pb2.TYPE_INT64,
    "bool": model_config_pb2.TYPE_BOOL,
    "uint8": model_config_pb2.TYPE_UINT8,
}
SOURCES = Path(__file__).parent


def write_repository(
    bundle: Path,
    out: Path,
    *,
    layout: Layout = "in-process",
    platform: Platform = "python",
    provider: str = "cpu",
    provider_options: Mapping[str, str] | None = None,
    limits: Limits | None = None,
    log_format: LogFormat = "text",
    placement: Mapping[str, int] | None = None,
    execution_environment: Path | None = None,
    force: bool = False,
) -> None:
    """Writes the repository of a bundle; it appears at `out` complete or not at all.

    An existing repository keeps its folder, so that a server that has it mounted sees the new models. Each of them
    appears complete or not at all, the model `latte_flow` last.

    Args:
        layout: "in-process" for all engines in the process of the model `latte_flow`, "per-engine" for a model each.
        platform: runs the engines in the layout per-engine.
        provider: runs the engines in a Python process.
        provider_options: of that provider, by the names in its own documentation.
        limits: what the service accepts.
        log_format: of the service's lines in the server's log.
        placement: GPU numbers by engine name, in the layout per-engine. Of the other engines, those in Python run where
            the provider's options say, and those of another platform on the CPU.
        execution_environment: virtual environment of the Python models, if it is not the server's own.
        force: replace an existing repository.

    Raises:
        BundleError: the bundle cannot be used.
        InputError: something else is at `out`, or the options exclude each other.
    """
    manifest = load_manifest(bundle)
    if layout == "in-process" and (platform != "python" or placement):
        raise InputError("the layout in-process runs its engines in Python; choose a platform and GPUs with per-engine")
    if placement and platform == "python" and provider == "cpu":
        raise InputError("the provider cpu runs no engine on a GPU; choose another one, or a platform, for --gpu")
    if unknown := sorted(set(placement or {}) - {engine.name for engine in manifest.engines}):
        raise InputError(f"the bundle has no engine {unknown[0]!r} to place on a GPU")
    check_replaceable(out, f"{MODEL}/{CONFIG_FILE}", "model repository", force=force)
    shared = {} if execution_environment is None else {"EXECUTION_ENV_PATH": str(execution_environment.absolute())}
    if provider_options:
        shared["provider_options"] = json.dumps(dict(provider_options))
    own = {} if log_format == "text" else {"log_format": log_format}
    old_models = {path.parent.name for path in out.glob(f"*/{CONFIG_FILE}")}
    new_models = {MODEL}
    with ExitStack() as stack:
        folder = None if old_models else stack.enter_context(replaced_directory(out))

        def folder_of(model: str) -> Path:
            new_models.add(model)
            return folder / model if folder else stack.enter_context(replaced_directory(out / model))

        service = service_config(provider, layout, limits or Limits(), shared | own)
        version = _write_model(folder_of(MODEL), service, MODEL)
        copy_bundle(bundle, manifest, version / "bundle")
        for engine in manifest.engines if layout == "per-engine" else ():
            parameters = {"provider": provider} | shared if platform == "python" else {}
            config = engine_config(engine, platform, (placement or {}).get(engine.name), parameters)
            version = _write_model(folder_of(config.name), config, "engine" if platform == "python" else None)
            _write_engine(bundle, engine, version, platform, provider)
    for model in old_models - new_models:
        shutil.rmtree(out / model)


def settings_of(repository: Path) -> dict[str, str]:
    """Returns the settings of a repository's service by name; none if there is no repository that can be read."""
    try:
        text = (repository / MODEL / CONFIG_FILE).read_text(encoding="utf-8")
        parameters = text_format.Parse(text, model_config_pb2.ModelConfig()).parameters
    except (OSError, ValueError, text_format.ParseError):
        return {}
    return {name: parameters[name].string_value for name in sorted(parameters)}


def _write_model(folder: Path, config: Any, source: str | None) -> Path:
    """Writes a model's configuration and, if it is in Python, its source; returns the folder of its version."""
    version = folder / VERSION
    version.mkdir(parents=True)
    write_text(folder / CONFIG_FILE, text_format.MessageToString(config))
    if source is not None:
        shutil.copyfile(SOURCES / source / VERSION / "model.py", version / "model.py")
    return version


def _write_engine(bundle: Path, engine: EngineEntry, version: Path, platform: Platform, provider: str) -> None:
    """Writes an engine's files into the folder of its version. A provider that runs plans needs the plan too."""
    if platform == "tensorrt":
        plan = engine.plan("tensorrt")
        if plan is None:
            raise InputError(
                f"{bundle} has no TensorRT plan of {engine.name}; run `latte-flow build`, or choose "
                "--platform onnxruntime"
            )
        link_or_copy(check_file(bundle, plan.file), version / "model.plan")
        return
    for file in engine.files:
        link_or_copy(bundle / file.path, version / Path(file.path).name)
    if platform == "python":
        plans = tuple(plan for plan in engine.plans if plan.provider == provider)
        for plan in plans:
            link_or_copy(check_file(bundle, plan.file), version / Path(plan.file.path).name)
        files = tuple(_beside(file) for file in engine.files)
        plans = tuple(plan.model_copy(update={"file": _beside(plan.file)}) for plan in plans)
        entry = engine.model_copy(update={"files": files, "plans": plans})
        write_text(version / ENGINE_FILE, entry.model_dump_json(indent=2) + "\n")


def _beside(file: FileEntry) -> FileEntry:
    """Returns a file's entry as it is in the folder of its engine."""
    return file.model_copy(update={"path": Path(file.path).name})


def engine_config(engine: EngineEntry, platform: Platform, gpu: int | None, parameters: Mapping[str, str]) -> Any:
    """Returns the configuration of an engine's own model. The scheduler makes the batches; Triton's batcher is off."""
    config = model_config_pb2.ModelConfig(name=engine_model(engine.name), max_batch_size=0)
    if platform == "python":
        config.backend = "python"
    else:
        config.platform = {"onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan"}[platform]
    for specs, tensors, kind in (
        (engine.inputs, config.input, model_config_pb2.ModelInput),
        (engine.outputs, config.output, model_config_pb2.ModelOutput),
    ):
        for spec in specs:
            dims = [-1 if isinstance(axis, str) else axis for axis in spec.shape]
            tensors.append(kind(name=spec.name, data_type=TRITON_TYPES[spec.dtype], dims=dims))
    _place(config, gpu)
    _set_parameters(config, parameters)
    return config


def service_config(
    provider: str = "cpu", layout: Layout = "in-process", limits: Limits = Limits(), further: Mapping[str, str] = {}
) -> Any:
    """Returns the configuration of the model `latte_flow`; the default is in `latte_flow/config.pbtxt`."""
    config = model_config_pb2.ModelConfig(name=MODEL, backend="python", max_batch_size=0)
    config.model_transaction_policy.decoupled = True
    _place(config, None)
    for field in INPUTS:
        config.input.append(
            model_config_pb2.ModelInput(name=field.name, data_type=_type(field), dims=field.dims, optional=True)
        )
    for field in OUTPUTS:
        config.output.append(model_config_pb2.ModelOutput(name=field.name, data_type=_type(field), dims=field.dims))
    parameters = {name: str(value) for name, value in asdict(limits).items()}
    _set_parameters(config, {"provider": provider, "layout": layout} | parameters | dict(further))
    return config


def _place(config: Any, gpu: int | None) -> None:
    group = config.instance_group.add(count=1)
    if gpu is None:
        group.kind = model_config_pb2.ModelInstanceGroup.KIND_CPU
    else:
        group.kind = model_config_pb2.ModelInstanceGroup.KIND_GPU
        group.gpus.append(gpu)


def _set_parameters(config: Any, parameters: Mapping[str, str]) -> None:
    for name, value in parameters.items():
        config.parameters[name].string_value = value


def _type(field: Field) -> Any:
    name = "STRING" if field.dtype == "BYTES" else field.dtype
    return model_config_pb2.DataType.Value(f"TYPE_{name}")


def copy_bundle(bundle: Path, manifest: Manifest, target: Path) -> None:
    """Copies a bundle's files, as hard links where the file system allows."""
    plans = [plan.file for engine in manifest.engines for plan in engine.plans]
    for entry in (*manifest.files(), *plans):
        link_or_copy(bundle / entry.path, target / entry.path)
    link_or_copy(bundle / FILE_NAME, target / FILE_NAME)
