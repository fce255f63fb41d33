"""A check that a network, as TensorRT parsed it, computes in the requested precision.

TensorRT 11 has no precision flags: a strongly typed network computes in the types of its graph, and nothing warns
about a graph that lost a cast. So the types are read back from the network before the build, and from the engine's
inspector after it, if there is a driver. docs/precision.md explains why the parts below stay in fp32.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Any

from runtime.manifest import Precision

TRT_TYPES: dict[Precision, str] = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16", "fp8": "HALF"}
FLOATING = {"FLOAT", "HALF", "BF16"}
PRODUCTS = {"MATRIX_MULTIPLY", "CONVOLUTION", "DECONVOLUTION"}
"""Layers that take most of the time; they must have the requested precision, except for scores of attention."""
ON_THE_WAY = {"CAST", "CONCATENATION", "ELEMENTWISE", "IDENTITY", "SELECT", "SHUFFLE", "SLICE"}
"""Layers between a product of queries and keys and the softmax: scale, mask, sum, change of shape."""
READS_SIZES = {"SHAPE"}
"""Layers that do not read the values of their input."""
WIDE = {"SOFTMAX", "REDUCE", "NORMALIZATION"}
"""Layers that must stay in fp32: attention softmax, and the means of the norms."""
WIDE_UNARY = {"EXP", "LOG", "SQRT", "RECIP", "SIN", "COS"}
"""Operations that must stay in fp32: rotary angles, the timestep's sinusoids, and the norms."""
INSPECTOR_TYPES = {
    "FP32": "FLOAT",
    "Float": "FLOAT",
    "FP16": "HALF",
    "Half": "HALF",
    "BF16": "BF16",
    "BFloat16": "BF16",
    "INT8": "INT8",
    "Int8": "INT8",
    "FP8": "FP8",
}
"""The inspector's words for types: whole words, since "BFloat16" is no "Float"."""
INSPECTOR_FIELDS = ("DataType", "Datatype", "Format/Datatype")
"""Where the inspector writes a tensor's type: TensorRT 11 has a field for it, 10 one for type and format together."""


def wrong_layers(network: Any, trt: Any, precision: Precision) -> list[str]:
    """Describes each layer that does not have the right type, one line per layer.

    Args:
        network: a strongly typed `INetworkDefinition`.
        trt: its module, `tensorrt` or `tensorrt_rtx`.
    """
    wrong = []
    scores = score_layers(network)
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        kind = layer.type.name
        types = {tensor.dtype.name for tensor in (*_inputs(layer), *_outputs(layer))} & FLOATING
        expected = _expected(layer, kind, trt, precision, scores)
        if expected is not None and types and types != {expected}:
            wrong.append(f"{kind} {layer.name} is {'/'.join(sorted(types))}, not {expected}")
        elif expected is None and types - {"FLOAT", TRT_TYPES[precision]}:
            wrong.append(f"{kind} {layer.name} is {'/'.join(sorted(types))} in an engine of {precision}")
    return wrong


