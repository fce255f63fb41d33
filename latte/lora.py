"""Low-rank adapters of the flow layers: LoRA (arXiv 2106.09685), by peft.

An adapter is a folder as peft saves it, for the list of flow layers. It belongs to one checkpoint, whose flow layers'
hash it has for the name of its base model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from latte.checkpoint import load_checkpoint, own_state, save_changed, untrained_groups
from latte.model import FlowTransformer
from runtime.errors import CheckpointError, InputError, MissingExtraError, one_line
from runtime.files import permit_like_new, replaced_directory, sha256_of

PRODUCTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The matrices of a flow layer that get an adapter."""
ADAPTER_CONFIG = "adapter_config.json"
WEIGHTS = "model.safetensors"


def add_adapter(flow: FlowTransformer, rank: int, groups: Sequence[int]) -> Any:
    """Freezes flow layers, and adds to those of some expert groups an adapter to train; returns peft's model of it.

    Raises:
        InputError: the layers share their weights with the VLM.
        MissingExtraError: peft is not installed.
    """
    peft = _import_peft()
    if flow.config.variant == "blend":
        raise InputError("--lora-rank needs the variant couple; in blend the VLM has the flow layers' matrices")
    layers = "|".join(str(layer) for group in groups for layer in flow.config.layers_of(group))
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=rf"({layers})\.({'|'.join(PRODUCTS)})")
    flow.requires_grad_(False)
    return peft.get_peft_model(flow.layers, config)


def check_adaptable(flow: FlowTransformer) -> None:
    """Raises `InputError` if flow layers have nothing yet that could be adapted."""
    if untrained_groups(flow):
        raise InputError(
            "--lora-rank adapts flow layers that are trained; this checkpoint's are not, train all of them first"
        )


def save_adapter(adapter: Any, base: Path, folder: Path) -> None:
    """Writes an adapter for a checkpoint; replaces what was there."""
    adapter.peft_config["default"].base_model_name_or_path = _name_of(base)
    with replaced_directory(folder) as part:
        adapter.save_pretrained(part, save_embedding_layers=False)
        (part / "README.md").unlink(missing_ok=True)  # a form to fill in
        for weights in part.glob("*.safetensors"):
            permit_like_new(weights)


def merge_adapter(base: Path, adapter: Path, target: Path) -> None:
    """Writes a checkpoint in which an adapter is added to the flow layers' matrices, in the precision of the base.

    Raises:
        CheckpointError: the adapter cannot be loaded, or belongs to another checkpoint.
        MissingExtraError: peft is not installed.
    """
    peft = _import_peft()
    try:
        name = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{adapter / ADAPTER_CONFIG} cannot be read: {one_line(error)}") from error
    if name != _name_of(base):
        raise CheckpointError(f"{adapter} does not belong to {base}; give the checkpoint that it was trained on")
    model = load_checkpoint(base)
    try:
        peft.PeftModel.from_pretrained(model.flow.layers, adapter, torch_device="cpu").merge_and_unload()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{adapter} cannot be loaded: {one_line(error)}") from error
    with safe_open(base / WEIGHTS, framework="pt") as weights:
        dtype = next(weights.get_tensor(name).dtype for name in weights.keys())  # noqa: SIM118
    save_changed(base, target, dtype, flow=own_state(model.flow))


def is_adapter(folder: Path) -> bool:
    """Returns whether a folder contains an adapter."""
    return (folder / ADAPTER_CONFIG).is_file()


def _name_of(base: Path) -> str:
    """Returns what an adapter calls the checkpoint that it belongs to."""
    return f"sha256:{sha256_of(base / WEIGHTS)}"


def _import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise MissingExtraError(
            'adapters need peft, which is not installed; run: pip install "latte-flow[train]"'
        ) from error
    return peft
