"""The integer form of a graph's matrix products.

A product of activations x `[…, K]` with a weight W `[N, K]` becomes a product of 8-bit numbers. Every row of
activations is divided by its largest magnitude m and rounded to levels from −127 to 127; every output of the weight
has a scale s:

    x Wᵀ ≈ m · s · (levels(x / m) · levels(W / s)ᵀ)

A row's levels depend on that row only, so that an image is the same alone, in a batch and beside longer prompts. One
range for a whole tensor (`DynamicQuantizeLinear`) would make rows depend on each other, and is less accurate.

The nodes are plain ONNX: quantised and dequantised activations, dequantised weights, and a `MatMul`, which ONNX
Runtime replaces by one integer product (`MatMulIntegerToFloat`). Another node multiplies by m afterwards: with m as
the scale of that product's activations, ONNX Runtime 1.32 would also multiply a bias that it fused.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from export.products import Product, constant, derived_initializer

LEVELS = 127
"""Largest level of an activation."""
ZERO_POINT = 128
SMALLEST_MAGNITUDE = 1e-30
"""Rows of zeros are divided by this."""


def weight_bits(reduce_range: bool) -> int:
    """Returns the number of bits of a quantised weight."""
    return 7 if reduce_range else 8


class IntegerForm:
    """Integer products with weights of so many bits, for one graph."""

    opset = 13

    def __init__(self, bits: int) -> None:
        self._bits = bits
        self._activations: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        """Queries, keys and values are of the same activations."""

    def product(self, graph: ir.Graph, tape: Tape, product: Product) -> ir.Value:
        """Adds the nodes of x Wᵀ; returns the result."""
        x = product.node.inputs[0]
        assert x is not None
        if x not in self._activations:
            self._activations[x] = _quantized_activations(graph, tape, x)
        rows, magnitude = self._activations[x]
        levels, scales = _quantized_weight(graph, product.weight, self._bits)
        weight = tape.op("DequantizeLinear", [levels, scales], {"axis": 1})
        return tape.op("Mul", [tape.op("MatMul", [rows, weight]), magnitude])


def _quantized_activations(graph: ir.Graph, tape: Tape, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Adds the nodes of x / m, rounded to levels, and of m `[…, 1]`; returns both."""
    last = constant(graph, "constant_activations.axis", np.array([-1]))
    smallest = constant(graph, "constant_activations.smallest", np.array(SMALLEST_MAGNITUDE, np.float32))
    step = constant(graph, "constant_activations.step", np.array(1 / LEVELS, np.float32))
    zero_point = constant(graph, "constant_activations.zero_point", np.array(ZERO_POINT, np.uint8))
    largest = tape.op("ReduceMax", [tape.op("Abs", [x]), last], {"keepdims": 1})
    magnitude = tape.op("Max", [largest, smallest])
    levels = tape.op("QuantizeLinear", [tape.op("Div", [x, magnitude]), step, zero_point])
    return tape.op("DequantizeLinear", [levels, step, zero_point]), magnitude


def _quantized_weight(graph: ir.Graph, weight: ir.Value, bits: int) -> tuple[ir.Value, ir.Value]:
    """Returns the initializers of a weight `[N, K]`: its levels `[K, N]` int8, and its scales `[N]` fp32."""
    rows, columns = (int(size) for size in weight.shape or ())
    values = weight.const_value
    assert values is not None
    levels, scales = f"{weight.name}.levels", f"{weight.name}.scales"
    return (
        derived_initializer(graph, levels, ir.DataType.INT8, [columns, rows], partial(_levels, values, bits, levels)),
        derived_initializer(graph, scales, ir.DataType.FLOAT, [rows], partial(_scales, values, bits, scales)),
    )


def _scales(weight: ir.TensorProtocol, bits: int, name: str) -> ir.TensorProtocol:
    largest = np.abs(weight.numpy()).max(axis=1)
    limit = 2 ** (bits - 1) - 1
    return ir.tensor(np.where(largest > 0, largest / limit, 1).astype(np.float32), name=name)


def _levels(weight: ir.TensorProtocol, bits: int, name: str) -> ir.TensorProtocol:
    scales = _scales(weight, bits, name).numpy()
    return ir.tensor(np.ascontiguousarray(np.rint(weight.numpy() / scales[:, None]).astype(np.int8).T), name=name)
