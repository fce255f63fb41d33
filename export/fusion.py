"""Graphs that ONNX Runtime fuses by itself, and graphs of its own fused operators: `latte-flow export --fuse`."""

from __future__ import annotations

import contextlib
import os

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from export.graphs import CONSTANT, quiet_exporter


def divide_by_roots(model: ir.Model) -> None:
    """Writes x·(1/√y), which is what PyTorch exports an RMS norm to, as x/√y, in place.

    It is plain ONNX still, and the form of an RMS norm of which ONNX Runtime makes one operator instead of seven.
    """
    for node in model.graph:
        root = node.inputs[0] if node.op_type == "Reciprocal" else None
        if root is None or (producer := root.producer()) is None or producer.op_type != "Sqrt":
            continue
        for product, place in tuple(node.outputs[0].uses()):
            if product.op_type == "Mul":
                product.op_type = "Div"
                product.replace_input_with(0, product.inputs[1 - place])
                product.replace_input_with(1, root)
    RemoveUnusedNodesPass()(model)


def fuse_for_onnxruntime(model: ir.Model) -> ir.Model:
    """Rewrites a graph with ONNX Runtime's fused operators (domain `com.microsoft`).

    Weights keep their names and values, which the optimiser does not see: it would make new weights of them, which
    nobody could compare with a checkpoint's.
    """
    from onnxscript.rewriter import ort_fusions

    weights = {n: value.const_value for n, value in model.graph.initializers.items() if not n.startswith(CONSTANT)}
    bare = model.clone()
    for name in weights:
        bare.graph.initializers[name].const_value = None
    cast = _without_casts(bare.graph)
    with quiet_exporter(), open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        fused, _ = ort_fusions.optimize_for_ort(bare)
    _with_casts(fused.graph, cast)
    for name, value in list(fused.graph.initializers.items()):
        if name in weights:
            value.const_value = weights[name]
        elif not name.startswith(CONSTANT):
            value.name = f"{CONSTANT}{name}"
    return fused


def _without_casts(graph: ir.Graph) -> dict[str, tuple[ir.DataType, ir.DataType]]:
    """Takes away the casts of weights, which are not always fused as they should: an fp16 scale in an fp32 norm.

    Returns:
        the types before and after its cast, for each such weight.
    """
    cast = {}
    for name, value in graph.initializers.items():
        readers = [node for node, _ in value.uses()]
        results = {node.outputs[0].dtype for node in readers if node.op_type == "Cast"}
        if value.dtype is None or len(results) != 1 or any(node.op_type != "Cast" for node in readers):
            continue
        (result,) = results
        assert result is not None
        cast[name] = (value.dtype, result)
        value.type = ir.TensorType(result)  # a clone shares the type of the original
        for node in readers:
            ir.convenience.replace_all_uses_with(node.outputs[0], value)
            graph.remove(node, safe=True)
    return cast


def _with_casts(graph: ir.Graph, cast: dict[str, tuple[ir.DataType, ir.DataType]]) -> None:
    """Reverses `_without_casts`."""
    for name, (before, after) in cast.items():
        value = graph.initializers[name]
        node = ir.node("Cast", [value], {"to": after.value}, name=f"Cast_{name}")
        result = node.outputs[0]
        result.name, result.shape, result.dtype = f"{name}/cast", value.shape, after
        ir.convenience.replace_all_uses_with(value, result)
        node.replace_input_with(0, value)
        value.type = ir.TensorType(before)
        graph.insert_before(graph[0], node)
