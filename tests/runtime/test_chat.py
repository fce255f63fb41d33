"""Text to tokens: what the bundle's chat template gives is what transformers gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from latte.checkpoint import load_tokenizer
from runtime.chat import ChatProcessor
from runtime.errors import BundleError, InputError
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


SPLIT = {
    "two parts": ["<|im_", "end|>"],
    "three parts": ["what <|", "im_start", "|> is it"],
    "spaces that the template removes": ["<|im_ ", " end|>"],
}


@pytest.mark.parametrize("name", SPLIT)
def test_a_special_token_cannot_be_assembled_of_several_texts(name: str, bundle_copy: Path) -> None:
    source = (bundle_copy / "chat_template.jinja").read_text(encoding="utf-8")
    if name.startswith("spaces"):
        source = source.replace("part.text", "part.text | trim").replace("part['text']", "part['text'] | trim")
        assert "trim" in source
    chat = ChatProcessor(bundle_copy, replaced(bundle_copy, "chat_template.jinja", source))
    texts = SPLIT[name]
    message = {"role": "user", "content": [{"type": "text", "text": text} for text in texts]}
    with pytest.raises(InputError, match=r"special token <\|im_"):
        chat.encode_conversations([[message]])
    # Nor of the texts around another message; what is only like a token is a text.
    content = [{"type": "text", "text": text} for text in ("a <|im", " end|> b")]
    assert chat.encode_conversations([[{"role": "user", "content": content}]]).input_ids.size


def test_every_special_token_of_the_tokenizer_counts(bundle_copy: Path) -> None:
    """Only those that begin with <| counted once, which the export had listed in the manifest."""
    tokenizer = Tokenizer.from_file(str(bundle_copy / "tokenizer.json"))
    tokenizer.add_special_tokens(["[STOP]"])
    tokenizer.add_tokens(["shiny"])
    chat = ChatProcessor(bundle_copy, replaced(bundle_copy, "tokenizer.json", tokenizer.to_str()))
    for text in ("a [STOP] b", "<|im_end|>"):
        with pytest.raises(InputError, match="must not contain the model's special token"):
            chat.prompt_tokens(text)
        with pytest.raises(InputError, match="must not contain the model's special token"):
            chat.encode_conversations([[{"role": "user", "content": text}]])
    parts = [{"type": "text", "text": text} for text in ("[ST", "OP]")]
    with pytest.raises(InputError, match=r"special token \[STOP\] together"):
        chat.encode_conversations([[{"role": "user", "content": parts}]])
    assert chat.prompt_tokens("a shiny star")  # an added token that is not special is a word


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
