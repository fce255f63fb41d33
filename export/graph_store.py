"""A store of traced parts in the user's cache folder, so that the same part is traced once per machine.

An entry is named by everything that its graph depends on: the part's settings, specs and opset, the versions of the
exporters, and the code that defines the parts. Its file is named by its own content, so a corrupt entry is not used.

    graphs/<hash of what the graph depends on>/<hash of the file>.onnx
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from functools import cache
from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir

import latte.checkpoint
import latte.config
import latte.model
from export import components, dc_ae, graphs, vlm_components
from export.components import Part
from export.graphs import read_graph, write_graph
from runtime.errors import InputError
from runtime.files import replaced_directory, sha256_of
from runtime.machine import graph_cache

EXPORTERS = ("torch", "transformers", "diffusers", "onnx", "onnx-ir", "onnxscript")
SOURCES = (components, vlm_components, dc_ae, graphs, latte.checkpoint, latte.config, latte.model)
"""Modules that define what is traced, and how."""
ENTRY_NAME = re.compile("[0-9a-f]{32}")
"""Names of entries. Nothing else in the folder is ours."""
KEPT_SECONDS = 30 * 24 * 3600.0
"""Entries that were not used for so long are deleted."""


class GraphStore:
    """Traced parts on disk.

    Args:
        folder: the store's folder; None stores nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def load(self, part: Part, opset: int) -> ir.Model | None:
        """Returns a part's graph, or None if the store does not have it."""
        if self._folder is None:
            return None
        entry = self._folder / _key(part, opset)
        with contextlib.suppress(Exception):  # whatever is wrong with a cached file, the part is traced again
            for file in entry.glob("*.onnx"):
                content = file.read_bytes()
                if hashlib.sha256(content).hexdigest() == file.stem:
                    model = read_graph(content)
                    with contextlib.suppress(OSError):  # the store may be another user's
                        os.utime(entry)
                    return model
        return None

    def save(self, part: Part, opset: int, model: ir.Model) -> None:
        """Adds a part's graph, and deletes entries that were not used for a month. It is not an error if that fails."""
        if self._folder is None:
            return
        content = write_graph(model)
        with contextlib.suppress(OSError, InputError), replaced_directory(self._folder / _key(part, opset)) as entry:
            (entry / f"{hashlib.sha256(content).hexdigest()}.onnx").write_bytes(content)
        with contextlib.suppress(OSError):
            for entry in self._folder.iterdir():
                if ENTRY_NAME.fullmatch(entry.name) and entry.stat().st_mtime < time.time() - KEPT_SECONDS:
                    shutil.rmtree(entry, ignore_errors=True)


def default_store() -> GraphStore:
    """Returns the store in the user's cache folder."""
    return GraphStore(graph_cache())


def _key(part: Part, opset: int) -> str:
    depends_on = {
        "name": part.name,
        "inputs": [spec.model_dump() for spec in part.inputs],
        "outputs": [spec.model_dump() for spec in part.outputs],
        "settings": part.settings,
        "opset": opset,
        "environment": _environment(),
    }
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True, default=str).encode()).hexdigest()[:32]


@cache
def _environment() -> dict[str, str]:
    """Returns the versions of the exporters and the hashes of our own sources."""
    sources = {module.__name__: sha256_of(Path(module.__file__ or "")) for module in SOURCES}
    return {name: version(name) for name in EXPORTERS} | sources
