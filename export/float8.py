"""FP8 for NVIDIA GPUs: the matrix products of half-precision engines in 8 bits, chosen as those of INT8 are.

The choice, and the largest magnitudes of activations, are made on the fp32 engines of the same checkpoint, which run on
the CPU; then the fp16 engines are rewritten. See `export.quantization` for what counts, and `export.float8_products`
for the arithmetic.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from export.engines import load_engine, save_engine
from export.float8_products import Float8Form
from export.products import products_of
from export.quantization import (
    Feed,
    QuantizationSettings,
    choose_products,
    quantize_engines,
    quiet_session,
    rewrite_in_form,
)
from runtime.manifest import EngineEntry, Manifest, load_manifest


def quantize_to_float8(
    bundle: Path, fp32: Path, settings: QuantizationSettings, on_engine: Callable[[str], None] = lambda _: None
) -> Manifest:
    """Quantises the engines of an fp16 bundle in place, and saves its manifest.

    Args:
        fp32: a bundle of the same checkpoint in fp32.
        on_engine: called with the name of each engine before it is quantised.
    """
    wide = load_manifest(fp32)

    def quantize(entry: EngineEntry, seen: Sequence[Feed], unseen: Sequence[Feed]) -> EngineEntry:
        magnitudes = largest_activations(fp32 / entry.name, seen)
        form = Float8Form(magnitudes)
        chosen = choose_products(fp32, wide.engine(entry.name), form, seen, unseen, settings.max_error)
        form = Float8Form(magnitudes)  # a form is for one graph
        rewritten = rewrite_in_form(bundle, entry, bundle, form, "fp8", set(chosen.quantized))
        return rewritten.model_copy(update={"quantization": chosen})

    return quantize_engines(bundle, fp32, "fp8", quantize, on_engine)


def largest_activations(engine: Path, feeds: Sequence[Feed]) -> dict[str, float]:
    """Returns the largest magnitude of each product's activations in runs of an fp32 engine, by the weight's name.

    Args:
        engine: the engine's folder.
    """
    graph = load_engine(engine)
    names: dict[str, str] = {}
    for product in products_of(graph):
        x = product.node.inputs[0]
        assert x is not None
        magnitude = ir.node("Abs", [x])
        largest = ir.node("ReduceMax", magnitude.outputs, {"keepdims": 0})
        (output,) = largest.outputs
        output.name = names[product.name] = f"largest.{product.name}"
        output.dtype, output.shape = ir.DataType.FLOAT, ir.Shape([])
        graph.graph.insert_before(product.node, [magnitude, largest])
        graph.graph.outputs.append(output)
    with tempfile.TemporaryDirectory(dir=engine.parent) as temporary:
        save_engine(graph, Path(temporary))
        session = quiet_session(Path(temporary))
        runs = [session.run(list(names.values()), dict(feed)) for feed in feeds]
    return dict(zip(names, (float(value) for value in np.max(np.array(runs, np.float64), axis=0)), strict=True))
