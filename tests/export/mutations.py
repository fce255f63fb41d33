"""Small corruptions of a bundle, each of which a verification must find.

Run as a program, it prints which row of the verification finds each of them first, as a table for
docs/verification.md: `python -m tests.export.mutations`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file

from export.benchmarks.report import describe_machine
from export.bundle import export_bundle
from export.reference import Reference
from export.verify import verified_rows
from runtime.errors import LatteFlowError
from runtime.files import write_text
from runtime.manifest import Manifest, Precision, file_entry, save_manifest

FP16, BF16 = TensorProto.FLOAT16, TensorProto.BFLOAT16
Mutate = Callable[[Path], None]
ArrayEdit = Callable[[np.ndarray], np.ndarray]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16", "int8", "fp8")
OF_8_BITS: tuple[Precision, ...] = ("int8", "fp8")


@dataclass(frozen=True)
class Mutation:
    """One corruption."""

    name: str
    apply: Mutate
    harmless: Mapping[Precision, str] = field(default_factory=dict)
    """Why it cannot matter, for the precisions where it cannot."""
    only: tuple[Precision, ...] = PRECISIONS
    """The precisions that have what it changes."""


def sign(bundle: Path) -> None:
    """Makes the manifest agree with the files, as if the export had written them so."""
    manifest = load_unchecked(bundle)
    engines = [
        entry.model_copy(update={"files": tuple(file_entry(bundle, file.path) for file in entry.files)})
        for entry in manifest.engines
    ]
    files = tuple(file_entry(bundle, file.path) for file in manifest.tokenizer_files)
    save_manifest(manifest.model_copy(update={"engines": tuple(engines), "tokenizer_files": files}), bundle)


def load_unchecked(bundle: Path) -> Manifest:
    """Reads a manifest whose files may have changed."""
    return Manifest.model_validate_json((bundle / "manifest.json").read_text(encoding="utf-8"))


# ---- what a mutation changes -----------------------------------------------------------------------------


def weight(engine: str, name: str, edit: ArrayEdit) -> Mutate:
    """Changes the tensors of an engine whose name contains `name`; a quantised matrix keeps its scales."""

    def apply(bundle: Path) -> None:
        graph_file, weights_file = (bundle / engine / file for file in ("model.onnx", "weights.safetensors"))
        model, tensors = onnx.load(graph_file, load_external_data=False), load_arrays(weights_file)
        found = {tensor.name: tensor for tensor in model.graph.initializer if name in tensor.name}
        chosen = next(key for key in sorted(found) if not key.endswith(".scales") and not key.startswith("constant_"))
        inline = chosen not in tensors
        before = numpy_helper.to_array(found[chosen]) if inline else tensors[chosen]
        after = np.ascontiguousarray(edit(before).astype(before.dtype))
        assert not np.array_equal(after, before), f"{engine} {name} did not change"
        if inline:  # small tensors are in the graph
            found[chosen].CopyFrom(numpy_helper.from_array(after, chosen))
            onnx.save(model, graph_file)
        else:
            save_arrays(tensors | {chosen: after}, weights_file)

    return apply


NARROW = {torch.bfloat16: ml_dtypes.bfloat16, torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn}
"""Types that NumPy itself does not have."""


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Reads a safetensors file; safetensors' own reader for NumPy does not know float8."""
    return {
        name: tensor.view(BITS[tensor.dtype.itemsize]).numpy().view(NARROW[tensor.dtype])
        if tensor.dtype in NARROW
        else tensor.numpy()
        for name, tensor in load_file(path).items()
    }


def save_arrays(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    """Writes what `load_arrays` reads."""
    types = {np.dtype(narrow): wide for wide, narrow in NARROW.items()}
    tensors = {
        name: torch.from_numpy(array.view(f"uint{8 * array.itemsize}")).view(types[array.dtype])
        if array.dtype in types
        else torch.from_numpy(array)
        for name, array in arrays.items()
    }
    save_file(tensors, path)


BITS = {1: torch.uint8, 2: torch.uint16}


def graph(engine: str, edit: Callable[[onnx.ModelProto], None]) -> Mutate:
    """Changes the graph of an engine."""

    def apply(bundle: Path) -> None:
        path = bundle / engine / "model.onnx"
        model = onnx.load(path, load_external_data=False)
        edit(model)
        onnx.save(model, path)

    return apply


def on_input(engine: str, name: str, operations: Sequence[tuple[str, Any]]) -> Mutate:
    """Puts operations between an input of an engine and everything that reads it."""

    def edit(model: onnx.ModelProto) -> None:
        dtype = next(value for value in model.graph.input if value.name == name).type.tensor_type.elem_type
        end = f"{name}/mutated"
        nodes = chain(model, name, end, operations, dtype)
        for node in model.graph.node:
            for index, source in enumerate(node.input):
                if source == name:
                    node.input[index] = end
        for position, node in enumerate(nodes):
            model.graph.node.insert(position, node)

    return graph(engine, edit)


def on_output(engine: str, name: str, operations: Sequence[tuple[str, Any]]) -> Mutate:
    """Puts operations before an output of an engine."""

    def edit(model: onnx.ModelProto) -> None:
        dtype = next(value for value in model.graph.output if value.name == name).type.tensor_type.elem_type
        start = f"{name}/right"
        for node in model.graph.node:
            for names in (node.input, node.output):
                for index, other in enumerate(names):
                    if other == name:
                        names[index] = start
        model.graph.node.extend(chain(model, start, name, operations, dtype))

    return graph(engine, edit)


def chain(
    model: onnx.ModelProto, start: str, end: str, operations: Sequence[tuple[str, Any]], dtype: int
) -> list[onnx.NodeProto]:
    """Returns nodes from one value to another.

    Args:
        operations: ("Mul" or "Add", number), ("Gather", (axis, indices)), ("Cast", dtype), or ("Not", None) …
    """
    nodes = []
    for index, (kind, argument) in enumerate(operations):
        target = end if index + 1 == len(operations) else f"{end}/{index}"
        inputs, attributes = [start], {}
        if kind == "Gather":
            axis, indices = argument
            inputs.append(constant(model, f"constant_{target}/indices", np.array(indices, np.int64)))
            attributes = {"axis": axis}
        elif kind == "Cast":
            attributes = {"to": argument or dtype}
        elif kind == "Or":  # with its own opposite: all true
            nodes.append(helper.make_node("Not", [start], [f"{target}/not"]))
            inputs.append(f"{target}/not")
        elif argument is not None:
            value = np.array(argument, helper.tensor_dtype_to_np_dtype(dtype))
            inputs.append(constant(model, f"constant_{target}", value))
        nodes.append(helper.make_node(kind, inputs, [target], **attributes))
        start = target
    return nodes


def constant(model: onnx.ModelProto, name: str, value: np.ndarray) -> str:
    """Adds an initializer; returns its name."""
    model.graph.initializer.append(numpy_helper.from_array(value, name))
    return name


def number(engine: str, before: float, after: float) -> Mutate:
    """Changes a constant of an engine's graph."""

    def edit(model: onnx.ModelProto) -> None:
        changed = 0
        for tensor in model.graph.initializer:
            inline = tensor.data_location != TensorProto.EXTERNAL
            if inline and not tensor.dims and tensor.data_type in (TensorProto.FLOAT, FP16, BF16):
                value = numpy_helper.to_array(tensor)
                if np.isclose(value, before, rtol=4e-3, atol=0):
                    tensor.CopyFrom(numpy_helper.from_array(np.array(after, value.dtype), tensor.name))
                    changed += 1
        assert changed, f"{engine} has no constant {before}"

    return graph(engine, edit)


def rewired(engine: str, kind: str, which: int, edit: Callable[[onnx.NodeProto], None]) -> Mutate:
    """Changes the `which`-th node of a kind."""

    def change(model: onnx.ModelProto) -> None:
        edit([node for node in model.graph.node if node.op_type == kind][which])

    return graph(engine, change)


def text(name: str, before: str, after: str) -> Mutate:
    """Changes a text of a tokenizer or processor file."""

    def apply(bundle: Path) -> None:
        content = (bundle / name).read_text(encoding="utf-8")
        assert before in content, f"{name} does not contain {before!r}"
        write_text(bundle / name, content.replace(before, after))

    return apply


def document(name: str, edit: Callable[[Any], None]) -> Mutate:
    """Changes a JSON file, which may be the manifest."""

    def apply(bundle: Path) -> None:
        content = json.loads((bundle / name).read_text(encoding="utf-8"))
        before = json.dumps(content)
        edit(content)
        assert json.dumps(content) != before, f"{name} did not change"
        write_text(bundle / name, json.dumps(content))

    return apply


def swapped(first: str, second: str) -> Mutate:
    """Exchanges the files of two engines."""

    def apply(bundle: Path) -> None:
        for file in ("model.onnx", "weights.safetensors"):
            a, b, aside = bundle / first / file, bundle / second / file, bundle / "aside"
            a.rename(aside)
            b.rename(a)
            aside.rename(b)

    return apply


def roll(array: np.ndarray) -> np.ndarray:
    """Moves each row by one."""
    return np.roll(array, 1, axis=0)


def zero(array: np.ndarray) -> np.ndarray:
    return np.zeros_like(array)


def scaled(factor: float) -> ArrayEdit:
    return lambda array: array * factor


def exchange_words(tokenizer: Any) -> None:
    """Exchanges the ids of two words."""
    vocabulary = tokenizer["model"]["vocab"]
    first, second = sorted(vocabulary, key=len)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


def other_precision(manifest: Any) -> None:
    """Gives the bundle the precision with the largest tolerances, or with the fewest rungs."""
    manifest["precision"] = "int8" if manifest["precision"] == "bf16" else "bf16"


def coarser_activations(model: onnx.ModelProto) -> None:
    """Dequantises activations with another scale than they were quantised with."""
    quantized = {node.output[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    chosen = [node for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in quantized]
    for node in chosen:
        scale = next(value for value in model.graph.initializer if value.name == node.input[1])
        other = (1.03 * numpy_helper.to_array(scale)).astype(numpy_helper.to_array(scale).dtype)
        node.input[1] = constant(model, f"constant_{node.output[0]}", other)
    assert chosen


def one_range(model: onnx.ModelProto) -> None:
    """Divides activations by the largest magnitude of the whole tensor, not of each row."""
    chosen = [node for node in model.graph.node if node.op_type == "ReduceMax"]
    for node in chosen:
        del node.input[1]
    assert chosen


def become(kind: str) -> Callable[[onnx.NodeProto], None]:
    """Replaces an operator by one with the same inputs."""

    def change(node: onnx.NodeProto) -> None:
        node.op_type = kind

    return change


def other_range(manifest: Any) -> None:
    """Gives an engine's weights the other number of bits."""
    quantization = next(engine["quantization"] for engine in manifest["engines"] if engine["name"] == "expert_0")
    quantization["reduced_range"] = not quantization["reduced_range"]


def fewer_products(manifest: Any) -> None:
    """Calls a quantised product one that was kept."""
    quantization = next(engine["quantization"] for engine in manifest["engines"] if engine["name"] == "vlm")
    quantization["kept"].append(quantization["quantized"].pop())


def swap_inputs(node: onnx.NodeProto) -> None:
    """Exchanges the first two inputs."""
    node.input[0], node.input[1] = node.input[1], node.input[0]


FP16_ALREADY = "they are fp16 already"
ROUNDING = "smaller than what the precision itself rounds"

MUTATIONS = (
    # weights
    Mutation(
        "the rows of an expert's query projection are one off", weight("expert_0", "layers.0.q_proj.weight", roll)
    ),
    Mutation("an expert's key bias is missing", weight("expert_0", "layers.0.k_proj.bias", zero)),
    Mutation("an expert's value bias is missing", weight("expert_1", "layers.0.v_proj.bias", zero)),
    Mutation("an attention gate is closed", weight("expert_1", "attention_gate.weight", zero)),
    Mutation("a table of scales is zero", weight("expert_0", "layers.1.scale_shift_table", zero)),
    Mutation("an expert's last norm is a fifth too large", weight("expert_1", "heads.0.norm.weight", scaled(1.2))),
    Mutation("the time embedding's bias is missing", weight("expert_0", "time_embed.in_proj.bias", zero)),
    Mutation("the velocity head's bias is missing", weight("expert_0", "heads.0.proj.bias", zero)),
    Mutation("rotary frequencies of the latents are 5 % off", weight("expert_0", "rotary_frequencies", scaled(1.05))),
    Mutation("rotary frequencies of the VLM are 5 % off", weight("vlm", "inv_freq", scaled(1.05))),
    Mutation("the token embeddings are one row off", weight("vlm", "embed_tokens", roll)),
    Mutation("a norm of the VLM is a fifth too large", weight("vlm", "layers.2.input_layernorm", scaled(1.2))),
    Mutation("the vision tower's patch embedding is one row off", weight("vision_encoder", "patch_embed", roll)),
    Mutation("the latents' standard deviations are 5 % off", weight("vae_decoder", "latents_std", scaled(1.05))),
    # wiring
    Mutation("two experts are exchanged", swapped("expert_0", "expert_1")),
    Mutation("an expert sees the padding of prompts", on_input("expert_1", "prefix_mask", [("Or", None)])),
    Mutation("an expert takes values for keys", on_input("expert_0", "prefix_kv", [("Gather", (1, [1, 0]))])),
    Mutation(
        "an expert's layers take each other's prefix", on_input("expert_0", "prefix_kv", [("Gather", (0, [1, 0]))])
    ),
    Mutation("an expert's time is 2 % late", on_input("expert_1", "timestep", [("Add", 0.02)])),
    Mutation("the VLM's values are halved", on_output("vlm", "kv_1", [("Mul", 0.5)])),
    Mutation("the VLM's keys and values are exchanged", on_output("vlm", "kv_0", [("Gather", (1, [1, 0]))])),
    Mutation("the VLM forgets what it wrote", on_input("vlm", "past_kv_1", [("Mul", 0.0)])),
    Mutation("the VLM sees the padding", on_input("vlm", "attention_mask", [("Or", None)])),
    Mutation("the VLM has no positions", on_input("vlm", "position_ids", [("Mul", 0)])),
    Mutation("the VLM takes columns for rows", on_input("vlm", "position_ids", [("Gather", (0, [0, 2, 1]))])),
    Mutation("the VLM's positions end at 127", on_input("vlm", "position_ids", [("Min", 127)])),
    Mutation("the VLM looks ahead", rewired("vlm", "LessOrEqual", 0, swap_inputs)),
    Mutation("images see each other", on_input("vision_encoder", "image_ids", [("Mul", 0)])),
    Mutation("the fifth image and the sixth see each other", on_input("vision_encoder", "image_ids", [("Min", 4)])),
    Mutation("the vision tower's positions end at 31", on_input("vision_encoder", "position_ids", [("Min", 31)])),
    Mutation(
        "the vision tower takes columns for rows", on_input("vision_encoder", "position_ids", [("Gather", (2, [1, 0]))])
    ),
    Mutation("image embeddings are negated", on_output("vision_encoder", "image_embeds", [("Neg", None)])),
    Mutation(
        "red and blue are exchanged",
        on_output("vae_decoder", "image", [("Cast", TensorProto.INT32), ("Gather", (3, [2, 1, 0])), ("Cast", None)]),
    ),
    Mutation("the decoder rounds down", rewired("vae_decoder", "Round", 0, become("Floor"))),
    Mutation("an epsilon of the norms is 0.01", number("expert_0", 1e-5, 1e-2)),
    Mutation("attention scores are not scaled", number("expert_1", 8**-0.5, 1.0)),
    # schedule and guidance
    Mutation("guidance is a tenth too weak", on_input("solver_step", "guidance_scale", [("Mul", 0.9)])),
    Mutation("guidance is at most 5", on_input("solver_step", "guidance_scale", [("Min", 5.0)])),
    Mutation("guidance is at least 1", on_input("solver_step", "guidance_scale", [("Max", 1.0)])),
    Mutation("the likeliest token is the next one", on_output("vlm", "best_token", [("Add", 1)])),
    Mutation("guidance has no unconditional row", on_input("solver_step", "unconditional_row", [("Mul", 0)])),
    Mutation("steps are 1 % too short", on_input("solver_step", "step_size", [("Mul", 0.99)])),
    Mutation("steps go backwards", on_input("solver_step", "velocity", [("Neg", None)])),
    Mutation("rows get the first image's latents", on_input("solver_step", "row_of", [("Mul", 0)])),
    Mutation(
        "the boundaries are others",
        document("manifest.json", lambda m: m["schedule"].update(boundaries=[0.0, 0.4, 1.0])),
    ),
    # dtypes
    Mutation(
        "time goes through fp16",
        on_input("expert_1", "timestep", [("Cast", FP16), ("Cast", None)]),
        {"fp16": ROUNDING, "fp8": ROUNDING},
    ),
    Mutation(
        "time goes through bf16", on_input("expert_1", "timestep", [("Cast", BF16), ("Cast", None)]), {"bf16": ROUNDING}
    ),
    Mutation(
        "the VLM's keys and values go through fp16",
        on_output("vlm", "kv_0", [("Cast", FP16), ("Cast", None)]),
        {"fp16": FP16_ALREADY, "fp8": FP16_ALREADY},
    ),
    Mutation(
        "latents go through fp16 in the solver", on_input("solver_step", "velocity", [("Cast", FP16), ("Cast", None)])
    ),
    # tokenizer, processor, configs
    Mutation(
        "the image mean is that of other models",
        document("preprocessor_config.json", lambda c: c.update(image_mean=[0.5, 0.5, 0.5])),
    ),
    Mutation(
        "images may be smaller", document("preprocessor_config.json", lambda c: c["size"].update(shortest_edge=256))
    ),
    Mutation(
        "images are scaled by the nearest pixel", document("preprocessor_config.json", lambda c: c.update(resample=0))
    ),
    Mutation(
        "the chat template has another system prompt",
        text("chat_template.jinja", "You are a helpful assistant.", "You are an assistant."),
    ),
    Mutation(
        "the chat template forgets the assistant's turn", text("chat_template.jinja", "<|im_start|>assistant", "")
    ),
    Mutation("the chat template drops the system's role", text("chat_template.jinja", "message['role']", "'user'")),
    Mutation(
        "the tokenizer lacks its last merges",
        document("tokenizer.json", lambda t: t["model"].update(merges=t["model"]["merges"][:-200])),
    ),
    Mutation(
        "the tokenizer strips spaces",
        document(
            "tokenizer.json", lambda t: t.update(normalizer={"type": "Strip", "strip_left": True, "strip_right": True})
        ),
    ),
    Mutation("two words have each other's tokens", document("tokenizer.json", exchange_words)),
    Mutation(
        "large images are made smaller",
        document("preprocessor_config.json", lambda c: c["size"].update(longest_edge=c["size"]["longest_edge"] // 4)),
    ),
    Mutation("the manifest gives another precision", document("manifest.json", other_precision)),
    Mutation("activations come back with another scale", graph("expert_0", coarser_activations), only=OF_8_BITS),
    Mutation("activations have one range", graph("expert_0", one_range), only=("int8",)),
    Mutation("weights have another number of bits", document("manifest.json", other_range), only=("int8",)),
    Mutation("fewer products are quantised", document("manifest.json", fewer_products), only=OF_8_BITS),
    Mutation("the checkpoint is another", document("manifest.json", lambda m: m.update(checkpoint_sha256="0" * 64))),
    Mutation(
        "another token ends an answer",
        document("manifest.json", lambda m: m["understanding"].update(eos_token_ids=[5])),
    ),
    Mutation(
        "another token stands for images",
        document("manifest.json", lambda m: m["understanding"].update(image_token_id=4)),
    ),
    Mutation("padding is another token", document("manifest.json", lambda m: m["prompt"].update(pad_token_id=7))),
    Mutation("prompts may be longer", document("manifest.json", lambda m: m["prompt"].update(max_tokens=96))),
    Mutation(
        "a special token is allowed in prompts",
        document("manifest.json", lambda m: m["prompt"].update(special_tokens=m["prompt"]["special_tokens"][1:])),
    ),
)


def found_by(bundle: Path, mutation: Mutation, reference: Reference, scratch: Path) -> str | None:
    """Applies a mutation to a copy of a bundle; returns what finds it first, or None if nothing does."""
    copy = Path(shutil.copytree(bundle, scratch / "bundle"))
    try:
        mutation.apply(copy)
        sign(copy)
        for row in verified_rows(copy, reference):
            if not row.passed:
                value = "" if row.value is None or row.metric == "differences" else f": {row.value:.2g}"
                return f"{row.rung}: {row.what.split(',')[0]}{value}"
    except LatteFlowError:
        return "refused"
    finally:
        shutil.rmtree(copy)
    return None


def main() -> None:
    """Prints the table for the tiny model of the tests."""
    from tests.tiny import save_tiny

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        save_tiny(place / "tiny")
        reference = Reference.from_pretrained(place / "tiny")
        for precision in PRECISIONS:
            export_bundle(place / "tiny", place / precision, precision=precision, verify=False)
        print(", ".join(f"{name} {value}" for name, value in describe_machine().items()))
        print(f"| Corruption | {PRECISIONS[0]} | {', '.join(PRECISIONS[1:])} |\n| --- | --- | --- |")
        for mutation in MUTATIONS:
            first, *others = (
                "has none"
                if precision not in mutation.only
                else found_by(place / precision, mutation, reference, place)
                or f"not found: {mutation.harmless.get(precision, 'A DEFECT')}"
                for precision in PRECISIONS
            )
            rest = dict.fromkeys(others)
            print(f"| {mutation.name} | {first} | {'; '.join(rest)} |", flush=True)


if __name__ == "__main__":
    main()
