"""From a component to an ONNX graph: its parts are traced, or taken from the store, and put together.

Graphs have no weights: initializers have a name and a type, but no value until an engine is written.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import multiprocessing
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import onnx
import onnx_ir as ir
import onnxscript.optimizer
import torch
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    CommonSubexpressionEliminationPass,
    RemoveUnusedNodesPass,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from export.components import Component, Part
from runtime.errors import EngineError
from runtime.manifest import TensorSpec

IR_VERSION = 10
CONSTANT = "constant_"
"""Initializers whose names begin so are numbers of the graph, not weights."""
OPSETS = range(18, 26)
"""The ONNX operator sets that the exporter can write."""
ZERO_OF_ZERO = {"Mul", "Cast", "Reshape", "Transpose", "Expand", "Slice", "Unsqueeze"}
"""Operators whose result is zero if one of their operands is."""
UNBOUND = "unbound_initializers"
"""Metadata of a graph that `write_graph` wrote."""
DATA_TYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "int64": ir.DataType.INT64,
    "bool": ir.DataType.BOOL,
    "uint8": ir.DataType.UINT8,
}


class Store(Protocol):
    """Keeps the graphs of traced parts."""

    def load(self, part: Part, opset: int) -> ir.Model | None:
        """Returns a part's graph, or None if there is none."""

    def save(self, part: Part, opset: int, model: ir.Model) -> None:
        """Adds a part's graph."""


def make_graphs(components: Sequence[Component], opset: int, store: Store) -> list[ir.Model]:
    """Returns a graph for each component, with unbound initializers.

    Parts that the store does not have are traced, those of one component in one process, on as many cores as there are.
    """
    graphs = [{part.name: store.load(part, opset) for part in component.parts} for component in components]
    missing = [
        [part for part in component.parts if known[part.name] is None]
        for component, known in zip(components, graphs, strict=True)
    ]
    for known, parts, traced in zip(graphs, missing, _trace_in_processes(missing, opset), strict=True):
        for part, model in zip(parts, traced, strict=True):
            store.save(part, opset, model)
            known[part.name] = model
    models = []
    for component, known in zip(components, graphs, strict=True):
        assembly = GraphAssembly(component, {name: model for name, model in known.items() if model is not None}, opset)
        component.assemble(assembly)
        models.append(assembly.finish())
    return models


# ---- tracing -----------------------------------------------------------------------------------------


class _Together(nn.Module):
    """Several independent modules as one, since half a second of every trace does not depend on what is traced."""

    def __init__(self, modules: Sequence[nn.Module], inputs: Sequence[int]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)
        self._inputs = inputs

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs: list[Tensor] = []
        for module, count in zip(self.parts, self._inputs, strict=True):
            result = module(*tensors[:count])
            outputs += result if isinstance(result, tuple) else [result]
            tensors = tensors[count:]
        return tuple(outputs)


def _trace_in_processes(groups: Sequence[Sequence[Part]], opset: int) -> Iterator[list[ir.Model]]:
    """Traces groups of parts, each in a process of its own, if that can be faster."""
    busy = sum(bool(group) for group in groups)
    workers = min(busy, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
    # Only a fork starts with torch imported, only Linux forks safely, and a daemon may have no children.
    if workers < 2 or sys.platform != "linux" or multiprocessing.current_process().daemon:
        yield from (trace_parts(group, opset) for group in groups)
        return
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, context, _start_tracing) as pool:
        try:
            for contents in pool.map(partial(_trace_to_bytes, opset=opset), groups):
                yield [read_graph(content) for content in contents]
        except BrokenProcessPool as error:
            raise EngineError("a process that traced a graph was killed; is there enough memory?") from error
        except KeyboardInterrupt:
            for process in multiprocessing.active_children():
                process.kill()
            raise


def _start_tracing() -> None:
    """Prepares a process that only traces: one core for each, and no garbage collection, a tenth of the time."""
    torch.set_num_threads(1)
    gc.disable()


def _trace_to_bytes(parts: Sequence[Part], opset: int) -> list[bytes]:
    return [write_graph(model) for model in trace_parts(parts, opset)]


