"""Text to tokens: what the bundle's chat template gives is what transformers gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from latte.checkpoint import load_tokenizer
from runtime.chat import ChatProcessor
from runtime.errors import BundleError
from runtime.manifest import Manifest, file_entry, load_manifest


def replaced(bundle: Path, name: str, text: str) -> Manifest:
    """Replaces a tokenizer file, and its entry in the manifest."""
    (bundle / name).write_text(text, encoding="utf-8")
    path = bundle / "manifest.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    entries = [file_entry(bundle, entry["path"]).model_dump() for entry in content["tokenizer_files"]]
    path.write_text(json.dumps(content | {"tokenizer_files": entries}), encoding="utf-8")
    return load_manifest(bundle)


@pytest.mark.parametrize(
    "start",
    [
        "{{ eos_token }}",
        "{{ pad_token }}{% if bos_token %}{{ bos_token }}{% endif %}",
        "{% if tools is none and documents is none %}none {% endif %}",
    ],
)
def test_a_template_gets_the_variables_that_transformers_gives_it(
    start: str, bundle_copy: Path, checkpoint: Path
) -> None:
    source = start + (bundle_copy / "chat_template.jinja").read_text(encoding="utf-8")
    manifest = replaced(bundle_copy, "chat_template.jinja", source)
    tokenizer = load_tokenizer(checkpoint)
    tokenizer.chat_template = source
    message = [{"role": "user", "content": "a red star"}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ChatProcessor(bundle_copy, manifest).prompt_tokens("a red star") == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", "{}", r"tokenizer\.json is not a tokenizer"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json is not a tokenizer's config"),
        ("chat_template.jinja", "{% if %}", "chat template is broken"),
    ],
)
def test_a_broken_tokenizer_file_is_one_line(name: str, text: str, message: str, bundle_copy: Path) -> None:
    manifest = replaced(bundle_copy, name, text)
    with pytest.raises(BundleError, match=message):
        ChatProcessor(bundle_copy, manifest)
