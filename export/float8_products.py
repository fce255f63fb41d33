"""The FP8 form of a graph's matrix products, for NVIDIA GPUs of compute capability 8.9 and later.

A product of activations x `[…, K]` with a weight W `[N, K]` becomes a product of numbers in float8 e4m3, whose largest
is 448. The activations of a product share one scale, which is fixed before (their largest magnitude in runs of the
engine, over 448), so that an image does not depend on what shares its batch; larger values saturate. Every output of
the weight has a scale.

The nodes are plain ONNX of opset 19: quantised and dequantised activations, dequantised weights, and a `MatMul`, which
TensorRT replaces by one FP8 product. ONNX Runtime computes them as they are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from export.products import Product, constant, derived_initializer

LARGEST = 448.0
"""Of float8 e4m3."""
FLOAT8, SCALES = ".float8", ".scales"
"""A quantised weight `[N, K]` is two initializers of its name with these endings, `[K, N]` float8 and `[N]`."""
ZERO_POINT = "constant_activations.float8_zero"


class Float8Form:
    """FP8 products for one graph.

    Args:
        magnitudes: the largest magnitude of each product's activations, by the name of its weight.
    """

    opset = 19

    def __init__(self, magnitudes: Mapping[str, float]) -> None:
        self._magnitudes = magnitudes
        self._activations: dict[ir.Value, ir.Value] = {}
        """Queries, keys and values are of the same activations."""

    def product(self, graph: ir.Graph, tape: Tape, product: Product) -> ir.Value:
        """Adds the nodes of x Wᵀ; returns the result."""
        x = product.node.inputs[0]
        assert x is not None
        if x not in self._activations:
            self._activations[x] = self._quantized_activations(graph, tape, product)
        weight = tape.op("DequantizeLinear", list(_quantized_weight(graph, product.weight)), {"axis": 1})
        return tape.op("MatMul", [self._activations[x], weight])

    def _quantized_activations(self, graph: ir.Graph, tape: Tape, product: Product) -> ir.Value:
        assert product.weight.dtype is not None
        magnitude = self._magnitudes[product.name]
        scale = np.array(magnitude / LARGEST if magnitude > 0 else 1).astype(product.weight.dtype.numpy())
        # Part of the name, so that it is no constant of the model.
        step = constant(graph, f"constant_activations.{product.name}", scale)
        zero_point = constant(graph, ZERO_POINT, np.zeros((), ml_dtypes.float8_e4m3fn))
        levels = tape.op("QuantizeLinear", [product.node.inputs[0], step, zero_point])
        return tape.op("DequantizeLinear", [levels, step, zero_point])


def _quantized_weight(graph: ir.Graph, weight: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Returns the initializers of a weight `[N, K]`: `[K, N]` float8, and its scales `[N]` in the weight's type."""
    rows, columns = (int(size) for size in weight.shape or ())
    values, dtype = weight.const_value, weight.dtype
    assert values is not None
    assert dtype is not None
    levels, scales = f"{weight.name}{FLOAT8}", f"{weight.name}{SCALES}"
    float8 = ir.DataType.FLOAT8E4M3FN
    return (
        derived_initializer(graph, levels, float8, [columns, rows], partial(_levels, values, levels)),
        derived_initializer(graph, scales, dtype, [rows], partial(_scales, values, scales)),
    )


def _scales(weight: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    return ir.tensor(scales_of(weight.numpy()), name=name)


def _levels(weight: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    return ir.tensor(float8_of(weight.numpy(), scales_of(weight.numpy())), name=name)


def scales_of(weight: np.ndarray) -> np.ndarray:
    """Returns the scale of every output of a weight `[N, K]`, in the weight's type: `[N]`."""
    largest = np.abs(weight.astype(np.float32)).max(axis=1)
    scales: np.ndarray = np.where(largest > 0, largest / LARGEST, 1).astype(weight.dtype)
    return scales


def float8_of(weight: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Returns a weight `[N, K]` over its scales `[N]`, transposed, in float8 e4m3: `[K, N]`."""
    levels = weight.astype(np.float32) / scales.astype(np.float32)[:, None]
    return np.ascontiguousarray(np.clip(levels, -LARGEST, LARGEST).T.astype(ml_dtypes.float8_e4m3fn))
