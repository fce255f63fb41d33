"""Reads and writes checkpoints, which are folders in the Hugging Face style:

config.json                      LatteFlowConfig; written last, so its presence means complete
model.safetensors                the flow transformer; in the `blend` variant, only the weights that it does not share
vlm/                             Qwen2VLForConditionalGeneration, as transformers saves it
vae/                             AutoencoderDC, as diffusers saves it
tokenizer.json, tokenizer_config.json, chat_template.jinja, preprocessor_config.json
"""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderDC
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationConfig, Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import logging as transformers_logging

from latte.config import FORMAT_VERSION, LatteFlowConfig
from latte.model import FlowTransformer, LatteFlow
from latte.precision import TORCH_DTYPES, cast_parameters
from latte.shipped import shipped_checkpoints
from runtime.errors import CheckpointError, InputError, one_line
from runtime.files import make_writable_folder, permit_like_new, replaced_directory, write_text
from runtime.flow_time import SamplingDefaults

CLASS_OF_VAE = ("_class_name", "AutoencoderDC")
"""What diffusers writes into the config of the only autoencoder that is supported."""

VLM_FROM_FLOW = {
    "input_layernorm.weight": "input_layernorm.weight",
    "q_proj.weight": "self_attn.q_proj.weight",
    "q_proj.bias": "self_attn.q_proj.bias",
    "k_proj.weight": "self_attn.k_proj.weight",
    "k_proj.bias": "self_attn.k_proj.bias",
    "v_proj.weight": "self_attn.v_proj.weight",
    "v_proj.bias": "self_attn.v_proj.bias",
    "o_proj.weight": "self_attn.o_proj.weight",
    "post_attention_layernorm.weight": "post_attention_layernorm.weight",
    "gate_proj.weight": "mlp.gate_proj.weight",
    "up_proj.weight": "mlp.up_proj.weight",
    "down_proj.weight": "mlp.down_proj.weight",
}
"""Weights that a flow layer and a VLM layer have in common: the name in the flow layer, the name in the VLM's."""


def resolve_checkpoint(name_or_path: str | Path) -> Path:
    """Returns the folder of a checkpoint, given by its path or by the name of a shipped one.

    Raises:
        CheckpointError: there is no checkpoint, or it is incomplete.
    """
    shipped = shipped_checkpoints()
    path = shipped.get(str(name_or_path), Path(name_or_path))
    known = ", ".join(sorted(shipped))
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint at {name_or_path}; expected a folder, or one of: {known}")
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"{name_or_path} contains no config.json, so it is not a complete LaTtE-Flow checkpoint; those that are "
            f"installed are: {known}"
        )
    return path


def load_config(path: Path) -> LatteFlowConfig:
    """Reads the `config.json` of a checkpoint folder.

    Raises:
        CheckpointError: the config is not valid.
    """
    content = (path / "config.json").read_text(encoding="utf-8")
    try:
        found = json.loads(content).get("format_version", 1)
    except (ValueError, AttributeError):
        found = FORMAT_VERSION  # the error of the validation is the one to show
    if found != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} is a checkpoint of format {found}, expected format {FORMAT_VERSION}, whose flow layers differ; "
            "train it again, or use the version of latte-flow that wrote it"
        )
    try:
        return LatteFlowConfig.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise CheckpointError(f"{path / 'config.json'} is not valid: {where}: {first['msg']}") from error


def load_checkpoint(name_or_path: str | Path, dtype: torch.dtype = torch.float32) -> LatteFlow:
    """Loads a whole checkpoint, ready for inference on the CPU.

    Args:
        name_or_path: the name of a shipped checkpoint, or a folder.
        dtype: dtype of the weights in memory, whatever it is on disk. Rotary frequencies stay
            float32.

    Raises:
        CheckpointError: a file or weight is missing, unexpected or has another shape. All differences of one file are
            listed.
    """
    path = resolve_checkpoint(name_or_path)
    config = load_config(path)
    vlm = load_vlm(path / "vlm", dtype)
    vae = load_vae(path / "vae", dtype)
    _check_geometry(config, vlm, vae)
    flow = FlowTransformer(config)
    load_flow(flow, path / "model.safetensors")
    model = LatteFlow(config, cast_parameters(flow, dtype), vlm, vae, _prompt_tokenizer(path, config))
    if config.variant == "blend":
        share_with_vlm(flow, vlm)
    return model.eval()


