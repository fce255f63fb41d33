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

from export.engines import GRAPH_FILE, load_engine, save_engine
from export.float8_products import OPSET, Float8Form
from export.products import products_of, replace_products
from export.quantization import (
    QUANTIZED_ROLES,
    TO_CHOOSE,
    TO_REPORT,
    Feed,
    QuantizationSettings,
    SwitchableEngine,
    record_runs,
)
from runtime.manifest import EngineEntry, Manifest, file_entry, load_manifest, save_manifest


def quantize_to_float8(
    bundle: Path, fp32: Path, settings: QuantizationSettings, on_engine: Callable[[str], None] = lambda _: None
) -> Manifest:
    """Quantises the engines of an fp16 bundle in place, and saves its manifest.

    Args:
        fp32: a bundle of the same checkpoint in fp32.
        on_engine: called with the name of each engine before it is quantised.
    """
    manifest, wide = load_manifest(bundle), load_manifest(fp32)
    seen, unseen = (record_runs(fp32, calibration) for calibration in (TO_CHOOSE, TO_REPORT))
    engines = []
    for entry in manifest.engines:
        if entry.role in QUANTIZED_ROLES:
            on_engine(entry.name)
            name = entry.name
            entry = _quantized(bundle, entry, fp32, wide.engine(name), seen[name], unseen[name], settings)
        engines.append(entry)
    manifest = manifest.model_copy(update={"precision": "fp8", "engines": tuple(engines)})
    save_manifest(manifest, bundle)
    return manifest


def _quantized(
    bundle: Path,
    entry: EngineEntry,
    fp32: Path,
    wide: EngineEntry,
    seen: Sequence[Feed],
    unseen: Sequence[Feed],
    settings: QuantizationSettings,
) -> EngineEntry:
    """Replaces an fp16 engine's files with those of its FP8 form; returns its entry."""
    magnitudes = largest_activations(fp32 / wide.name, seen)
    with tempfile.TemporaryDirectory(dir=fp32) as temporary:
        engine = SwitchableEngine(fp32, wide, Path(temporary), Float8Form(magnitudes), OPSET)
        chosen = engine.choose(seen, settings.max_error)
        error = engine.error(unseen, chosen, engine.references(unseen))
    graph = load_engine(bundle / entry.name)
    replace_products(graph, chosen, Float8Form(magnitudes))
    graph.opset_imports[""] = opset = max(OPSET, graph.opset_imports[""])
    files = save_engine(graph, bundle / entry.name)
    return entry.model_copy(
        update={
            "precision": "fp8",
            "opset": opset,
            "files": tuple(file_entry(bundle, f"{entry.name}/{file}") for file in files),
            "quantization": engine.described(chosen, error),
        }
    )


def largest_activations(engine: Path, feeds: Sequence[Feed]) -> dict[str, float]:
    """Returns the largest magnitude of each product's activations in runs of an fp32 engine, by the weight's name.

    Args:
        engine: the engine's folder.
    """
    import onnxruntime as ort

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
        options = ort.SessionOptions()
        options.log_severity_level = 3
        path = str(Path(temporary) / GRAPH_FILE)
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        runs = [session.run(list(names.values()), dict(feed)) for feed in feeds]
    return dict(zip(names, (float(value) for value in np.max(np.array(runs, np.float64), axis=0)), strict=True))
