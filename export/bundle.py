"""From a checkpoint to a bundle: make the graphs, bind the weights, write the engines, verify."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from export.components import (
    Component,
    decoder_component,
    expert_component,
    geometry_of,
    prompt_format_of,
    solver_component,
    understanding_of,
)
from export.engines import bind, write_engine
from export.float8 import quantize_to_float8
from export.graph_store import GraphStore, default_store
from export.graphs import make_graphs
from export.plans.build import carry_plans
from export.quantization import QuantizationSettings, quantize_bundle
from export.reference import Reference, checkpoint_hash
from export.verify import verify_bundle
from export.vlm_components import language_component, vision_component
from export.weight_check import UNQUANTIZED
from export.weights import ALWAYS_FP32, WeightFiles, weights_of
from latte.checkpoint import load_outline, resolve_checkpoint
from latte.model import LatteFlow
from runtime.chat import TEMPLATE_FILE, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from runtime.errors import InputError
from runtime.files import check_replaceable, replaced_directory, write_text
from runtime.image_processor import PROCESSOR_FILE, load_processor_config
from runtime.manifest import (
    FILE_NAME,
    SCHEMA_VERSION,
    EngineEntry,
    Manifest,
    ParityRow,
    Precision,
    file_entry,
    save_manifest,
)

TOKENIZER_FILES = (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, TEMPLATE_FILE, PROCESSOR_FILE)
PRODUCERS = ("latte-flow", "torch", "transformers", "diffusers", "onnx", "onnxscript", "onnxruntime")

OnStage = Callable[[str], None]


def export_bundle(
    checkpoint: str | Path,
    bundle: Path,
    *,
    precision: Precision = "fp32",
    opset: int = 18,
    fuse: bool = False,
    quantization: QuantizationSettings = QuantizationSettings(),
    verify: bool = True,
    force: bool = False,
    store: GraphStore | None = None,
    on_stage: OnStage = lambda _: None,
) -> tuple[Manifest, list[ParityRow]]:
    """Writes the bundle of a checkpoint; it appears at `bundle` complete or not at all.

    Args:
        checkpoint: a directory, or the name of a shipped checkpoint.
        precision: precision of weights and matrix products; the solver and the autoencoder stay fp32. "int8" is for
            matrix products on the CPU, "fp8" for those on NVIDIA GPUs, in engines that are fp16 otherwise.
        fuse: rewrite the graphs with ONNX Runtime's optimisers; such engines run only on ONNX Runtime.
        quantization: settings for "int8" and "fp8".
        verify: compare with PyTorch; the report becomes part of the manifest.
        force: replace an existing bundle.
        store: keeps traced graphs; by default the store in the user's cache folder.
        on_stage: called with each stage's name as it starts.

    Returns:
        the manifest, and the rows of the verification that failed.

    Raises:
        InputError: something else is at `bundle`, or the options exclude each other.
        CheckpointError: the checkpoint cannot be used.
    """
    if precision == "bf16" and fuse:
        raise InputError("ONNX Runtime's fused operators do not support bf16; leave out --fuse")
    if precision == "fp8" and fuse:
        raise InputError("fp8 is for TensorRT, which builds no graphs of --fuse; leave it out")
    if precision == "int8" and fuse:
        raise InputError("--fuse does nothing in int8, whose products ONNX Runtime fuses itself; leave it out")
    check_replaceable(bundle, FILE_NAME, "bundle", force=force)
    on_stage("load the checkpoint")
    path = resolve_checkpoint(checkpoint)
    # The export itself reads weights one at a time; only the verification needs a whole model.
    reference = Reference.from_pretrained(path) if verify else None
    model = load_outline(path)
    with replaced_directory(bundle) as folder:
        # Engines of 8 bits are made from others, whose runs show the error.
        written = UNQUANTIZED.get(precision, precision)
        store = store or default_store()
        engines = _export_engines(model, path, folder, written, opset, fuse, store, on_stage)
        _copy_tokenizer_files(model, path, folder)
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            producer={name: _version_of(name) for name in PRODUCERS},
            checkpoint_sha256=checkpoint_hash(path),
            precision=written,
            geometry=geometry_of(model.config),
            schedule=model.config.schedule,
            sampling=model.config.sampling,
            prompt=prompt_format_of(model),
            understanding=understanding_of(model),
            engines=tuple(engines),
            tokenizer_files=tuple(file_entry(folder, n) for n in TOKENIZER_FILES if (folder / n).is_file()),
        )
        save_manifest(manifest, folder)
        if precision == "int8":
            on_stage("run the fp32 engines")
            manifest = quantize_bundle(folder, quantization, lambda name: on_stage(f"quantise {name}"))
        if precision == "fp8":
            manifest = _in_float8(checkpoint, folder, quantization, store, on_stage)
        if (bundle / FILE_NAME).is_file():
            manifest = carry_plans(bundle, folder, manifest)
            save_manifest(manifest, folder)
        if reference is not None:
            on_stage("verify against PyTorch")
            manifest = manifest.model_copy(update={"parity": tuple(verify_bundle(folder, reference))})
            save_manifest(manifest, folder)
    return manifest, [row for row in manifest.parity or () if not row.passed]


def _in_float8(
    checkpoint: str | Path,
    folder: Path,
    quantization: QuantizationSettings,
    store: GraphStore,
    on_stage: Callable[[str], None],
) -> Manifest:
    """Quantises the fp16 engines of a bundle; an fp32 bundle beside it is made for that and removed."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        fp32 = Path(temporary) / "fp32"
        export_bundle(checkpoint, fp32, verify=False, store=store, on_stage=lambda stage: on_stage(f"fp32: {stage}"))
        on_stage("run the fp32 engines")
        return quantize_to_float8(folder, fp32, quantization, lambda name: on_stage(f"quantise {name}"))


def _copy_tokenizer_files(model: LatteFlow, checkpoint: Path, folder: Path) -> None:
    for name in TOKENIZER_FILES:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, folder / name)
    if not (folder / TEMPLATE_FILE).is_file():  # older tokenizers keep it in their config
        write_text(folder / TEMPLATE_FILE, model.tokenizer.chat_template)


def _export_engines(
    model: LatteFlow,
    checkpoint: Path,
    folder: Path,
    precision: Precision,
    opset: int,
    fuse: bool,
    store: GraphStore,
    on_stage: OnStage,
) -> list[EngineEntry]:
    files = WeightFiles(checkpoint)
    components = components_of(model, precision, most_patches_of(checkpoint, model))
    on_stage("make the graphs")
    graphs = make_graphs(components, opset, store)
    entries = []
    for component, graph in zip(components, graphs, strict=True):
        for group in range(model.config.schedule.num_groups) if component.role == "expert" else (None,):
            name = component.name if group is None else f"{component.name}_{group}"
            on_stage(f"write {name}")
            entry = write_engine(
                folder,
                name,
                component,
                bind(graph, weights_of(component.role, model, files, precision, group)),
                precision="fp32" if component.role in ALWAYS_FP32 else precision,
                opset=opset,
                group=group,
                fuse=fuse and component.role != "solver_step",
            )
            entries.append(entry)
    return entries


def components_of(model: LatteFlow, precision: Precision, most_patches: int) -> list[Component]:
    """Returns the components of a model, in the order of the manifest.

    Args:
        most_patches: number of patches of the largest image.
    """
    return [
        vision_component(precision, model.vlm.config.vision_config, most_patches),
        language_component(model.config, precision, model.vlm.config),
        expert_component(model.config, precision),
        solver_component(model.config),
        decoder_component(model.config, dict(model.vae.config)),
    ]


def most_patches_of(checkpoint: Path, model: LatteFlow) -> int:
    """Returns the number of patches of the largest image that the processor makes and the context can hold."""
    config = model.vlm.config
    most = config.text_config.max_position_embeddings * config.vision_config.spatial_merge_size**2
    if not (checkpoint / PROCESSOR_FILE).is_file():
        return most
    return min(most, load_processor_config(checkpoint / PROCESSOR_FILE).most_patches)


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