def write_graph(model: ir.Model) -> bytes:
    """Returns a graph as ONNX. Unbound initializers, which ONNX does not know, become inputs."""
    model = model.clone()
    unbound = [value for value in model.graph.initializers.values() if value.const_value is None]
    for value in unbound:
        del model.graph.initializers[str(value.name)]
        model.graph.inputs.append(value)
    model.metadata_props[UNBOUND] = json.dumps([value.name for value in unbound])
    return ir.to_proto(model).SerializeToString()


def read_graph(content: bytes) -> ir.Model:
    """Reverses `write_graph`."""
    model = ir.from_proto(onnx.load_from_string(content))
    inputs = {value.name: value for value in model.graph.inputs}
    for name in json.loads(model.metadata_props.pop(UNBOUND)):
        model.graph.inputs.remove(inputs[name])
        model.graph.initializers[name] = inputs[name]
    return model


def trace_parts(parts: Sequence[Part], opset: int) -> list[ir.Model]:
    """Traces parts; returns a graph for each, with unbound initializers.

    The ONNX optimiser runs on unbound graphs, so it cannot fold the weights of one engine into all.
    """
    if not parts:
        return []
    names = [f"{index}_{spec.name}" for index, part in enumerate(parts) for spec in part.inputs]
    specs = [spec for part in parts for spec in part.inputs]
    # Every axis of every input has a symbol of its own: expressions of few symbols are what makes a trace fast.
    axes = [
        {axis: f"{size}_{number}" for axis, size in enumerate(spec.shape) if isinstance(size, str)}
        for number, spec in enumerate(specs)
    ]
    with quiet_exporter():
        with FakeTensorMode(allow_non_fake_inputs=True):
            modules = [part.build().eval() for part in parts]
            inputs = tuple(tensor for part in parts for tensor in part.example_inputs())
        program = torch.onnx.export(
            _Together(modules, [len(part.inputs) for part in parts]),
            inputs,
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=opset,
            input_names=names,
            dynamic_shapes=(tuple(axes),),
        )
        assert program is not None
        model = program.model
        for value in model.graph.initializers.values():
            value.const_value = None
        onnxscript.optimizer.optimize_ir(model)
        ClearMetadataAndDocStringPass()(model)
    split = []
    first_output = 0
    for index, part in enumerate(parts):
        split.append(_only(model, index, part, first_output))
        first_output += len(part.outputs)
    return split


def _only(model: ir.Model, index: int, part: Part, first_output: int) -> ir.Model:
    """Returns the graph of one part from the graph of all."""
    model = model.clone()
    graph = model.graph
    inputs = {value.name: value for value in graph.inputs}
    outputs = list(graph.outputs)[first_output : first_output + len(part.outputs)]
    graph.inputs.clear()
    graph.outputs.clear()
    graph.inputs.extend(inputs[f"{index}_{spec.name}"] for spec in part.inputs)
    graph.outputs.extend(outputs)
    RemoveUnusedNodesPass()(model)
    for value, spec in zip((*graph.inputs, *graph.outputs), (*part.inputs, *part.outputs), strict=True):
        _declare(value, spec)
    for value in list(graph.initializers.values()):
        value.name = str(value.name).removeprefix(f"parts.{index}.")
    for node in graph:
        for value in node.outputs:
            if value.shape is not None:
                value.shape = ir.Shape([_axis_of(size) for size in value.shape])
    return model


def _axis_of(size: int | ir.SymbolicDim) -> int | str | None:
    """Returns a size in the names of the specs: "past_4 + tokens_1" becomes "past + tokens"."""
    if isinstance(size, int):
        return size
    return None if size.value is None else re.sub(r"\b([a-z_]+)_\d+\b", r"\1", size.value)


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Hides the exporters' notes and warnings; errors are raised as usual."""
    names = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


# ---- putting parts together --------------------------------------------------------------------------


