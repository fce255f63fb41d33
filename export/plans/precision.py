"""A check that a network, as TensorRT parsed it, computes in the requested precision.

TensorRT 11 has no precision flags: a strongly typed network computes in the types of its graph, and nothing warns
about a graph that lost a cast. So the types are read back from the network before the build, and from the engine's
inspector after it, if there is a driver. docs/precision.md explains why the parts below stay in fp32.
"""

from __future__ import annotations

import json
from typing import Any

from runtime.manifest import Precision

TRT_TYPES: dict[Precision, str] = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16"}
FLOATING = {"FLOAT", "HALF", "BF16"}
PRODUCTS = {"MATRIX_MULTIPLY", "CONVOLUTION", "DECONVOLUTION"}
"""Layers that take most of the time; they must have the requested precision."""
WIDE = {"SOFTMAX", "REDUCE", "NORMALIZATION"}
"""Layers that must stay in fp32: attention softmax, and the means of the norms."""
WIDE_UNARY = {"EXP", "LOG", "SQRT", "RECIP", "SIN", "COS"}
"""Operations that must stay in fp32: rotary angles, the timestep's sinusoids, and the norms."""
INSPECTOR_TYPES = {"FP32": "FLOAT", "FP16": "HALF", "BF16": "BF16", "Float": "FLOAT", "Half": "HALF"}


def wrong_layers(network: Any, trt: Any, precision: Precision) -> list[str]:
    """Describes each layer that does not have the right type, one line per layer.

    Args:
        network: a strongly typed `INetworkDefinition`.
        trt: its module, `tensorrt` or `tensorrt_rtx`.
    """
    wrong = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        kind = layer.type.name
        tensors = [layer.get_input(i) for i in range(layer.num_inputs)]
        tensors += [layer.get_output(i) for i in range(layer.num_outputs)]
        types = {tensor.dtype.name for tensor in tensors if tensor is not None} & FLOATING
        expected = _expected(layer, kind, trt, precision)
        if expected is not None and types and types != {expected}:
            wrong.append(f"{kind} {layer.name} is {'/'.join(sorted(types))}, not {expected}")
        elif expected is None and types - {"FLOAT", TRT_TYPES[precision]}:
            wrong.append(f"{kind} {layer.name} is {'/'.join(sorted(types))} in an engine of {precision}")
    return wrong


def _expected(layer: Any, kind: str, trt: Any, precision: Precision) -> str | None:
    """Returns the floating type that a layer must have; None if the graph may choose."""
    if kind in PRODUCTS:
        return "FLOAT" if kind == "MATRIX_MULTIPLY" and _is_outer_product(layer) else TRT_TYPES[precision]
    if kind in WIDE:
        return "FLOAT"
    if kind == "UNARY":
        # The bindings return the base class, which does not know its operation.
        layer.__class__ = trt.IUnaryLayer
        return "FLOAT" if layer.op.name in WIDE_UNARY else None
    return None


def _is_outer_product(layer: Any) -> bool:
    """Returns whether a product has only one term, as that of positions and rotary frequencies, always in fp32."""
    return bool(layer.get_input(0).shape[-1] == 1)


def wrong_built_layers(inspected: str, precision: Precision) -> list[str]:
    """Describes each matrix product of a built engine that does not have the right type, from its inspector's JSON."""
    wrong = []
    for layer in json.loads(inspected)["Layers"]:
        kind = str(layer.get("LayerType", "")).lower()
        if not any(word in kind for word in ("gemm", "matrixmultiply", "conv")):
            continue
        formats = [str(tensor.get("Format/Datatype", "")) for tensor in layer.get("Inputs", [])]
        types = {name for text in formats for word, name in INSPECTOR_TYPES.items() if word in text}
        if types and TRT_TYPES[precision] not in types:
            wrong.append(f"{layer['LayerType']} {layer['Name']} is {'/'.join(sorted(types))}")
    return wrong