def load_outline(name_or_path: str | Path) -> LatteFlow:
    """Builds a checkpoint's modules without loading weights: parameters are on the meta device.

    Buffers and the tokenizer are real.

    Raises:
        CheckpointError: a config is missing, or the parts do not fit together.
    """
    path = resolve_checkpoint(name_or_path)
    config = load_config(path)
    _check_kind(Qwen2VLForConditionalGeneration, path / "vlm")
    _check_kind(AutoencoderDC, path / "vae")
    with init_empty_weights(include_buffers=False):
        with _loading(Qwen2VLForConditionalGeneration, path / "vlm"):
            vlm_config = Qwen2VLConfig.from_pretrained(path / "vlm", local_files_only=True)
            vlm = Qwen2VLForConditionalGeneration._from_config(vlm_config, attn_implementation="eager")
        with _loading(AutoencoderDC, path / "vae"):
            vae = AutoencoderDC.from_config(AutoencoderDC.load_config(path / "vae", local_files_only=True))
        _check_geometry(config, vlm, vae)
        flow = FlowTransformer(config)
    if (path / "vlm" / "generation_config.json").is_file():
        vlm.generation_config = GenerationConfig.from_pretrained(path / "vlm", local_files_only=True)
    if config.variant == "blend":
        share_with_vlm(flow, vlm)
    return LatteFlow(config, flow, vlm, vae, _prompt_tokenizer(path, config)).eval()


def load_vlm(path: Path, dtype: torch.dtype = torch.float32) -> Qwen2VLForConditionalGeneration:
    """Loads a Qwen2-VL from a local folder, in evaluation mode.

    Raises:
        CheckpointError: the folder contains no Qwen2-VL, or its weights do not fit its config.
    """
    return _from_pretrained(Qwen2VLForConditionalGeneration, path, dtype, attn_implementation="eager").eval()


def load_vae(path: Path, dtype: torch.dtype = torch.float32) -> AutoencoderDC:
    """Loads an `AutoencoderDC` from a local folder, in evaluation mode.

    Raises:
        CheckpointError: the folder contains no `AutoencoderDC`, or its weights do not fit its config.
    """
    return _from_pretrained(AutoencoderDC, path, dtype).eval()


def load_tokenizer(path: Path) -> Any:
    """Loads the tokenizer of a local folder, with its chat template.

    Raises:
        CheckpointError: one of them is missing.
    """
    if not (path / "tokenizer.json").is_file():
        raise CheckpointError(f"{path} contains no tokenizer.json; save the VLM's tokenizer there")
    tokenizer = Qwen2Tokenizer.from_pretrained(path, local_files_only=True)
    if not isinstance(tokenizer.chat_template, str):
        raise CheckpointError(f"{path} contains no chat_template.jinja; save the VLM's chat template there")
    return tokenizer


def _prompt_tokenizer(path: Path, config: LatteFlowConfig) -> Any:
    """Loads a tokenizer whose chat template leaves room for a prompt; raises `CheckpointError` otherwise."""
    tokenizer = load_tokenizer(path)
    try:
        empty = tokenizer.apply_chat_template(
            [{"role": "user", "content": ""}], tokenize=True, add_generation_prompt=True, return_dict=False
        )
    except Exception as error:  # a template is a program, which can raise anything
        raise CheckpointError(f"the chat template of {path} cannot be used: {one_line(error)}") from error
    if len(empty) > config.max_prompt_tokens:
        raise CheckpointError(
            f"{path / 'config.json'} has max_prompt_tokens {config.max_prompt_tokens}, but an empty prompt has "
            f"{len(empty)} tokens in the chat template; expected at least as many"
        )
    return tokenizer


def load_image_processor(path: Path) -> Qwen2VLImageProcessorPil:
    """Loads the torch-free image processor of a local folder.

    Raises:
        CheckpointError: there is none.
    """
    if not (path / "preprocessor_config.json").is_file():
        raise CheckpointError(f"{path} contains no preprocessor_config.json; save the VLM's image processor there")
    return Qwen2VLImageProcessorPil.from_pretrained(path, local_files_only=True)


def _check_kind(kind: Any, path: Path) -> None:
    """Checks that a folder's config describes the expected class."""
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} contains no config.json; expected a {kind.__name__} as its library saves it")
    name, expected = ("model_type", "qwen2_vl") if kind is Qwen2VLForConditionalGeneration else CLASS_OF_VAE
    try:
        declared = json.loads((path / "config.json").read_text(encoding="utf-8")).get(name)
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path / 'config.json'} is not a config: {one_line(error)}") from error
    if declared != expected:
        raise CheckpointError(
            f"{path / 'config.json'} does not describe a {kind.__name__}: {name} is {declared!r}, expected {expected!r}"
        )