class GraphAssembly:
    """Builds a component's graph out of the graphs of its parts; see `export.components.Assembly`."""

    def __init__(self, component: Component, parts: Mapping[str, ir.Model], opset: int) -> None:
        self._component = component
        self._parts = parts
        self._opset = opset
        self._inputs = {spec.name: _declare(ir.Value(name=spec.name), spec) for spec in component.inputs}
        self._outputs: dict[str, ir.Value] = {}
        self._initializers: dict[str, ir.Value] = {}
        self._nodes: list[ir.Node] = []
        self._sizes: dict[str, ir.Value] = {}
        """Sizes of named axes, `[1]` int64."""
        self._calls = 0

    def input(self, name: str) -> ir.Value:
        """Returns an input of the graph."""
        return self._inputs[name]

    def call(
        self,
        part: str,
        *inputs: ir.Value | None,
        weights: tuple[str, str] = ("", ""),
        axes: Mapping[str, str] = MappingProxyType({}),
    ) -> tuple[ir.Value, ...]:
        """Copies the nodes of a part, but for those that compute zeros; returns the values of its outputs."""
        graph = self._parts[part].graph
        scope = f"{part}_{self._calls}"
        self._calls += 1
        values: dict[ir.Value | None, ir.Value | None] = {None: None}
        values |= dict(zip(graph.inputs, inputs, strict=True))
        zeros = {value for value, given in zip(graph.inputs, inputs, strict=True) if given is None}
        for initializer in graph.initializers.values():
            values[initializer] = self._initializer(initializer, weights)
        for node in graph:
            axis = self._size_of(node, part)
            size = None if axis is None else axes.get(axis, axis)
            if axis is not None and size is not None and size not in self._sizes and node.inputs[0] in zeros:
                self._sizes[size] = self._size_from(axis, graph, inputs)
            if size is not None and size in self._sizes:
                values[node.outputs[0]] = self._sizes[size]
                continue
            if zeros.intersection(node.inputs):
                if node.op_type == "Add":  # the sum is the other operand
                    (values[node.outputs[0]],) = (values[value] for value in node.inputs if value not in zeros)
                elif node.op_type in ZERO_OF_ZERO:
                    zeros.add(node.outputs[0])
                else:
                    raise ValueError(f"{node.op_type} of a tensor of zeros is not known to be zero")
                continue
            outputs = [
                ir.Value(name=f"{scope}/{out.name}", type=out.type, shape=_renamed(out.shape, axes))
                for out in node.outputs
            ]
            values |= dict(zip(node.outputs, outputs, strict=True))
            if size is not None:
                self._sizes[size] = outputs[0]
            self._nodes.append(
                ir.Node(
                    node.domain,
                    node.op_type,
                    [values[value] for value in node.inputs],
                    node.attributes.values(),
                    outputs=outputs,
                    name=f"{scope}/{node.name}",
                )
            )
        return tuple(value for output in graph.outputs if (value := values[output]) is not None)

    def select(self, value: ir.Value, index: int) -> ir.Value:
        """Returns `value[index]`."""
        return self._add("Gather", [value, self._constant(index)], {"axis": 0})

    def stack(self, values: Sequence[ir.Value]) -> ir.Value:
        """Returns the values stacked along a new first axis."""
        axes = self._constant([0])
        return self._add("Concat", [self._add("Unsqueeze", [value, axes]) for value in values], {"axis": 0})

    def split(self, value: ir.Value, count: int, axis: int) -> list[ir.Value]:
        """Returns a value in parts along an axis, whose sizes differ by one at most."""
        if count == 1:
            return [value]
        size = self._add("Shape", [value], {"start": axis, "end": axis + 1}, ir.DataType.INT64)
        bounds = [self._constant([0])]
        for index in range(1, count):
            product = self._add("Mul", [size, self._constant([index])])
            bounds.append(self._add("Div", [product, self._constant([count])]))
        axes = self._constant([axis])
        return [self._add("Slice", [value, *ends, axes]) for ends in pairwise([*bounds, size])]

    def concat(self, values: Sequence[ir.Value], axis: int) -> ir.Value:
        """Returns the values joined along an axis."""
        return values[0] if len(values) == 1 else self._add("Concat", values, {"axis": axis})

    def output(self, name: str, value: ir.Value) -> None:
        """Makes a value an output of the graph."""
        self._outputs[name] = value

    def finish(self) -> ir.Model:
        """Returns the graph."""
        outputs = []
        for spec in self._component.outputs:
            value = _declare(self._outputs[spec.name], spec)
            value.name = spec.name
            outputs.append(value)
        graph = ir.Graph(
            list(self._inputs.values()),
            outputs,
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            opset_imports={"": self._opset},
            name=self._component.name,
        )
        model = ir.Model(graph, ir_version=IR_VERSION, producer_name="latte-flow", producer_version="")
        CommonSubexpressionEliminationPass()(model)  # layers repeat what depends on shapes only
        RemoveUnusedNodesPass()(model)
        return model

    def _size_of(self, node: ir.Node, part: str) -> str | None:
        """Returns the name of the axis whose size a node computes, if it does; all parts can share that value."""
        graph = self._parts[part].graph
        if node.op_type != "Shape" or node.inputs[0] not in graph.inputs:
            return None
        start, end = (node.attributes.get_int(name, -1) for name in ("start", "end"))
        size = node.inputs[0].shape[start] if node.inputs[0].shape is not None and end == start + 1 else None
        return size.value if isinstance(size, ir.SymbolicDim) else None

    def _size_from(self, axis: str, graph: ir.Graph, given: Sequence[ir.Value | None]) -> ir.Value:
        """Returns the size of a part's axis from an input that is given; an input of zeros has no tensor to ask."""
        for declared, value in zip(graph.inputs, given, strict=True):
            shape = [] if value is None or declared.shape is None else [str(size) for size in declared.shape]
            if value is not None and axis in shape:
                index = shape.index(axis)
                node = ir.node("Shape", [value], attributes={"start": index, "end": index + 1})
                node.name, node.outputs[0].name = f"Shape_of_{axis}", f"size_of_{axis}"
                node.outputs[0].dtype, node.outputs[0].shape = ir.DataType.INT64, ir.Shape([1])
                self._nodes.append(node)
                return node.outputs[0]
        raise ValueError(f"only a tensor of zeros has the axis {axis}, so its size is not known")

    def _initializer(self, initializer: ir.Value, weights: tuple[str, str]) -> ir.Value:
        """Returns a weight by its name in the graph, or a copy of a constant."""
        old, new = weights
        name = str(initializer.name)
        constant = initializer.const_value
        if constant is not None:
            return self._constant(constant.numpy())
        name = new + name.removeprefix(old) if name.startswith(old) else name
        if name not in self._initializers:
            self._initializers[name] = ir.Value(name=name, type=initializer.type, shape=initializer.shape)
        return self._initializers[name]

    def _constant(self, value: Any) -> ir.Value:
        """Returns an initializer with a value; equal values share one."""
        array = np.asarray(value)
        name = f"{CONSTANT}{array.dtype}_{'x'.join(map(str, array.shape))}_{array.tobytes().hex()}"
        if name not in self._initializers:
            tensor = ir.tensor(array, name=name)
            self._initializers[name] = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor
            )
        return self._initializers[name]

    def _add(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        attributes: Mapping[str, int] | None = None,
        dtype: ir.DataType | None = None,
    ) -> ir.Value:
        node = ir.node(op_type, inputs, attributes=attributes or {}, name=f"{op_type}_{len(self._nodes)}")
        node.outputs[0].name = f"{node.name}/output"
        node.outputs[0].dtype = dtype or inputs[0].dtype
        self._nodes.append(node)
        return node.outputs[0]


def _renamed(shape: ir.Shape | None, axes: Mapping[str, str]) -> ir.Shape | None:
    """Returns a shape in which some axes have other names."""
    if shape is None or not axes:
        return shape
    return ir.Shape([axes.get(str(size.value), size) if isinstance(size, ir.SymbolicDim) else size for size in shape])


def _declare(value: ir.Value, spec: TensorSpec) -> ir.Value:
    """Gives a value the declared type and shape; returns it."""
    value.shape = ir.Shape(spec.shape)
    value.dtype = DATA_TYPES[spec.dtype]
    return value
