"""INT8 for the CPU: dynamic quantisation of an engine's matrix products, chosen by their effect on accuracy.

A product of activations with a weight becomes `DynamicQuantizeLinear` (activations to 8 bits, with a range found at
run time) and `MatMulInteger` (8-bit weights, with a scale for each output). ONNX Runtime fuses the two.

To choose the products, each one is quantised alone on the tensors of real runs, and the error of the engine's
outputs is measured. Then the products that save most for their error are quantised together, as many as keep the
engine's error within a limit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnx_ir.tape import Tape
from pydantic import BaseModel, ConfigDict, Field

from export.engines import GRAPH_FILE, load_engine, save_engine
from runtime.backends import Backend, open_backend, to_host
from runtime.backends.observed import ObservedBackend, ObservedRun
from runtime.machine import products_saturate
from runtime.manifest import EngineEntry, EngineRole, Manifest, Quantization, file_entry, load_manifest, save_manifest
from runtime.pipeline import LatteFlowPipeline

QUANTIZED_ROLES: tuple[EngineRole, ...] = ("vision_encoder", "vlm", "expert")
"""Engines that spend their time in matrix products. The autoencoder's convolutions are slower in 8 bits."""
PROMPTS = (
    "a small red circle in the center on a white background",
    "a large green star above a small blue square on a grey background",
    "a photo of a cat on a sofa",
    "an oil painting of mountains at dawn, with a lake in front",
)
QUESTION = "describe the image"
STEPS = 16
ANSWER_TOKENS = 4
RUNS = 4
"""Runs of each engine whose tensors are used to measure errors."""
SWITCHES = "switches"


class QuantizationSettings(BaseModel):
    """How far quantisation may go."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_error: float = Field(default=0.05, ge=0, description="largest relative error of an engine's outputs")
    reduce_range: bool | None = Field(default=None, description="7 bits for weights; None: if this CPU needs it")


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


@dataclass(frozen=True)
class Sensitivity:
    """The error of the engine's outputs when one product is quantised alone."""

    name: str
    size: int
    error: float


class RunRecorder(ObservedBackend):
    """A backend that keeps the inputs of the first runs of every engine."""

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self.feeds: dict[str, list[dict[str, np.ndarray]]] = {}

    def observe(self, run: ObservedRun) -> None:
        kept = self.feeds.setdefault(run.entry.name, [])
        if len(kept) < RUNS:
            kept.append({name: to_host(value) for name, value in run.feed.items()})


def record_runs(bundle: Path, prompts: Sequence[str] = PROMPTS) -> dict[str, list[dict[str, np.ndarray]]]:
    """Returns the inputs of a bundle's engines while they draw the prompts and describe two of the images."""
    recorder = RunRecorder(open_backend("cpu"))
    # One engine at a time: a model that is large enough to need INT8 hardly fits into memory in fp32.
    with LatteFlowPipeline(bundle, load_manifest(bundle), recorder, low_memory=True) as pipe:
        images = pipe(list(prompts), num_inference_steps=STEPS, seed=0).images
        pipe.ask(images[:2], [QUESTION] * len(images[:2]), max_new_tokens=ANSWER_TOKENS)
    return recorder.feeds


def quantize_bundle(
    bundle: Path, settings: QuantizationSettings, on_engine: Callable[[str], None] = lambda _: None
) -> Manifest:
    """Quantises the engines of an fp32 bundle in place, and saves its manifest.

    Args:
        on_engine: called with the name of each engine before it is quantised.
    """
    manifest = load_manifest(bundle)
    feeds = record_runs(bundle)
    engines = []
    for entry in manifest.engines:
        if entry.role in QUANTIZED_ROLES:
            on_engine(entry.name)
            entry = quantize_engine(bundle, entry, feeds[entry.name], settings)
        engines.append(entry)
    manifest = manifest.model_copy(update={"precision": "int8", "engines": tuple(engines)})
    save_manifest(manifest, bundle)
    return manifest


def quantize_engine(
    bundle: Path,
    entry: EngineEntry,
    feeds: Sequence[Mapping[str, np.ndarray]],
    settings: QuantizationSettings,
) -> EngineEntry:
    """Replaces an fp32 engine's files with those of its INT8 form; returns its entry.

    Args:
        feeds: inputs of the runs that are used to measure errors.
    """
    reduce_range = products_saturate() if settings.reduce_range is None else settings.reduce_range
    bits = weight_bits(reduce_range)
    folder = bundle / entry.name
    with tempfile.TemporaryDirectory(dir=bundle) as temporary:  # as large as the engine, so not in the system's folder
        measured = _SwitchableEngine(load_engine(folder), Path(temporary), entry, bits, feeds)
        sensitivities = measured.sensitivities()
        chosen, error = measured.choose(sensitivities, settings.max_error)
    rewritten = rewrite_engine(bundle, entry, bundle, chosen, bits)
    return rewritten.model_copy(
        update={
            "quantization": Quantization(
                reduced_range=reduce_range,
                error=error,
                quantized=tuple(s.name for s in sensitivities if s.name in chosen),
                kept=tuple(s.name for s in sensitivities if s.name not in chosen),
            ),
        }
    )


