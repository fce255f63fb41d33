"""A checkpoint's weights, read from its files one at a time, so that an export never holds a model in memory."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from runtime.errors import CheckpointError, one_line

PREFIXES = {
    "flow": ("",),
    "text": ("model.", "model.language_model.", "language_model."),
    "vision": ("visual.", "model.visual."),
    "head": ("",),
    "vae": ("",),
}
"""Possible prefixes of a module's names in its file; transformers has changed those of the VLM."""
FOLDERS = {"flow": ".", "text": "vlm", "vision": "vlm", "head": "vlm", "vae": "vae"}


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
