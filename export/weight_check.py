"""Whether the weights in an engine's files are those of the checkpoint.

Comparing outputs cannot show a small error of a weight: in INT8 it disappears in what the precision itself costs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.traversal import RecursiveGraphIterator

from export.float8_products import FLOAT8, float8_of, scales_of
from export.float8_products import ZERO_POINT as FLOAT8_ZERO_POINT
from export.graphs import CONSTANT
from export.integer_products import LEVELS as ACTIVATION_LEVELS
from export.integer_products import ZERO_POINT
from export.products import products_of
from export.weights import LoadedWeights, weights_of
from latte.model import LatteFlow
from runtime.errors import CheckpointError
from runtime.manifest import EngineEntry, Precision

NARROW: dict[Precision, set[ir.DataType]] = {
    "fp16": {ir.DataType.FLOAT16},
    "bf16": {ir.DataType.BFLOAT16},
    "fp8": {ir.DataType.FLOAT16, ir.DataType.FLOAT8E4M3FN},
}
"""The floating types that engines have besides fp32."""
TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype")
"""Attributes of operators that name the type of their result."""
BLOCK_BYTES = 16 << 20
"""Memory for the part of a matrix that is compared at once."""
LEVELS, SCALES = ".levels", ".scales"
"""A quantised weight `[N, K]` is two initializers of its name with these endings, `[K, N]` int8 and `[N]` float32.