def _from_pretrained(kind: Any, path: Path, dtype: torch.dtype, **options: Any) -> Any:
    _check_kind(kind, path)
    for index in path.glob("*.index.json"):
        names = set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
        if escaping := sorted(name for name in names if Path(name).name != name):
            raise CheckpointError(f"{index} names {escaping[0]}, which is not a file in the same folder")
    option = "dtype" if kind is Qwen2VLForConditionalGeneration else "torch_dtype"
    with _loading(kind, path):
        model, info = kind.from_pretrained(
            path,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **{option: dtype},
            **options,
        )
    problems = [f"missing {name}" for name in sorted(info["missing_keys"])]
    problems += [f"unexpected {name}" for name in sorted(info["unexpected_keys"])]
    problems += [f"{item[0]} has shape {tuple(item[1])}, expected {tuple(item[2])}" for item in info["mismatched_keys"]]
    _raise_all(path, problems)
    return model


@contextmanager
def _loading(kind: Any, path: Path) -> Iterator[None]:
    """Raises `CheckpointError` if transformers or diffusers cannot make a model of a folder."""
    try:
        with quiet_libraries():
            yield
    except Exception as error:  # a value of a config that does not fit raises anything, a ZeroDivisionError too
        detail = f"{type(error).__name__}: {one_line(error).rstrip('.')}"
        raise CheckpointError(
            f"{path} cannot be loaded as {kind.__name__}: {detail}; do its config.json and its weights fit together?"
        ) from error


def load_flow(flow: FlowTransformer, path: Path) -> None:
    """Loads the weights of a `model.safetensors` into a flow transformer, in place.

    Raises:
        CheckpointError: the file cannot be read, or its weights do not fit. Every difference is listed.
    """
    expected = own_state(flow)
    problems = []
    try:
        with safe_open(path, framework="pt") as file:
            found = set(file.keys())
            problems += [f"missing {name}" for name in sorted(expected.keys() - found)]
            problems += [f"unexpected {name}" for name in sorted(found - expected.keys())]
            for name in sorted(found & expected.keys()):
                tensor = file.get_tensor(name)
                if tensor.shape != expected[name].shape:
                    problems.append(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}")
                elif tensor.dtype not in TORCH_DTYPES.values():
                    problems.append(f"{name} is {tensor.dtype}, expected float32, float16 or bfloat16")
                else:
                    with torch.no_grad():
                        expected[name].copy_(tensor)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {one_line(error)}") from error
    _raise_all(path, problems)


def _raise_all(path: Path, problems: list[str]) -> None:
    if problems:
        listed = "\n  ".join(problems)
        raise CheckpointError(f"{path} does not match its config; {len(problems)} differences:\n  {listed}")


def _check_geometry(config: LatteFlowConfig, vlm: Qwen2VLForConditionalGeneration, vae: AutoencoderDC) -> None:
    mirrored = LatteFlowConfig.geometry_of(vlm.config.text_config)
    mirrored |= {"latent_channels": vae.config.latent_channels, "vae_scale_factor": vae_scale_factor(vae)}
    problems = [
        f"{name} is {getattr(config, name)} in config.json, {value} in vlm/ or vae/"
        for name, value in mirrored.items()
        if getattr(config, name) != value
    ]
    if problems:
        raise CheckpointError("the parts of the checkpoint do not fit together: " + "; ".join(problems))


def check_autoencoder(vae: AutoencoderDC, latent_size: tuple[int, int], name: str | Path) -> None:
    """Checks an autoencoder's `scaling_factor`, and decodes latents of zeros once.

    Args:
        latent_size: height and width in latents.
        name: what to call the autoencoder in an error.

    Raises:
        CheckpointError: the autoencoder cannot decode them, or not to RGB images of `vae_scale_factor` pixels a latent;
            or its `scaling_factor` is no positive number.
    """
    scaling = vae.config.scaling_factor
    is_number = isinstance(scaling, (int, float)) and not isinstance(scaling, bool)
    if not is_number or not 0 < scaling < math.inf or math.isinf(1 / scaling):
        raise CheckpointError(
            f"{name} has the scaling_factor {scaling!r} in its config.json, expected a positive number: one divided by "
            "the standard deviation of its latents"
        )
    channels, factor = vae.config.latent_channels, vae_scale_factor(vae)
    latents = torch.zeros((1, channels, *latent_size), dtype=vae.dtype)
    expected = (1, 3, *(factor * size for size in latent_size))
    try:
        with torch.no_grad():
            image = vae.decode(latents).sample
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise CheckpointError(
            f"{name} cannot decode latents of shape {tuple(latents.shape)}: {one_line(error)}; "
            "give an AutoencoderDC whose decoder fits its config"
        ) from error
    if tuple(image.shape) != expected:
        raise CheckpointError(
            f"{name} decodes latents of shape {tuple(latents.shape)} to {tuple(image.shape)}, expected {expected}; "
            "give an AutoencoderDC whose encoder and decoder have the same factor, for RGB images"
        )
    if not torch.isfinite(image).all():
        raise CheckpointError(f"{name} decodes latents of zeros to pixels that are not finite; its weights are broken")