def rewrite_engine(
    bundle: Path, entry: EngineEntry, target: Path, chosen: set[str] | None = None, bits: int = 8
) -> EngineEntry:
    """Writes the INT8 form of an engine into a bundle, the same or another; returns its entry.

    Args:
        chosen: weights of the products to quantise; None for all.
    """
    graph = load_engine(bundle / entry.name)
    quantize_graph(graph, {p.name for p in products_of(graph)} if chosen is None else chosen, bits)
    files = save_engine(graph, target / entry.name)
    entries = tuple(file_entry(target, f"{entry.name}/{file}") for file in files)
    return entry.model_copy(update={"precision": "int8", "files": entries})


def weight_bits(reduce_range: bool) -> int:
    """Returns the number of bits of a quantised weight."""
    return 7 if reduce_range else 8


class _SwitchableEngine:
    """An engine that computes every product both ways, and an input that selects one of the two for each."""

    def __init__(
        self,
        graph: ir.Model,
        folder: Path,
        entry: EngineEntry,
        bits: int,
        feeds: Sequence[Mapping[str, np.ndarray]],
    ) -> None:
        import onnxruntime as ort

        products = list(products_of(graph))
        self._names = [product.name for product in products]
        self._sizes = [product.size for product in products]
        switches = ir.val(SWITCHES, ir.DataType.BOOL, [len(products)])
        graph.graph.inputs.append(switches)
        quantize_graph(graph, set(self._names), bits, switches)
        save_engine(graph, folder)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        self._session = ort.InferenceSession(str(folder / GRAPH_FILE), options, providers=["CPUExecutionProvider"])
        self._outputs = [spec.name for spec in entry.outputs]
        self._feeds = feeds
        self._references = [self._run(feed, set()) for feed in feeds]

    def _run(self, feed: Mapping[str, np.ndarray], quantized: set[str]) -> list[np.ndarray]:
        switches = np.array([name in quantized for name in self._names])
        outputs: list[np.ndarray] = self._session.run(self._outputs, {**feed, SWITCHES: switches})
        return outputs

    def error(self, quantized: set[str]) -> float:
        """Returns the largest relative error of any output in any run."""
        return max(
            float(np.linalg.norm(value - reference)) / max(float(np.linalg.norm(reference)), 1e-12)
            for feed, references in zip(self._feeds, self._references, strict=True)
            for value, reference in zip(self._run(feed, quantized), references, strict=True)
            if reference.size
        )

    def sensitivities(self) -> list[Sensitivity]:
        """Measures every product alone."""
        return [
            Sensitivity(name, size, self.error({name})) for name, size in zip(self._names, self._sizes, strict=True)
        ]

    def choose(self, sensitivities: Sequence[Sensitivity], max_error: float) -> tuple[set[str], float]:
        """Chooses the products that save most for their error; returns them and their error together.

        Errors of products are nearly independent, so their squares add up; that gives the order. How many products
        stay within `max_error` together is measured.
        """
        ranked = sorted(sensitivities, key=lambda s: s.error**2 / s.size)
        low, high, error = 0, len(ranked), 0.0
        while low < high:
            middle = (low + high + 1) // 2
            found = self.error({s.name for s in ranked[:middle]})
            if found <= max_error:
                low, error = middle, found
            else:
                high = middle - 1
        return {s.name for s in ranked[:low]}, error


def products_of(graph: ir.Model) -> Iterator[Product]:
    """Yields every product of activations with a weight, `x Wᵀ` or `x Wᵀ + b`."""
    for node in graph.graph:
        if node.op_type == "MatMul":
            transpose = node.inputs[1].producer() if node.inputs[1] is not None else None
            weight = transpose.inputs[0] if transpose is not None and transpose.op_type == "Transpose" else None
        elif node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1:
            weight = node.inputs[1]
        else:
            continue
        if weight is not None and weight.is_initializer() and weight.shape is not None and len(weight.shape) == 2:
            yield Product(node, weight)


def quantize_graph(model: ir.Model, chosen: set[str], bits: int, switches: ir.Value | None = None) -> None:
    """Replaces the products of these weights with integer products; with `switches`, keeps both and selects one."""
    graph = model.graph
    activations: dict[ir.Value, Sequence[ir.Value]] = {}
    for index, (node, weight) in enumerate([(p.node, p.weight) for p in products_of(model)]):
        if weight.name not in chosen:
            continue
        x, old = node.inputs[0], node.outputs[0]
        assert x is not None
        tape = Tape()
        if x not in activations:  # queries, keys and values are of the same activations
            activations[x] = tape.op_multi_out("DynamicQuantizeLinear", [x], num_outputs=3)
        quantized, scale, zero_point = activations[x]
        levels, scales = _quantized_weight(graph, weight, bits)
        total = tape.op("MatMulInteger", [quantized, levels, zero_point])
        result = tape.op("Mul", [tape.op("Cast", [total], {"to": ir.DataType.FLOAT}), tape.op("Mul", [scale, scales])])
        if node.op_type == "Gemm" and len(node.inputs) > 2:
            result = tape.op("Add", [result, node.inputs[2]])
        if switches is not None:
            number = tape.initializer(ir.tensor(np.array(index)), f"{SWITCHES}.{index}")
            graph.register_initializer(number)
            result = tape.op("Where", [tape.op("Gather", [switches, number]), result, old])
        result.dtype, result.shape = old.dtype, old.shape
        name, old.name = old.name, f"{old.name}.fp32"  # it may be an output, whose name is the engine's
        result.name = name
        ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
        if switches is not None:
            selection = result.producer()
            assert selection is not None
            selection.replace_input_with(2, old)
        graph.insert_after(node, tape.nodes)
    RemoveUnusedNodesPass()(model)


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
