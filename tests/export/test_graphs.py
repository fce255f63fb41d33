"""Graphs are put together from parts that are traced once."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file

from export.benchmarks.random_models import export_random_expert
from export.components import Component, expert_component
from export.graph_store import GraphStore
from export.graphs import GraphAssembly, make_graphs, read_graph, trace_parts, write_graph
from latte.config import LatteFlowConfig, one_group
from latte.model import FlowTransformer, LatteFlow
from runtime.backends import open_backend
from runtime.manifest import TensorSpec


@pytest.fixture(scope="module")
def config(model: LatteFlow) -> LatteFlowConfig:
    return one_group(model.config, 5)


@pytest.fixture(scope="module")
def parts(config: LatteFlowConfig) -> dict[str, ir.Model]:
    component = expert_component(config, "fp32")
    return dict(zip((part.name for part in component.parts), trace_parts(component.parts, 18), strict=True))


def assembled(component: Component, parts: dict[str, ir.Model]) -> ir.Model:
    assembly = GraphAssembly(component, parts, 18)
    component.assemble(assembly)
    return assembly.finish()


def test_layers_repeat_one_part_with_the_names_of_other_weights(
    config: LatteFlowConfig, parts: dict[str, ir.Model]
) -> None:
    five, two = (assembled(expert_component(one_group(config, n), "fp32"), parts).graph for n in (5, 2))
    for layer in range(5):
        assert f"flow.layers.{layer}.q_proj.weight" in five.initializers
    assert "flow.layers.5.q_proj.weight" not in five.initializers
    assert "flow.layers.2.q_proj.weight" not in two.initializers
    # Each layer brings the same nodes, but for the index of its keys and values.
    per_layer = (len(list(five)) - len(list(two))) / 3
    assert per_layer == int(per_layer)
    assert per_layer < len(list(parts["layer"].graph))  # sizes and casts that all layers need are there once


def test_the_first_layer_of_a_group_has_no_attention_gate(config: LatteFlowConfig, parts: dict[str, ir.Model]) -> None:
    graph = assembled(expert_component(config, "fp32"), parts).graph
    gates = [name for name in graph.initializers if "attention_gate" in name]
    assert gates == [f"flow.layers.{layer}.attention_gate.weight" for layer in range(1, 5)]
    alone = assembled(expert_component(one_group(config, 1), "fp32"), parts).graph
    assert not [name for name in alone.initializers if "attention_gate" in name]


def test_zeros_are_followed_only_where_they_stay_zeros(config: LatteFlowConfig, parts: dict[str, ir.Model]) -> None:
    assembly = GraphAssembly(expert_component(config, "fp32"), parts, 18)
    with pytest.raises(ValueError, match="of a tensor of zeros is not known to be zero"):
        assembly.call("end", None, None, assembly.input("latents"))


def test_models_of_other_depths_share_their_parts(config: LatteFlowConfig) -> None:
    def settings(config: LatteFlowConfig) -> list[dict[str, object]]:
        return [dict(part.settings) for part in expert_component(config, "fp32").parts]

    deeper = config.model_copy(update={"num_hidden_layers": 15, "latents_mean": (0.5,) * config.latent_channels})
    wider = config.model_copy(update={"intermediate_size": 2 * config.intermediate_size})
    assert settings(deeper) == settings(config)
    assert settings(wider) != settings(config)


def test_a_graph_survives_being_written(parts: dict[str, ir.Model]) -> None:
    again = read_graph(write_graph(parts["layer"]))
    assert [node.op_type for node in again.graph] == [node.op_type for node in parts["layer"].graph]
    unbound = {name for name, value in parts["layer"].graph.initializers.items() if value.const_value is None}
    assert {name for name, value in again.graph.initializers.items() if value.const_value is None} == unbound
    assert "layer.q_proj.weight" in unbound
    assert [value.name for value in again.graph.inputs] == [value.name for value in parts["layer"].graph.inputs]


def test_a_component_whose_parts_do_not_fit_its_outputs_is_refused(
    config: LatteFlowConfig, parts: dict[str, ir.Model]
) -> None:
    component = expert_component(config, "fp32")
    other = dataclasses.replace(component, outputs=(TensorSpec(name="speed", dtype="float32", shape=("rows",)),))
    with pytest.raises(KeyError, match="speed"):
        assembled(other, parts)


def test_an_opset_of_ones_own_is_the_graphs(config: LatteFlowConfig) -> None:
    (model,) = make_graphs([expert_component(config, "fp32")], 20, GraphStore(None))
    assert model.opset_imports[""] == 20


@pytest.mark.parametrize("heads", [1, 4])
def test_an_expert_with_as_many_key_value_heads_as_query_heads(
    heads: int, config: LatteFlowConfig, tmp_path: Path
) -> None:
    """Then queries and tokens are one axis, whose size the first layer cannot ask the scores of a layer before for."""
    sizes = {"num_attention_heads": heads, "num_key_value_heads": heads, "mrope_section": (16 // heads - 2, 1, 1)}
    equal = one_group(config.model_copy(update=sizes), 2)
    entry = export_random_expert(tmp_path, "fp32", equal)
    flow = FlowTransformer(equal).eval()
    weights = load_file(tmp_path / entry.files[1].path)
    loaded = flow.load_state_dict(
        {name.removeprefix("flow."): weight for name, weight in weights.items()}, strict=False
    )
    assert all(name.endswith("bias") for name in loaded.missing_keys)  # small tensors are in the graph; biases are 0
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn((3, config.latent_channels, 4, 6), generator=generator)
    prefix = torch.randn((2, 2, 3, heads, 5, 32 // heads), generator=generator)
    mask, timestep = torch.ones((3, 5), dtype=torch.bool), torch.full((3,), 0.5)
    with torch.no_grad():
        expected = flow(latents, timestep, prefix, mask, 0).numpy()
    feed = {"latents": latents, "timestep": timestep, "prefix_kv": prefix, "prefix_mask": mask}
    session = open_backend("cpu").load(tmp_path, entry)
    velocity = session.run({name: tensor.numpy() for name, tensor in feed.items()})["velocity"].numpy()
    np.testing.assert_allclose(velocity, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
