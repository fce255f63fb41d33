"""From a graph and weights to an engine's files, and back.

The weights of a graph are bound as external data that points into a safetensors file in the engine's folder.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from export.components import Component
from export.fusion import divide_by_roots, fuse_for_onnxruntime
from runtime.errors import BundleError
from runtime.manifest import EngineEntry, Precision, file_entry

GRAPH_FILE = "model.onnx"
WEIGHTS_FILE = "weights.safetensors"
SAFETENSORS_DTYPES = {
    "DOUBLE": "F64",
    "FLOAT": "F32",
    "FLOAT16": "F16",
    "BFLOAT16": "BF16",
    "INT64": "I64",
    "INT32": "I32",
    "INT8": "I8",
    "UINT8": "U8",
    "FLOAT8E4M3FN": "F8_E4M3",
    "BOOL": "BOOL",
}
INLINE_BYTES = 64
"""Constants up to this size stay in the graph."""


def bind(model: ir.Model, weight: Callable[[str], Tensor]) -> ir.Model:
    """Returns a copy of a graph whose unbound initializers have values.

    Args:
        weight: returns the value of an initializer by its name; called when the value is written, which is not kept.
    """
    bound = model.clone()
    for name, value in bound.graph.initializers.items():
        if value.const_value is None:
            assert value.dtype is not None
            assert value.shape is not None
            value.const_value = ir.LazyTensor(
                partial(_checked, weight, name, value), value.dtype, value.shape, name=name
            )
    return bound


def _checked(weight: Callable[[str], Tensor], name: str, value: ir.Value) -> ir.TensorProtocol:
    tensor = ir.tensor_adapters.TorchTensor(weight(name).detach().cpu().contiguous(), name=name)
    if tensor.shape != value.shape or tensor.dtype != value.dtype:
        raise ValueError(
            f"weight {name} is {tensor.dtype} {tensor.shape}, the graph expects {value.dtype} {value.shape}"
        )
    return tensor


def save_engine(model: ir.Model, folder: Path, *, fuse: bool = False) -> list[str]:
    """Writes `model.onnx` and, if there are weights, `weights.safetensors`; returns the names of the files.

    ONNX checks the graph as written, which contains no path except the name of the other file. With `fuse` it is then
    rewritten for ONNX Runtime, whose operators ONNX's checker does not know.
    """
    if not fuse:  # which looks for the other form
        divide_by_roots(model)
    files = write_files(model, folder)
    onnx.checker.check_model(str(folder / GRAPH_FILE), full_check=True)
    return write_files(fuse_for_onnxruntime(model), folder) if fuse else files


def write_engine(
    bundle: Path,
    name: str,
    component: Component,
    graph: ir.Model,
    *,
    precision: Precision,
    opset: int,
    group: int | None = None,
    fuse: bool = False,
) -> EngineEntry:
    """Writes an engine into a bundle; returns its entry for the manifest."""
    files = save_engine(graph, bundle / name, fuse=fuse)
    return EngineEntry(
        name=name,
        role=component.role,
        group=group,
        precision=precision,
        opset=opset,
        fused=fuse,
        files=tuple(file_entry(bundle, f"{name}/{file}") for file in files),
        inputs=component.inputs,
        outputs=component.outputs,
    )


def load_engine(folder: Path) -> ir.Model:
    """Reads the graph that `save_engine` wrote; its weights stay in their file until they are needed.

    The file may have several hard links, as a Triton model repository makes them, which `ir.load` would refuse: it
    checks the path of each tensor that has a base directory. Here the only path is a file's name in the same folder.

    Raises:
        BundleError: the graph names another file than `weights.safetensors`.
    """
    model = ir.load(folder / GRAPH_FILE)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        if str(tensor.location) != WEIGHTS_FILE:
            raise BundleError(
                f"{folder / GRAPH_FILE}: weights must be in {WEIGHTS_FILE} beside it, got {tensor.location!r} for "
                f"{value.name}; export the checkpoint again"
            )
        value.const_value = ir.ExternalTensor(
            folder / WEIGHTS_FILE, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=value.name or ""
        )
    return model


def write_files(model: ir.Model, folder: Path) -> list[str]:
    """Writes an engine's files as `save_engine` does, without ONNX's check."""
    folder.mkdir(parents=True, exist_ok=True)
    large = {
        name: value.const_value
        for name, value in model.graph.initializers.items()
        if value.const_value is not None and value.const_value.nbytes > INLINE_BYTES
    }
    if large:
        # Not in place: the values of a graph that was read may be in the file that this replaces.
        temporary = folder / f".{WEIGHTS_FILE}.tmp"
        write_safetensors(temporary, large)
        os.replace(temporary, folder / WEIGHTS_FILE)
        offsets = tensor_offsets(folder / WEIGHTS_FILE)
        for name, tensor in large.items():
            offset, length = offsets[name]
            model.graph.initializers[name].const_value = ir.ExternalTensor(
                WEIGHTS_FILE, offset, length, tensor.dtype, shape=tensor.shape, name=name, base_dir=folder
            )
    onnx.save(ir.to_proto(model), folder / GRAPH_FILE)
    return [GRAPH_FILE, WEIGHTS_FILE] if large else [GRAPH_FILE]


def write_safetensors(path: Path, tensors: Mapping[str, Any]) -> None:
    """Writes tensors one after another, each evaluated only then; safetensors' own writer needs all of them at once.

    Args:
        tensors: tensors of onnx_ir, by name.
    """
    # Wide types first, so that each tensor is aligned to its elements.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in ordered:
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[tensor.dtype.name],
            "shape": [int(size) for size in tensor.shape],
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for _, tensor in ordered:
            # A torch tensor's own bytes, since `tobytes` would make another copy.
            value = tensor.raw() if isinstance(tensor, ir.LazyTensor) else tensor
            if isinstance(value, ir.tensor_adapters.TorchTensor):
                file.write(memoryview(value.raw.view(-1).view(torch.uint8).numpy()))
            else:
                file.write(value.tobytes())


def tensor_offsets(path: Path) -> Mapping[str, tuple[int, int]]:
    """Returns (offset from the start of the file, length) in bytes of every tensor in a safetensors file."""
    with path.open("rb") as file:
        (header_size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_size))
    start = 8 + header_size
    return {
        name: (start + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }
