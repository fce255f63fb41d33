"""The matrix products of a graph with its weights, and how they are replaced by others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnx_ir.tape import Tape

SWITCHES = "switches"
"""Input of a graph that has every product in both forms, `[products]` bool: True for the new one."""


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


class Form(Protocol):
    """Another form of products, for one graph: values that products share are made once."""

    @property
    def opset(self) -> int:
        """The first ONNX operator set that has its nodes."""

    def product(self, graph: ir.Graph, tape: Tape, product: Product) -> ir.Value:
        """Adds the nodes of x Wᵀ, without a bias; returns the result."""


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


def replace_products(model: ir.Model, chosen: set[str], form: Form, *, switchable: bool = False) -> None:
    """Replaces the products of these weights.

    Args:
        chosen: names of the weights.
        form: the new form.
        switchable: keep both forms of every product, and add the input `switches`, which selects one of the two.
    """
    graph = model.graph
    products = list(products_of(model))
    if switchable:
        graph.inputs.append(ir.val(SWITCHES, ir.DataType.BOOL, [len(products)]))
    for index, product in enumerate(products):
        if product.name not in chosen:
            continue
        node, old = product.node, product.node.outputs[0]
        tape = Tape()
        result = form.product(graph, tape, product)
        if node.op_type == "Gemm" and len(node.inputs) > 2:
            result = tape.op("Add", [result, node.inputs[2]])
        if switchable:
            number = constant(graph, f"{SWITCHES}.{index}", np.array(index))
            result = tape.op("Where", [tape.op("Gather", [graph.inputs[-1], number]), result, old])
        result.dtype, result.shape = product.weight.dtype, old.shape
        name, old.name = old.name, f"{old.name}.plain"  # it may be an output, whose name is the engine's
        result.name = name
        ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
        if switchable:
            selection = result.producer()
            assert selection is not None
            selection.replace_input_with(2, old)
        graph.insert_after(node, tape.nodes)
    model.opset_imports[""] = max(form.opset, model.opset_imports[""])
    RemoveUnusedNodesPass()(model)


def constant(graph: ir.Graph, name: str, value: np.ndarray[Any, Any]) -> ir.Value:
    """Returns an initializer with a value, which is added where it is first needed."""
    if name not in graph.initializers:
        tensor = ir.tensor(value, name=name)
        initializer = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        graph.register_initializer(initializer)
    return graph.initializers[name]


def derived_initializer(
    graph: ir.Graph,
    name: str,
    dtype: ir.DataType,
    shape: list[int],
    make: Callable[[], ir.TensorProtocol],
) -> ir.Value:
    """Returns an initializer whose value is made when it is written; it is added where it is first needed."""
    if name not in graph.initializers:
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        value.const_value = ir.LazyTensor(make, dtype, ir.Shape(shape), name=name)
        graph.register_initializer(value)
    return graph.initializers[name]