def untrained_groups(flow: FlowTransformer) -> list[int]:
    """Returns the expert groups whose velocity is zero whatever the input, as `init` leaves it.

    A model on the meta device has no values, so none of its groups is known to be untrained.
    """
    projections = enumerate(flow.get_submodule(f"heads.{group}.proj") for group in range(len(flow.heads)))
    return [
        group for group, projection in projections if all(not (p.is_meta or p.any()) for p in projection.parameters())
    ]


def has_latents_statistics(config: LatteFlowConfig) -> bool:
    """Returns whether latents have been measured; until then a config has means of zero."""
    return any(config.latents_mean)


def check_trained(model: LatteFlow, name: str | Path) -> None:
    """Raises `CheckpointError` if a checkpoint, called `name`, still has the velocity heads that `init` makes."""
    if untrained_groups(model.flow):
        raise CheckpointError(
            f"{name} is untrained: a velocity head is zero, as `latte-flow init` leaves it, so nothing can be drawn; "
            "train its flow layers first"
        )


def vae_scale_factor(vae: AutoencoderDC) -> int:
    """Returns the autoencoder's pixels per latent, in each direction."""
    return int(2 ** (len(vae.config.encoder_block_out_channels) - 1))


def own_state(flow: FlowTransformer) -> dict[str, Tensor]:
    """Returns the parameters in `model.safetensors`: all of them or, for `blend`, those not shared with the VLM."""
    shared = set()
    if flow.config.variant == "blend":
        shared = {f"layers.{i}.{name}" for i in range(flow.config.num_hidden_layers) for name in VLM_FROM_FLOW}
    return {name: tensor for name, tensor in flow.named_parameters() if name not in shared}


def share_with_vlm(flow: FlowTransformer, vlm: Qwen2VLForConditionalGeneration) -> None:
    """Makes the flow layers use the VLM layers' parameter objects, which stay frozen: the `blend` variant."""
    for layer, vlm_layer in zip(flow.layers, vlm.model.language_model.layers, strict=True):
        for name, vlm_name in VLM_FROM_FLOW.items():
            owner, _, attribute = name.rpartition(".")
            parameter: nn.Parameter = vlm_layer.get_parameter(vlm_name)
            layer.get_submodule(owner)._parameters[attribute] = parameter


def copy_from_vlm(flow: FlowTransformer, vlm: Qwen2VLForConditionalGeneration) -> None:
    """Copies the VLM layers' weights into the flow layers of untrained groups, where the `couple` variant starts."""
    if flow.config.variant != "couple":
        return
    with torch.no_grad():
        for index in (index for group in untrained_groups(flow) for index in flow.config.layers_of(group)):
            layer, vlm_layer = flow.layers[index], vlm.model.language_model.layers[index]
            for name, vlm_name in VLM_FROM_FLOW.items():
                layer.get_parameter(name).copy_(vlm_layer.get_parameter(vlm_name))


