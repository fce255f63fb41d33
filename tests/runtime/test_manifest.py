"""A bundle that cannot be trusted is refused in one line that says what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.errors import BundleError
from runtime.manifest import SCHEMA_VERSION, load_manifest
from runtime.pipeline import LatteFlowPipeline

RunCommand = Callable[..., tuple[int, str, str]]


def edit(bundle: Path, change: Callable[[dict], object]) -> None:
    path = bundle / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


BREAKAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda b: (b / "manifest.json").unlink(), "contains no manifest.json"),
    "not JSON": (lambda b: (b / "manifest.json").write_text("{"), "is not a valid manifest"),
    "not an object": (lambda b: (b / "manifest.json").write_text("[]"), "is not a valid manifest"),
    "newer schema": (
        lambda b: edit(b, lambda m: m.update(schema_version=99)),
        f"schema version 99, this latte-flow reads {SCHEMA_VERSION}",
    ),
    "older schema": (
        lambda b: edit(b, lambda m: m.update(schema_version=1)),
        f"schema version 1, this latte-flow reads {SCHEMA_VERSION}; export the bundle again",
    ),
    "unknown field": (lambda b: edit(b, lambda m: m.update(surprise=1)), "surprise"),
    "missing engine file": (lambda b: (b / "expert_1" / "model.onnx").unlink(), "expert_1/model.onnx is missing"),
    "truncated engine file": (lambda b: truncate(b / "expert_0" / "weights.safetensors"), "bytes, the manifest says"),
    "altered engine file": (lambda b: flip_a_byte(b / "vlm" / "weights.safetensors"), "was altered after the export"),
    "altered tokenizer": (lambda b: flip_a_byte(b / "tokenizer.json"), "was altered after the export"),
    "path outside": (
        lambda b: edit(b, lambda m: m["engines"][0]["files"][0].update(path="../elsewhere")),
        "a relative path inside it",
    ),
    "absolute path": (
        lambda b: edit(b, lambda m: m["tokenizer_files"][0].update(path="/etc/passwd")),
        "a relative path inside it",
    ),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_a_broken_bundle_is_one_clear_line(
    name: str, bundle_copy: Path, tmp_path: Path, run_command: RunCommand
) -> None:
    breakage, message = BREAKAGES[name]
    breakage(bundle_copy)
    code, out, error = run_command("generate", bundle_copy, "a red circle", "-o", tmp_path / "images")
    assert code == 2
    assert out == ""
    lines = error.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]


def test_the_hash_of_a_bundle_is_of_its_content(bundle: Path, bundle_copy: Path) -> None:
    edit(bundle_copy, lambda m: m.update(parity=None))
    assert load_manifest(bundle_copy).bundle_hash() == load_manifest(bundle).bundle_hash()


def test_no_bundle_at_all(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="expected a folder that `latte-flow export` wrote"):
        LatteFlowPipeline.from_pretrained(tmp_path / "nowhere")
