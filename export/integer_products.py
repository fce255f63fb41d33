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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnx_ir.tape import Tape

SWITCHES = "switches"
"""Input of a graph that has every product in both forms, `[products]` bool: True for the integer one."""
LEVELS = 127
"""Largest level of an activation."""
ZERO_POINT = 128
SMALLEST_MAGNITUDE = 1e-30
"""Rows of zeros are divided by this."""


@dataclass(frozen=True)
class Product:
    """A matrix product with a weight `[outputs, inputs]`."""

    node: ir.Node
    weight: ir.Value

    @property
    def name(self) -> str:
        return str(self.weight.name)

    @property
    def size(self) -> int:
        """Number of weights, which is the number of multiplications per row of activations."""
        rows, columns = (int(size) for size in self.weight.shape or ())
        return rows * columns


def weight_bits(reduce_range: bool) -> int:
    """Returns the number of bits of a quantised weight."""
    return 7 if reduce_range else 8


def products_of(model: ir.Model) -> Iterator[Product]:
    """Yields every product of activations with a weight, `x Wᵀ` or `x Wᵀ + b`."""
    for node in model.graph:
        if node.op_type == "MatMul":
            transpose = node.inputs[1].producer() if node.inputs[1] is not None else None
            weight = transpose.inputs[0] if transpose is not None and transpose.op_type == "Transpose" else None
        elif node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1:
            weight = node.inputs[1]
        else:
            continue
        if weight is not None and weight.is_initializer() and weight.shape is not None and len(weight.shape) == 2:
            yield Product(node, weight)


def quantize_graph(model: ir.Model, chosen: set[str], bits: int, *, switchable: bool = False) -> None:
    """Replaces the products of these weights with integer products.

    Args:
        chosen: names of the weights.
        bits: number of bits of a quantised weight.
        switchable: keep both forms of every product, and add the input `switches`, which selects one of the two.
    """
    graph = model.graph
    products = list(products_of(model))
    if switchable:
        graph.inputs.append(ir.val(SWITCHES, ir.DataType.BOOL, [len(products)]))
    activations: dict[ir.Value, Sequence[ir.Value]] = {}
    for index, product in enumerate(products):
        if product.name not in chosen:
            continue
        node, old = product.node, product.node.outputs[0]
        x = node.inputs[0]
        assert x is not None
        tape = Tape()
        if x not in activations:  # queries, keys and values are of the same activations
            activations[x] = _quantized_activations(graph, tape, x)
        rows, magnitude = activations[x]
        levels, scales = _quantized_weight(graph, product.weight, bits)
        weight = tape.op("DequantizeLinear", [levels, scales], {"axis": 1})
        result = tape.op("Mul", [tape.op("MatMul", [rows, weight]), magnitude])
        if node.op_type == "Gemm" and len(node.inputs) > 2:
            result = tape.op("Add", [result, node.inputs[2]])
        if switchable:
            number = _constant(graph, f"{SWITCHES}.{index}", np.array(index))
            result = tape.op("Where", [tape.op("Gather", [graph.inputs[-1], number]), result, old])
        result.dtype, result.shape = ir.DataType.FLOAT, old.shape
        name, old.name = old.name, f"{old.name}.fp32"  # it may be an output, whose name is the engine's
        result.name = name
        ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
        if switchable:
            selection = result.producer()
            assert selection is not None
            selection.replace_input_with(2, old)
        graph.insert_after(node, tape.nodes)
    RemoveUnusedNodesPass()(model)


def _quantized_activations(graph: ir.Graph, tape: Tape, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Adds the nodes of x / m, rounded to levels, and of m `[…, 1]`; returns both."""
    last = _constant(graph, "constant_activations.axis", np.array([-1]))
    smallest = _constant(graph, "constant_activations.smallest", np.array(SMALLEST_MAGNITUDE, np.float32))
    step = _constant(graph, "constant_activations.step", np.array(1 / LEVELS, np.float32))
    zero_point = _constant(graph, "constant_activations.zero_point", np.array(ZERO_POINT, np.uint8))
    largest = tape.op("ReduceMax", [tape.op("Abs", [x]), last], {"keepdims": 1})
    magnitude = tape.op("Max", [largest, smallest])
    levels = tape.op("QuantizeLinear", [tape.op("Div", [x, magnitude]), step, zero_point])
    return tape.op("DequantizeLinear", [levels, step, zero_point]), magnitude


def _quantized_weight(graph: ir.Graph, weight: ir.Value, bits: int) -> tuple[ir.Value, ir.Value]:
    """Returns the initializers of a weight `[N, K]`: its levels `[K, N]` int8, and its scales `[N]` fp32."""
    rows, columns = (int(size) for size in weight.shape or ())
    values = [
        ir.Value(name=f"{weight.name}.levels", type=ir.TensorType(ir.DataType.INT8), shape=ir.Shape([columns, rows])),
        ir.Value(name=f"{weight.name}.scales", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([rows])),
    ]
    for value, part in zip(values, (_levels, _scales), strict=True):
        if value.name not in graph.initializers:
            assert weight.const_value is not None
            assert value.dtype is not None
            assert value.shape is not None
            value.const_value = ir.LazyTensor(
                partial(part, weight.const_value, bits, value.name), value.dtype, value.shape, name=value.name
            )
            graph.register_initializer(value)
    return graph.initializers[str(values[0].name)], graph.initializers[str(values[1].name)]


def _scales(weight: ir.TensorProtocol, bits: int, name: str) -> ir.TensorProtocol:
    largest = np.abs(weight.numpy()).max(axis=1)
    limit = 2 ** (bits - 1) - 1
    return ir.tensor(np.where(largest > 0, largest / limit, 1).astype(np.float32), name=name)


def _levels(weight: ir.TensorProtocol, bits: int, name: str) -> ir.TensorProtocol:
    scales = _scales(weight, bits, name).numpy()
    return ir.tensor(np.ascontiguousarray(np.rint(weight.numpy() / scales[:, None]).astype(np.int8).T), name=name)


def _constant(graph: ir.Graph, name: str, value: np.ndarray[Any, Any]) -> ir.Value:
    """Returns an initializer, which is added where it is first needed."""
    if name not in graph.initializers:
        tensor = ir.tensor(value, name=name)
        initializer = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        graph.register_initializer(initializer)
    return graph.initializers[name]