def score_layers(network: Any) -> set[str]:
    """Returns the names of the products whose result is the scores of an attention.

    Scores go to a softmax through layers of `ON_THE_WAY` only, and nowhere else. Casts are among those, so that scores
    in half precision are recognised, and refused, although they are cast before the softmax.
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    readers: dict[str, list[int]] = {}
    for index, layer in enumerate(layers):
        for tensor in _inputs(layer):
            readers.setdefault(tensor.name, []).append(index)

    def leads_on(index: int) -> bool:
        kind = layers[index].type.name
        return kind == "SOFTMAX" or (kind in ON_THE_WAY and leads[index])

    # Whether the results of a layer become scores of a softmax. A layer reads only what earlier layers wrote.
    leads: dict[int, bool] = {}
    for index, layer in reversed(list(enumerate(layers))):
        written = [tensor.name for tensor in _outputs(layer) if tensor.dtype.name in FLOATING]
        after = [reader for name in written for reader in readers.get(name, [])]
        after = [reader for reader in after if layers[reader].type.name not in READS_SIZES]
        leads[index] = bool(after) and all(leads_on(reader) for reader in after)
    return {layer.name for index, layer in enumerate(layers) if layer.type.name == "MATRIX_MULTIPLY" and leads[index]}


def float8_products(network: Any) -> int:
    """Counts the products of numbers in FP8: those of which both sides are dequantised from it.

    The parser gives a weight as many axes as the activations have, by a change of shape after it is dequantised.
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    dequantised: set[str] = set()
    for layer in layers:  # each reads only what earlier ones wrote
        kind = layer.type.name
        is_first = kind == "DEQUANTIZE" and layer.get_input(0).dtype.name == "FP8"
        if is_first or (kind == "SHUFFLE" and layer.get_input(0).name in dequantised):
            dequantised |= {tensor.name for tensor in _outputs(layer)}
    products = [layer for layer in layers if layer.type.name == "MATRIX_MULTIPLY"]
    return sum(all(tensor.name in dequantised for tensor in _inputs(layer)) for layer in products)


def _expected(layer: Any, kind: str, trt: Any, precision: Precision, scores: AbstractSet[str]) -> str | None:
    """Returns the floating type that a layer must have; None if the graph may choose."""
    if kind in PRODUCTS:
        return "FLOAT" if layer.name in scores else TRT_TYPES[precision]
    if kind in WIDE:
        return "FLOAT"
    if kind == "UNARY":
        # The bindings return the base class, which does not know its operation.
        layer.__class__ = trt.IUnaryLayer
        return "FLOAT" if layer.op.name in WIDE_UNARY else None
    return None


def _inputs(layer: Any) -> list[Any]:
    return [tensor for i in range(layer.num_inputs) if (tensor := layer.get_input(i)) is not None]


def _outputs(layer: Any) -> list[Any]:
    return [tensor for i in range(layer.num_outputs) if (tensor := layer.get_output(i)) is not None]


def wrong_built_layers(inspected: str, precision: Precision, scores: AbstractSet[str]) -> list[str]:
    """Describes each matrix product of a built engine that does not have the right type, from its inspector's JSON.

    An inspector that says no type at all proves nothing, and is described as such.

    Args:
        scores: names of the network's products that must be fp32, see `score_layers`. The inspector writes the names
            of the network's layers into the name or the metadata of the layers that it made of them.
    """
    # Without the verbosity DETAILED a layer is no more than its name.
    layers = [layer for layer in json.loads(inspected)["Layers"] if isinstance(layer, dict)]
    if not any(_inspected_types(layer, side) for layer in layers for side in ("Inputs", "Outputs")):
        return ["of all: the inspector of this TensorRT says no types that are known"]
    wrong = []
    for layer in layers:
        kind = str(layer.get("LayerType", "")).lower()
        if not any(word in kind for word in ("gemm", "matrixmultiply", "conv")):
            continue
        types = _inspected_types(layer, "Inputs")
        origin = re.split(r"[^\w./]+", f"{layer.get('Name', '')} {layer.get('Metadata', '')}")
        if types == {"FLOAT"} and not scores.isdisjoint(origin):
            continue
        if TRT_TYPES[precision] not in types and not (precision == "fp8" and "FP8" in types):
            wrong.append(f"{layer['LayerType']} {layer['Name']} is {'/'.join(sorted(types)) or 'of no known type'}")
    return wrong


def _inspected_types(layer: Mapping[str, Any], side: str) -> set[str]:
    """Returns the types of a layer's "Inputs" or "Outputs", as far as the inspector says them."""
    texts = [str(tensor.get(field, "")) for tensor in layer.get(side, ()) for field in INSPECTOR_FIELDS]
    words = {word for text in texts for word in re.findall(r"\w+", text)}
    return {name for word, name in INSPECTOR_TYPES.items() if word in words}
