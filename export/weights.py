"""A checkpoint's weights by the names of the graphs' initializers.

An export reads them from files one at a time, so that it never holds a model in memory; a verification takes them from
the model that it compares with.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from export.components import expert_weight_source
from latte.model import LatteFlow
from latte.precision import TORCH_DTYPES
from runtime.errors import CheckpointError, one_line
from runtime.manifest import EngineRole, Precision

PREFIXES = {
    "flow": ("",),
    "text": ("model.", "model.language_model.", "language_model."),
    "vision": ("visual.", "model.visual."),
    "head": ("",),
    "vae": ("",),
}
"""Possible prefixes of a module's names in its file; transformers has changed those of the VLM."""
ALWAYS_FP32: tuple[EngineRole, ...] = ("solver_step", "vae_decoder")
FOLDERS = {"flow": ".", "text": "vlm", "vision": "vlm", "head": "vlm", "vae": "vae"}


class Weights(Protocol):
    """The parameters of a checkpoint."""

    def read(self, part: str, name: str, dtype: torch.dtype) -> Tensor:
        """Returns one parameter.

        Args:
            part: "flow", "text", "vision", "head" or "vae".
            name: its name in the part's own module.
        """


class LoadedWeights:
    """The parameters of a model in memory."""

    def __init__(self, model: LatteFlow) -> None:
        vlm = model.vlm
        self._modules: dict[str, nn.Module] = {
            "flow": model.flow,
            "text": vlm.model.language_model,
            "vision": vlm.model.visual,
            "head": vlm,
            "vae": model.vae,
        }

    def read(self, part: str, name: str, dtype: torch.dtype) -> Tensor:
        return self._modules[part].get_parameter(name).detach().to(dtype)


class WeightFiles:
    """The safetensors files of a checkpoint directory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: dict[str, dict[str, Path]] = {}

    def read(self, part: str, name: str, dtype: torch.dtype) -> Tensor:
        """Reads one tensor.

        Args:
            part: "flow", "text", "vision", "head" or "vae".
            name: its name in the part's own module.

        Raises:
            CheckpointError: there is no tensor of this name.
        """
        where = self._index(FOLDERS[part])
        for prefix in PREFIXES[part]:
            file = where.get(prefix + name)
            if file is not None:
                # Opened for each tensor, since mapped pages would count as memory in use.
                with safe_open(file, framework="pt") as opened:
                    tensor: Tensor = opened.get_tensor(prefix + name)
                    return tensor.to(dtype, copy=True)
        raise CheckpointError(f"{self._path / FOLDERS[part]} contains no tensor {name}; is the checkpoint complete?")

    def _index(self, folder: str) -> dict[str, Path]:
        """Returns the file of every tensor, by its name in the file."""
        if folder not in self._files:
            found: dict[str, Path] = {}
            for file in sorted((self._path / folder).glob("*.safetensors")):
                try:
                    with safe_open(file, framework="pt") as opened:
                        found |= dict.fromkeys(opened.keys(), file)
                except SafetensorError as error:
                    raise CheckpointError(f"{file} cannot be read: {one_line(error)}") from error
            self._files[folder] = found
        return self._files[folder]


def weights_of(
    role: EngineRole, model: LatteFlow, weights: Weights, precision: Precision, group: int | None
) -> Callable[[str], Tensor]:
    """Returns a function from the name of a graph's initializer to its value.

    Args:
        model: the checkpoint's modules; only their buffers are used.
        weights: the parameters.
        group: the expert group, for experts.
    """
    dtype = torch.float32 if role in ALWAYS_FP32 else TORCH_DTYPES[precision]
    language_model = model.vlm.model.language_model
    constants = {"latents_mean": model.latents_mean, "latents_std": model.latents_std}

    def value(part: str, name: str, module: nn.Module) -> Tensor:
        """Returns a parameter from its file, or a buffer that the module computes, such as rotary frequencies."""
        owner, _, attribute = name.rpartition(".")
        computed = module.get_submodule(owner)._buffers.get(attribute)
        return weights.read(part, name, dtype) if computed is None else computed

    def weight(name: str) -> Tensor:
        if role == "vision_encoder":
            return value("vision", name.removeprefix("tower."), model.vlm.model.visual)
        if role == "vlm" and name == "lm_head.weight":
            return weights.read("head", name, dtype)
        if role == "vlm":
            return value("text", name.removeprefix("language_model."), language_model)
        if role == "vae_decoder":
            return constants[name] if name in constants else value("vae", name, model.vae)
        if role != "expert" or group is None:
            raise CheckpointError(f"{role} has no weights, asked for {name}")
        part, source = expert_weight_source(model.config, group, name)
        return value("text", source, language_model) if part == "language_model" else value("flow", source, model.flow)

    return weight
