"""Verification finds every small corruption of a bundle, in every precision."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from export.bundle import export_bundle
from export.reference import Reference
from runtime.manifest import Precision
from tests.export.mutations import BF16, MUTATIONS, PRECISIONS, Mutation, found_by, on_input, rewired, scaled, weight


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_corruption_is_found(
    precision: Precision, checkpoint: Path, reference: Reference, tmp_path: Path
) -> None:
    """A corruption that cannot matter says why; it must then pass, so that the reason does not outlive its truth."""
    _, failed = export_bundle(checkpoint, tmp_path / precision, precision=precision)
    assert not failed
    mutations = [mutation for mutation in MUTATIONS if precision in mutation.only]
    found = {m.name: found_by(tmp_path / precision, m, reference, tmp_path) for m in mutations}
    assert len(found) == len(mutations) >= 25
    harmless = {mutation.name for mutation in mutations if precision in mutation.harmless}
    assert {name for name, row in found.items() if row is None} == harmless


def test_a_fused_bundle_verifies_and_its_corruptions_are_found(
    checkpoint: Path, reference: Reference, tmp_path: Path
) -> None:
    """Each would pass in fp16 by its outputs: fused graphs had no rung `graph`, and new names for their weights."""
    manifest, failed = export_bundle(checkpoint, tmp_path / "fused", precision="fp16", fuse=True)
    assert not failed
    assert {row.rung for row in manifest.parity or ()} >= {"weights", "graph"}
    assert {engine.role for engine in manifest.engines if not engine.fused} == {"solver_step"}
    fused = {node.op_type for node in onnx.load(tmp_path / "fused" / "vlm" / "model.onnx").graph.node}
    assert {"SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", "FusedMatMul"} <= fused
    corruptions = {
        "graph": (
            next(mutation for mutation in MUTATIONS if mutation.name == "the VLM takes columns for rows"),
            Mutation("an epsilon is 1e-3", rewired("expert_0", "SimplifiedLayerNormalization", 1, larger_epsilon)),
        ),
        "weights": (Mutation("a norm is 0.1 % off", weight("vlm", "layers.2.input_layernorm", scaled(1.001))),),
        "input": (Mutation("bf16", on_input("expert_1", "timestep", [("Cast", BF16), ("Cast", None)])),),
    }
    for rung, mutations in corruptions.items():
        for mutation in mutations:
            found = found_by(tmp_path / "fused", mutation, reference, tmp_path)
            assert found is not None, mutation.name
            assert found.startswith(rung), (mutation.name, found)


def larger_epsilon(node: onnx.NodeProto) -> None:
    (epsilon,) = (attribute for attribute in node.attribute if attribute.name == "epsilon")
    assert epsilon.f < 1e-4
    epsilon.f = 1e-3