In FP8 they are `FLOAT8` and `SCALES`, `[K, N]` float8 and `[N]` float16.
"""
UNQUANTIZED: dict[Precision, Precision] = {"int8": "fp32", "fp8": "fp16"}
"""What is not quantised in an engine of 8 bits."""


def differing_weights(graph: ir.Model, entry: EngineEntry, model: LatteFlow) -> tuple[list[str], int]:
    """Compares an engine's weights with the checkpoint's, rounded to the engine's precision.

    Returns:
        the names of those that differ, and the number of those compared.
    """
    initializers = graph.graph.initializers
    precision = UNQUANTIZED.get(entry.precision, entry.precision)
    weight = weights_of(entry.role, model, LoadedWeights(model), precision, entry.group)
    differing, count = [], 0
    for name, value in initializers.items():
        if name.startswith(CONSTANT) or name.endswith(SCALES):
            continue
        assert value.const_value is not None
        found, source = value.const_value.numpy(), name.removesuffix(LEVELS).removesuffix(FLOAT8)
        try:
            expected = weight(source)
        except (AttributeError, CheckpointError):
            differing.append(f"{source}, which the checkpoint does not have")
            continue
        if source != name:
            scales = initializers[source + SCALES].const_value if source + SCALES in initializers else None
            if scales is None:
                same = False
            elif name.endswith(FLOAT8):
                same = is_float8(expected.numpy(), found, scales.numpy())
            else:
                limit = 2**6 - 1 if entry.quantization is not None and entry.quantization.reduced_range else 2**7 - 1
                same = is_quantized(expected.numpy(), found, scales.numpy(), limit)
        else:
            same = _equal(found, expected)
        count += 1
        if not same:
            differing.append(source)
    return differing + quantization_faults(graph), count


def precision_of(graph: ir.Model, entry: EngineEntry) -> Precision:
    """Returns the precision of an engine by its weights, whatever its entry says."""
    initializers = graph.graph.initializers
    dtypes = {value.dtype for value in initializers.values()}
    if any(name.endswith(LEVELS) for name in initializers):
        return "int8"
    if any(name.endswith(FLOAT8) for name in initializers):
        return "fp8"
    if entry.quantization is not None and not entry.quantization.quantized:
        return entry.precision  # every product was too sensitive
    return "fp16" if ir.DataType.FLOAT16 in dtypes else "bf16" if ir.DataType.BFLOAT16 in dtypes else "fp32"


def foreign_types(graph: ir.Model, precision: Precision) -> list[str]:
    """Describes each value of a floating type that engines of a precision do not have, such as bf16 in fp16 engines."""
    own = {ir.DataType.FLOAT} | NARROW.get(precision, set())

    def fault(what: str, dtype: ir.DataType | None) -> list[str]:
        is_foreign = dtype is not None and dtype.is_floating_point() and dtype not in own
        return [f"{what} is {dtype.name} in an engine of {precision}"] if is_foreign and dtype is not None else []

    values = [*graph.graph.inputs, *graph.graph.initializers.values()]
    faults = [line for value in values for line in fault(str(value.name), value.dtype)]
    for node in RecursiveGraphIterator(graph.graph):
        name = f"{node.op_type} {node.name or node.outputs[0].name}"
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR:
                faults += fault(name, attribute.as_tensor().dtype)
            elif attribute.name in TYPE_ATTRIBUTES and attribute.type == ir.AttributeType.INT:
                faults += fault(name, ir.DataType(attribute.as_int()))
    return faults


def quantized_products(graph: ir.Model) -> dict[str, list[str]]:
    """Returns the names of the weights whose products are quantised in a graph, and of those whose are not, sorted."""
    endings = (LEVELS, FLOAT8)
    levels = [name[: name.rindex(".")] for name in graph.graph.initializers if name.endswith(endings)]
    return {"quantized": sorted(levels), "kept": sorted({product.name for product in products_of(graph)})}


def quantization_faults(graph: ir.Model) -> list[str]:
    """Describes each dequantised tensor that is not what its quantisation made: other scales, or another zero point."""
    faults = []
    for node in graph.graph:
        if node.op_type != "DequantizeLinear":
            continue
        source, scale = node.inputs[0], node.inputs[1]
        zero_point = node.inputs[2] if len(node.inputs) > 2 else None
        assert source is not None
        assert scale is not None
        producer = source.producer()
        if producer is None:
            weight = str(source.name).removesuffix(LEVELS).removesuffix(FLOAT8)
            axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
            right = scale.name == weight + SCALES and axis == 1 and zero_point is None
        else:
            weight = f"activations of {source.name}"
            constants = [None if value is None else value.const_value for value in (scale, zero_point)]
            same = list(producer.inputs[1:]) == [scale, zero_point]
            is_of_float8 = zero_point is not None and zero_point.name == FLOAT8_ZERO_POINT
            # The scales of FP8 were measured, so any is right that both nodes have.
            right = same and all(
                constant is not None
                and (expected is None or np.allclose(constant.numpy().astype(float), expected, rtol=1e-6, atol=0))
                for constant, expected in zip(
                    constants, (None, 0) if is_of_float8 else (1 / ACTIVATION_LEVELS, ZERO_POINT), strict=True
                )
            )
        if not right:
            faults.append(f"{weight}, which has other scales than it was quantised with")
        elif producer is not None and not is_of_float8 and not _is_of_each_row(producer.inputs[0]):
            faults.append(f"{weight}, which are not divided by the largest magnitude of each row")
    return faults


def _is_of_each_row(divided: ir.Value | None) -> bool:
    """Returns whether a value is x / max(max |x|, a constant), with the largest magnitude over the last axis only."""

    def made_by(value: ir.Value | None, op_type: str) -> Sequence[ir.Value | None]:
        node = None if value is None else value.producer()
        return node.inputs if node is not None and node.op_type == op_type else ()

    match made_by(divided, "Div"):
        case (x, magnitude):
            largest = next(iter(made_by(magnitude, "Max")), None)
            match made_by(largest, "ReduceMax"):
                case (absolute, axes) if axes is not None and axes.const_value is not None:
                    return axes.const_value.numpy().tolist() == [-1] and tuple(made_by(absolute, "Abs")) == (x,)
    return False


def is_float8(weight: np.ndarray, found: np.ndarray, scales: np.ndarray) -> bool:
    """Returns whether a weight `[N, K]` has these scales `[N]`, and is `found` `[K, N]` in float8 with them."""
    right = scales_of(weight)
    return np.array_equal(scales, right) and np.array_equal(
        found.view(np.uint8), float8_of(weight, right).view(np.uint8)
    )


def is_quantized(weight: np.ndarray, levels: np.ndarray, scales: np.ndarray, limit: int) -> bool:
    """Returns whether levels `[K, N]` times scales `[N]` are a weight `[N, K]` but for the rounding to levels.

    Args:
        limit: largest level, which every output uses: otherwise its scale is larger than needed.
    """
    if levels.shape != weight.shape[::-1] or scales.shape != weight.shape[:1] or not (scales > 0).all():
        return False
    # The matrix of a vocabulary is large, so a few outputs at a time.
    rows = max(1, BLOCK_BYTES // max(1, 4 * weight.shape[1]))
    return all(
        _is_quantized(
            weight[start : start + rows], levels[:, start : start + rows].T, scales[start : start + rows], limit
        )
        for start in range(0, len(weight), rows)
    )


def _is_quantized(weight: np.ndarray, levels: np.ndarray, scales: np.ndarray, limit: int) -> bool:
    """Compares a weight and its levels, both `[N, K]`."""
    used = np.maximum(levels.max(axis=1), -levels.min(axis=1).astype(np.int16))  # [N]
    off = np.abs(levels - weight / scales[:, None])
    full = (used == limit) | (np.abs(weight).max(axis=1) == 0)
    return bool((off <= 0.5 + 1e-3).all() and full.all())


def _equal(found: np.ndarray, expected: torch.Tensor) -> bool:
    """Compares bytes, since NumPy has no bfloat16 of its own."""
    mine = np.ascontiguousarray(found).reshape(-1).view(np.uint8)
    theirs = expected.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return found.shape == tuple(expected.shape) and np.array_equal(mine, theirs)
