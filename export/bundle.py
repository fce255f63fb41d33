"""From a checkpoint to a bundle: trace, bind, fuse, save, verify, and the manifest last."""

from __future__ import annotations

import copy
import hashlib
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import onnx_ir as ir
import torch
from diffusers import AutoencoderDC
from torch import Tensor, nn
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel, Qwen2VLTextModel

from export.components import (
    TORCH_DTYPES,
    WIDE_SOFTMAX,
    Component,
    decoder_component,
    expert_component,
    expert_weight_source,
    geometry_of,
    language_component,
    solver_component,
    vision_component,
)
from export.dc_ae import use_linear_attention
from export.graphs import bind, quiet_exporter, trace, write_engine
from export.plans.build import carry_plans
from export.quantization import QuantizationSettings, quantize_bundle
from export.verify import verify_bundle
from export.weights import WeightFiles
from latte.checkpoint import load_checkpoint, load_outline, resolve_checkpoint
from latte.model import LatteFlow
from runtime.errors import InputError
from runtime.files import check_replaceable, replaced_directory
from runtime.manifest import (
    FILE_NAME,
    SCHEMA_VERSION,
    EngineEntry,
    Manifest,
    ParityRow,
    Precision,
    PromptFormat,
    Understanding,
    file_entry,
    save_manifest,
    sha256_of,
)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json")
PRODUCERS = ("latte-flow", "torch", "transformers", "diffusers", "onnx", "onnxscript", "onnxruntime")
_PLACEHOLDER = "<PROMPT>"

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
    on_stage: OnStage = lambda _: None,
) -> tuple[Manifest, list[ParityRow]]:
    """Writes the bundle of a checkpoint; it appears at `bundle` whole or not at all.

    Args:
        checkpoint: a directory, or the name of a shipped checkpoint.
        precision: of weights and arithmetic; the solver and the autoencoder stay fp32. "int8" is of matrix products,
            for the CPU.
        fuse: rewrite the graphs with ONNX Runtime's optimisers; such engines run on ONNX Runtime only.
        quantization: how far INT8 goes, at that precision.
        verify: compare with PyTorch; the report goes into the manifest.
        force: replace an existing bundle.
        on_stage: is told what begins.

    Returns:
        the manifest, and the rows of the verification that failed.

    Raises:
        InputError: something is in the way at `bundle`.
        CheckpointError: the checkpoint cannot be used.
    """
    if precision == "bf16" and verify:
        raise InputError(
            "ONNX Runtime's CPU does not run bf16, so a bf16 bundle cannot be verified here; pass --no-verify"
        )
    if precision == "bf16" and fuse:
        raise InputError("ONNX Runtime's fused operators do not know bf16; leave out --fuse")
    if precision == "int8" and fuse:
        raise InputError("--fuse has no part in int8, whose products ONNX Runtime fuses itself; leave it out")
    check_replaceable(bundle, FILE_NAME, "bundle", force=force)
    on_stage("load the checkpoint")
    path = resolve_checkpoint(checkpoint)
    # The export itself reads weights one at a time; a whole model is needed only to verify against.
    reference = load_checkpoint(path) if verify else None
    model = load_outline(path)
    with replaced_directory(bundle) as folder:
        # INT8 is made of fp32 engines, whose runs show what it costs.
        written: Precision = "fp32" if precision == "int8" else precision
        engines = _export_engines(model, WeightFiles(path), folder, written, opset, fuse, on_stage)
        for name in TOKENIZER_FILES:
            if (path / name).is_file():
                shutil.copyfile(path / name, folder / name)
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            producer={name: _version_of(name) for name in PRODUCERS},
            checkpoint_sha256=checkpoint_hash(path),
            precision=written,
            geometry=geometry_of(model.config),
            schedule=model.config.schedule,
            prompt=prompt_format(model),
            understanding=understanding_of(model),
            engines=tuple(engines),
            tokenizer_files=tuple(file_entry(folder, n) for n in TOKENIZER_FILES if (folder / n).is_file()),
        )
        save_manifest(manifest, folder)
        if precision == "int8":
            on_stage("draw, to see what the engines compute")
            manifest = quantize_bundle(folder, quantization, lambda name: on_stage(f"quantise {name}"))
        if (bundle / FILE_NAME).is_file():
            manifest = carry_plans(bundle, folder, manifest)
            save_manifest(manifest, folder)
        if reference is not None:
            on_stage("verify against PyTorch")
            manifest = manifest.model_copy(update={"parity": tuple(verify_bundle(folder, reference))})
            save_manifest(manifest, folder)
    return manifest, [row for row in manifest.parity or () if not row.passed]


