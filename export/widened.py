"""The graphs of a bundle in fp32 with the checkpoint's weights, so that what a graph does is seen apart from rounding.

In fp16, bf16 and INT8 a verification must tolerate the error of the precision, and a wrong connection whose effect is
smaller than that would pass. In fp32 it cannot.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnx_ir.traversal import RecursiveGraphIterator

from export.engines import bind, load_engine, write_files
from export.float8_products import FLOAT8
from export.graphs import CONSTANT
from export.weight_check import LEVELS, precision_of
from export.weights import LoadedWeights, weights_of
from latte.model import LatteFlow
from runtime.manifest import EngineEntry, Manifest, TensorSpec, file_entry, load_manifest, save_manifest

QUICK_GELU, GELU = 1.702, 2**0.5
"""Constants of the activations in the vision tower: x·sigmoid(1.702·x), and erf(x / √2)."""
HALF = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}


def is_widened_by(graph: ir.Model, entry: EngineEntry) -> bool:
    """Returns whether an engine differs from its form in fp32."""
    return precision_of(graph, entry) != "fp32"


def widened_bundle(bundle: Path, model: LatteFlow, folder: Path) -> Manifest:
    """Writes a bundle with the graphs of another in fp32.

    Args:
        model: the checkpoint, in fp32.
        folder: where the new bundle is written.
    """
    manifest = load_manifest(bundle)
    engines = []
    constants = exact_constants(model)
    for entry in manifest.engines:
        graph = load_engine(bundle / entry.name)
        if is_widened_by(graph, entry):
            widen(graph, constants)
        graph = bind(graph, weights_of(entry.role, model, LoadedWeights(model), "fp32", entry.group))
        files = write_files(graph, folder / entry.name)
        engines.append(
            entry.model_copy(
                update={
                    "precision": "fp32",
                    "files": tuple(file_entry(folder, f"{entry.name}/{file}") for file in files),
                    "inputs": tuple(_wide_spec(spec) for spec in entry.inputs),
                    "outputs": tuple(_wide_spec(spec) for spec in entry.outputs),
                    "quantization": None,
                    "plans": (),
                }
            )
        )
    for file in manifest.tokenizer_files:
        shutil.copyfile(bundle / file.path, folder / file.path)
    wide = manifest.model_copy(update={"precision": "fp32", "engines": tuple(engines)})
    save_manifest(wide, folder)
    return wide


def _wide_spec(spec: TensorSpec) -> TensorSpec:
    return spec.model_copy(update={"dtype": "float32"}) if spec.dtype in ("float16", "bfloat16") else spec


def exact_constants(model: LatteFlow) -> tuple[float, ...]:
    """Returns the constants of the model's formulas that half precision cannot represent."""
    vision, text = model.vlm.config.vision_config, model.vlm.config.text_config
    sizes = {vision.embed_dim // vision.num_heads, text.hidden_size // text.num_attention_heads, model.config.head_dim}
    return (QUICK_GELU, GELU, 1 / GELU, *(size**-0.5 for size in sizes))


def widen(model: ir.Model, constants: Sequence[float]) -> None:
    """Makes a graph fp32, in place: types, casts and constants; quantised products become plain ones.

    Weights lose their values, which are the checkpoint's to give.

    Args:
        constants: numbers that get back what rounding took from them.
    """
    _remove_quantization(model.graph)
    for value in model.graph.inputs:
        _widen_value(value)
    for name, value in model.graph.initializers.items():
        if not name.startswith(CONSTANT):
            value.const_value = None
        elif value.const_value is not None and value.const_value.dtype in HALF:
            value.const_value = _wide_tensor(value.const_value, constants)
        _widen_value(value)
    for node in RecursiveGraphIterator(model.graph):
        for value in node.outputs:
            _widen_value(value)
        for attribute in list(node.attributes.values()):
            if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in HALF:
                node.attributes.add(ir.AttrTensor(attribute.name, _wide_tensor(attribute.as_tensor(), constants)))
            elif node.op_type == "Cast" and attribute.name == "to" and ir.DataType(attribute.as_int()) in HALF:
                node.attributes.add(ir.AttrInt64("to", ir.DataType.FLOAT.value))


def _widen_value(value: ir.Value) -> None:
    if value.dtype in HALF:
        value.dtype = ir.DataType.FLOAT


def _wide_tensor(tensor: ir.TensorProtocol, constants: Sequence[float]) -> ir.TensorProtocol:
    half = tensor.numpy()
    wide = half.astype(np.float32)
    for constant in constants:
        wide = np.where(half == np.asarray(constant, half.dtype), np.float32(constant), wide)
    return ir.tensor(wide, name=tensor.name)


def _remove_quantization(graph: ir.Graph) -> None:
    """Replaces quantised activations by the activations, and quantised weights by the weights."""
    for node in list(graph):
        if node.op_type != "DequantizeLinear":
            continue
        source, result = node.inputs[0], node.outputs[0]
        assert source is not None
        producer = source.producer()
        if producer is not None and producer.op_type == "QuantizeLinear":
            activations = producer.inputs[0]
            assert activations is not None
            ir.convenience.replace_all_uses_with(result, activations)
        elif source.name is not None and source.name.endswith((LEVELS, FLOAT8)):
            assert source.shape is not None
            columns, rows = source.shape
            name = source.name[: source.name.rindex(".")]
            if name not in graph.initializers:
                shape, type_ = ir.Shape([rows, columns]), ir.TensorType(ir.DataType.FLOAT)
                graph.initializers.add(ir.Value(name=name, type=type_, shape=shape))
            transpose = ir.node("Transpose", [graph.initializers[name]], {"perm": [1, 0]})
            graph.insert_before(node, transpose)
            ir.convenience.replace_all_uses_with(result, transpose.outputs[0])
    RemoveUnusedNodesPass()(ir.Model(graph, ir_version=10))