def assemble(
    vlm: Qwen2VLForConditionalGeneration,
    vae: AutoencoderDC,
    tokenizer: Any,
    *,
    num_groups: int,
    boundaries: tuple[float, ...] | None = None,
    variant: str = "couple",
    latent_size: tuple[int, int],
    latents_mean: tuple[float, ...] | None = None,
    latents_std: tuple[float, ...] | None = None,
    max_prompt_tokens: int = 512,
    sampling: SamplingDefaults | None = None,
) -> LatteFlow:
    """Builds a LaTtE-Flow model from a VLM and an autoencoder; its flow layers are untrained.

    Args:
        num_groups: number of expert groups, K; must divide the VLM's layers.
        boundaries: K + 1 flow times that bound the groups' intervals; equal intervals by default.
        variant: "couple" or "blend", see `LatteFlowConfig`.
        latent_size: default height and width in latents.
        latents_mean: mean of each latent channel; 0 by default.
        latents_std: standard deviation of each latent channel; by default 1 / the autoencoder's `scaling_factor`.
        max_prompt_tokens: limit of a prompt in tokens, including the chat template.
        sampling: how it is sampled when a caller says nothing; by default as any model is.

    Raises:
        InputError: the parts do not fit together.
    """
    channels = vae.config.latent_channels
    try:
        config = LatteFlowConfig.model_validate(
            {
                "variant": variant,
                "schedule": {"boundaries": boundaries or [k / num_groups for k in range(num_groups + 1)]},
                **LatteFlowConfig.geometry_of(vlm.config.text_config),
                "latent_channels": channels,
                "latent_size": latent_size,
                "vae_scale_factor": vae_scale_factor(vae),
                "latents_mean": latents_mean or (0.0,) * channels,
                "latents_std": latents_std or (1.0 / vae.config.scaling_factor,) * channels,
                "max_prompt_tokens": max_prompt_tokens,
                "sampling": sampling or SamplingDefaults(),
            }
        )
    except ValidationError as error:
        raise InputError(f"these parts cannot form a LaTtE-Flow model: {error.errors()[0]['msg']}") from error
    flow = FlowTransformer(config)
    copy_from_vlm(flow, vlm)
    if variant == "blend":
        share_with_vlm(flow, vlm)
    return LatteFlow(config, flow, vlm, vae, tokenizer)


def save_checkpoint(model: LatteFlow, image_processor: Any, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes a whole checkpoint.

    `config.json` is removed first and written last, so that a checkpoint that is only partly written is never loaded.

    Args:
        image_processor: the VLM's image processor.
        dtype: dtype of the weights on disk.
    """
    make_writable_folder(path)
    (path / "config.json").unlink(missing_ok=True)
    save_part(_as(model.vlm, dtype), path / "vlm")
    save_part(_as(model.vae, dtype), path / "vae")
    model.tokenizer.save_pretrained(path)
    image_processor.save_pretrained(path)
    _save_tensors(own_state(model.flow), path / "model.safetensors", dtype)
    write_text(path / "config.json", model.config.model_dump_json(indent=2) + "\n")


def save_changed(
    source: Path,
    target: Path,
    dtype: torch.dtype,
    *,
    flow: Mapping[str, Tensor] | None = None,
    vlm: Qwen2VLForConditionalGeneration | None = None,
    vae: AutoencoderDC | None = None,
    config: LatteFlowConfig | None = None,
) -> None:
    """Writes a checkpoint that differs from another in some parts, and has copies of all its other files.

    Args:
        source: the other checkpoint.
        target: the folder to write, which is replaced if it exists.
        dtype: dtype of the changed weights on disk.
        flow: tensors of `model.safetensors`, all of them.
    """
    with replaced_directory(target) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)
        if flow is not None:
            _save_tensors(flow, folder / "model.safetensors", dtype)
        if vlm is not None:
            save_part(_as(vlm, dtype), folder / "vlm")
        if vae is not None:
            save_part(_as(vae, dtype), folder / "vae")
        if config is not None:
            write_text(folder / "config.json", config.model_dump_json(indent=2) + "\n")


def save_part(module: Any, path: Path, *processors: Any) -> None:
    """Saves a transformers or diffusers model, and its processors, as the folder `path`; replaces what was there."""
    with replaced_directory(path) as part, quiet_libraries():
        for saved in (module, *processors):
            saved.save_pretrained(part)
        for weights in part.glob("*.safetensors"):
            permit_like_new(weights)
        # Diffusers records the path that the model was loaded from, which must not be published.
        config = part / "config.json"
        content = json.loads(config.read_text(encoding="utf-8"))
        if content.pop("_name_or_path", None) is not None:
            write_text(config, json.dumps(content, indent=2) + "\n")


def _as(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Returns a module with floating tensors of a dtype: itself, or a copy in which no other tensor is copied."""
    tensors = [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point()]
    if all(tensor.dtype == dtype for tensor in module.parameters()):
        return module
    # `deepcopy` takes these instead of copying the originals, and keeps tied parameters tied.
    cast: dict[int, Any] = {id(tensor): tensor.detach().to(dtype) for tensor in tensors}
    for parameter in module.parameters():
        cast[id(parameter)] = nn.Parameter(cast[id(parameter)], requires_grad=False)
    return copy.deepcopy(module, cast)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Disables transformers' progress bars; the commands report progress themselves."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


def _save_tensors(tensors: Mapping[str, Tensor], path: Path, dtype: torch.dtype) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(
        {name: t.detach().to(dtype).contiguous().cpu() for name, t in tensors.items()}, temporary, {"format": "pt"}
    )
    permit_like_new(temporary)
    os.replace(temporary, path)