def _export_engines(
    model: LatteFlow,
    files: WeightFiles,
    folder: Path,
    precision: Precision,
    opset: int,
    fuse: bool,
    on_stage: OnStage,
) -> list[EngineEntry]:
    config = model.config
    language_model = model.vlm.model.language_model
    dtype = TORCH_DTYPES[precision]
    entries = []

    def save(name: str, component: Component, graph: ir.Model, precision: Precision, group: int | None = None) -> None:
        fused = fuse and name != "solver_step"
        entries.append(
            write_engine(folder, name, component, graph, precision=precision, opset=opset, group=group, fuse=fused)
        )

    def value(part: str, name: str, module: nn.Module, dtype: torch.dtype = dtype) -> Tensor:
        """A parameter from its file, or what the module computes: rotary frequencies, in full precision."""
        owner, _, attribute = name.rpartition(".")
        computed = module.get_submodule(owner)._buffers.get(attribute)
        return files.read(part, name, dtype) if computed is None else computed

    on_stage("trace vision_encoder")
    component = vision_component_of(model, precision)
    graph = trace(component, opset)
    on_stage("bind vision_encoder")
    tower = model.vlm.model.visual
    save(
        "vision_encoder", component, bind(graph, lambda n: value("vision", n.removeprefix("tower."), tower)), precision
    )

    on_stage("trace vlm")
    component = language_component_of(model, precision)
    graph = trace(component, opset)
    on_stage("bind vlm")

    def text_weight(name: str) -> Tensor:
        if name == "lm_head.weight":
            return files.read("head", name, dtype)
        return value("text", name.removeprefix("language_model."), language_model)

    save("vlm", component, bind(graph, text_weight), precision)

    on_stage("trace expert")
    component = expert_component(config, precision)
    graph = trace(component, opset)
    sources: dict[str, tuple[str, nn.Module]] = {
        "flow": ("flow", model.flow),
        "language_model": ("text", language_model),
    }
    for group in range(config.schedule.num_groups):
        on_stage(f"bind expert_{group}")

        def weight(name: str, group: int = group) -> Tensor:
            source, source_name = expert_weight_source(config, group, name)
            part, module = sources[source]
            return value(part, source_name, module)

        save(f"expert_{group}", component, bind(graph, weight), precision, group)

    on_stage("trace solver_step")
    component = solver_component(config)
    save("solver_step", component, trace(component, opset), "fp32")

    on_stage("trace vae_decoder")

    def build_decoder() -> nn.Module:
        with quiet_exporter():
            return use_linear_attention(AutoencoderDC.from_config(model.vae.config).decoder)

    component = decoder_component(config, build_decoder)
    constants: dict[str, Tensor] = {"latents_mean": model.latents_mean, "latents_std": model.latents_std}

    def decoder_weight(name: str) -> Tensor:
        return constants[name] if name in constants else value("vae", name, model.vae, torch.float32)

    save("vae_decoder", component, bind(trace(component, opset), decoder_weight), "fp32")
    return entries


def vision_component_of(model: LatteFlow, precision: Precision) -> Component:
    """`vision_encoder` of a model."""
    vision_config = copy.deepcopy(model.vlm.config.vision_config)
    return vision_component(
        precision,
        vision_config,
        lambda: Qwen2VisionTransformerPretrainedModel._from_config(vision_config, attn_implementation="eager"),
    )


def language_component_of(model: LatteFlow, precision: Precision) -> Component:
    """`vlm` of a model."""
    vlm_config = model.vlm.config

    def build() -> tuple[nn.Module, nn.Linear | None]:
        text_config = copy.deepcopy(vlm_config.text_config)  # it takes the implementation's name in
        text = Qwen2VLTextModel._from_config(text_config, attn_implementation=WIDE_SOFTMAX)
        head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=False)
        return text, None if vlm_config.tie_word_embeddings else head

    return language_component(model.config, precision, vlm_config, build)


def prompt_format(model: LatteFlow) -> PromptFormat:
    """The chat template around a prompt, rendered once, so that the runtime needs no template engine."""
    message = [{"role": "user", "content": _PLACEHOLDER}]
    text = model.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    before, _, after = text.partition(_PLACEHOLDER)
    return PromptFormat(
        before=before,
        after=after,
        pad_token_id=model.tokenizer.pad_token_id or 0,
        max_tokens=model.config.max_prompt_tokens,
        special_tokens=tuple(sorted(token for token in model.tokenizer.get_added_vocab() if token.startswith("<|"))),
    )


def understanding_of(model: LatteFlow) -> Understanding:
    """What the manifest says about answering."""
    config, generation = model.vlm.config, model.vlm.generation_config
    ends = (config.text_config.eos_token_id, generation.eos_token_id, model.tokenizer.eos_token_id)
    flat = {token for end in ends if end is not None for token in (end if isinstance(end, (list, tuple)) else [end])}
    return Understanding(
        image_token_id=config.image_token_id,
        eos_token_ids=tuple(sorted(flat)),
        patch_size=config.vision_config.patch_size,
        spatial_merge_size=config.vision_config.spatial_merge_size,
        max_context_tokens=config.text_config.max_position_embeddings,
    )


def checkpoint_hash(path: Path) -> str:
    """One SHA-256 over the config and all weights of a checkpoint."""
    digest = hashlib.sha256()
    for file in sorted([path / "config.json", *path.rglob("*.safetensors")]):
        if "training" not in file.relative_to(path).parts:
            digest.update(f"{file.relative_to(path).as_posix()} {sha256_of(file)}\n".encode())
    return digest.hexdigest()


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
