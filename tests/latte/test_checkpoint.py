"""Checkpoints: what is saved comes back, and what does not fit is listed whole."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC
from safetensors.torch import load_file, save_file

from latte.checkpoint import (
    _as,
    load_checkpoint,
    load_config,
    load_outline,
    load_vae,
    resolve_checkpoint,
    save_checkpoint,
)
from latte.shapes.vlm import small_image_processor
from latte.shipped import shipped_checkpoints
from runtime.errors import CheckpointError
from tests.tiny import save_tiny, tiny_autoencoder, tiny_vlm


@pytest.fixture
def broken(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "broken"))


@pytest.mark.parametrize("variant", ["couple", "blend"])
def test_a_saved_model_draws_the_same_image_when_loaded(variant: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "saved", variant)
    arguments = {"num_inference_steps": 4, "seed": 3, "output_type": "latent"}
    again = load_checkpoint(tmp_path / "saved")
    assert (again.generate("a red star", **arguments) == model.generate("a red star", **arguments)).all()


def test_half_precision_on_disk_halves_the_files_and_nearly_keeps_the_image(
    checkpoint: Path, tmp_path: Path, model: object
) -> None:
    save_checkpoint(load_checkpoint(checkpoint), small_image_processor(), tmp_path / "half", torch.float16)
    for part in ("model.safetensors", "vlm/model.safetensors"):
        assert (tmp_path / "half" / part).stat().st_size < 0.6 * (checkpoint / part).stat().st_size
    half = load_checkpoint(tmp_path / "half").generate("a red star", num_inference_steps=2, output_type="latent")
    full = load_checkpoint(checkpoint).generate("a red star", num_inference_steps=2, output_type="latent")
    assert abs(half - full).max() < 0.05 * abs(full).max()


@pytest.mark.parametrize("shipped", [*shipped_checkpoints(), None])
def test_no_file_names_a_path_of_the_machine_that_wrote_it(
    shipped: str | None, checkpoint: Path, tmp_path: Path
) -> None:
    """diffusers writes down where a model was loaded from."""
    path = shipped_checkpoints()[shipped] if shipped else tmp_path / "again"
    if not shipped:
        save_checkpoint(load_checkpoint(checkpoint), small_image_processor(), path)
    for file in path.rglob("*.json"):
        text = file.read_text(encoding="utf-8")
        assert "_name_or_path" not in text, file
        assert str(checkpoint.parent) not in text, file


def test_every_difference_of_the_weights_is_listed(broken: Path) -> None:
    tensors = load_file(broken / "model.safetensors")
    del tensors["latent_embed.weight"]
    tensors["layers.9.q_proj.weight"] = torch.zeros(2, 2)
    tensors["latent_embed.bias"] = torch.zeros(5)
    tensors["time_modulation.bias"] = torch.zeros(128, dtype=torch.int32)
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(broken)
    message = str(caught.value)
    assert "4 differences" in message
    assert "missing latent_embed.weight" in message
    assert "unexpected layers.9.q_proj.weight" in message
    assert "latent_embed.bias has shape (5,), expected (32,)" in message
    assert "time_modulation.bias is torch.int32" in message


def test_a_weight_that_the_vlm_lacks_is_named(broken: Path) -> None:
    tensors = load_file(broken / "vlm" / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.2.mlp.up_proj.weight"))
    del tensors[name]
    save_file(tensors, broken / "vlm" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing .*layers\.2\.mlp\.up_proj\.weight"):
        load_checkpoint(broken)


@pytest.mark.parametrize("part", ["model.safetensors", "vlm/model.safetensors"])
def test_a_truncated_file_is_named(broken: Path, part: str) -> None:
    content = (broken / part).read_bytes()
    (broken / part).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="cannot be"):
        load_checkpoint(broken)


def test_a_checkpoint_written_halfway_is_never_loaded(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """config.json goes first and comes last, whatever stops the writer in between."""
    model = load_checkpoint(checkpoint)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("latte.checkpoint._save_tensors", stop)
    target = Path(shutil.copytree(checkpoint, tmp_path / "target"))
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(model, small_image_processor(), target)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_checkpoint(target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 64}, "mrope_section"),
        ({"num_hidden_layers": 6}, "num_hidden_layers is 6 in config.json, 4 in vlm/ or vae/"),
        ({"schedule": {"boundaries": [0.0, 0.5]}}, "boundaries must rise"),
        ({"surprise": 1}, "surprise"),
        ({"max_prompt_tokens": 3}, r"max_prompt_tokens 3, but an empty prompt has \d+ tokens in the chat template"),
        ({"latent_size": [0, 8]}, "latent_size.0: Input should be greater than or equal to 1"),
        ({"mrope_section": [6, -1, -1]}, "mrope_section.1: Input should be greater than or equal to 0"),
    ],
)
def test_a_config_that_does_not_fit_is_explained(broken: Path, change: dict[str, object], message: str) -> None:
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(broken)


def test_a_name_that_leaves_the_folder_is_refused(broken: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "../../elsewhere.safetensors"}}
    (broken / "vlm" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"elsewhere\.safetensors, which is not a file in the same folder"):
        load_checkpoint(broken)


def test_a_distribution_can_add_a_checkpoint(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, metadata = tmp_path / "more_checkpoints", tmp_path / "more_checkpoints-1.dist-info"
    shutil.copytree(checkpoint, package / "tiny")
    (package / "__init__.py").write_text("")
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: more_checkpoints\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[latte_flow.checkpoints]\ntiny = more_checkpoints\n")
    monkeypatch.syspath_prepend(tmp_path)
    shipped_checkpoints.cache_clear()
    try:
        assert load_config(resolve_checkpoint("tiny")) == load_config(checkpoint)
        with pytest.raises(CheckpointError, match=r"one of: .*shapes.*tiny"):
            resolve_checkpoint("nowhere")
    finally:
        shipped_checkpoints.cache_clear()


def test_an_unknown_checkpoint_lists_the_shipped_ones() -> None:
    with pytest.raises(CheckpointError, match=r"one of: (emoji, )?shapes, shapes-4step"):
        load_checkpoint("nowhere")


def test_init_makes_a_checkpoint_of_a_qwen2_vl_and_a_dc_ae(
    tmp_path: Path, run_command: Callable[..., tuple[int, str, str]]
) -> None:
    vlm, tokenizer = tiny_vlm()
    vlm.save_pretrained(tmp_path / "qwen")
    tokenizer.save_pretrained(tmp_path / "qwen")
    small_image_processor().save_pretrained(tmp_path / "qwen")
    tiny_autoencoder().save_pretrained(tmp_path / "dc-ae")
    arguments = ("init", tmp_path / "made", "--vlm", tmp_path / "qwen", "--vae", tmp_path / "dc-ae")
    sizes = ("--groups", 2, "--height", 32, "--width", 24, "--precision", "fp32")
    code, _, error = run_command(*arguments, *sizes)
    assert code == 0, error
    model = load_checkpoint(tmp_path / "made")
    assert model.config.latent_size == (8, 6)
    assert model.config.latents_std == (2.0,) * 4
    layer = vlm.model.language_model.layers[3]
    assert torch.equal(model.flow.layers[3].q_proj.weight, layer.self_attn.q_proj.weight)
    assert torch.equal(model.flow.layers[3].down_proj.weight, layer.mlp.down_proj.weight)
    code, _, error = run_command(*arguments, *sizes)
    assert code == 2
    assert "pass --force" in error
    code, _, error = run_command(*arguments, "--groups", 3, "--force")
    assert code == 2
    assert "4 layers cannot be split into 3" in error
    for boundaries, expected in (("0,0.2,1", (0, 0.2, 1)), ("equal-probability", (0, 0.3375, 0.5, 0.6625, 1))):
        code, _, error = run_command(*arguments, "--force", "--height", 32, "--width", 32, "--boundaries", boundaries)
        assert code == 0, error
        assert load_config(tmp_path / "made").schedule.boundaries == pytest.approx(expected, abs=1e-4)
    code, _, error = run_command("export", tmp_path / "made", tmp_path / "bundle")
    assert code != 0
    assert "made is untrained: a velocity head is zero" in error.strip().splitlines()[-1]
    code, _, error = run_command("export", tmp_path / "made", tmp_path / "bundle", "--no-verify")
    assert code == 0, error
    code, _, error = run_command("generate", tmp_path / "bundle", "a red circle", "-o", tmp_path / "images")
    assert code != 0
    assert "the checkpoint is untrained" in error.strip().splitlines()[-1]
    assert not list(tmp_path.glob("images/*.png"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--boundaries", "0,0.5,0.4,1"),
            "--boundaries must be uniform, equal-probability, or flow times that rise from",
        ),
        (("--boundaries", "logit"), "such as 0,0.2,0.6,1; got 'logit'"),
        (("--boundaries", "0,0.5,1", "--groups", 4), "--boundaries 0,0.5,1 bound 2 groups, --groups is 4"),
    ],
)
def test_init_refuses_boundaries_that_are_none(
    options: tuple[object, ...], message: str, tmp_path: Path, run_command: Callable[..., tuple[int, str, str]]
) -> None:
    code, _, error = run_command("init", tmp_path / "made", "--vlm", tmp_path, "--vae", tmp_path, *options)
    assert code == 2
    assert message in error


def shallow_encoder(config: dict[str, Any]) -> None:
    """An encoder with one stage fewer than the decoder."""
    for name in ("block_types", "block_out_channels", "layers_per_block", "qkv_multiscales"):
        config[f"encoder_{name}"] = config[f"encoder_{name}"][1:]


BROKEN_AUTOENCODERS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another factor": (shallow_encoder, r"decodes latents of shape \(1, 4, 16, 16\) to \(1, 3, 64, 64\), expected"),
    "grey images": (lambda config: config.update(in_channels=1), r"to \(1, 1, 32, 32\), expected \(1, 3, 32, 32\)"),
    "no scaling factor": (lambda config: config.update(scaling_factor=0.0), "has the scaling_factor 0.0"),
    "a negative scaling factor": (lambda config: config.update(scaling_factor=-1), "has the scaling_factor -1"),
    "a scaling factor that is text": (lambda config: config.update(scaling_factor="x"), "has the scaling_factor 'x'"),
}


@pytest.mark.parametrize("name", BROKEN_AUTOENCODERS)
def test_init_refuses_an_autoencoder_that_cannot_decode(
    name: str, tmp_path: Path, run_command: Callable[..., tuple[int, str, str]]
) -> None:
    """The export failed with a traceback, or not at all."""
    change, message = BROKEN_AUTOENCODERS[name]
    config = dict(tiny_autoencoder().config)
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    change(config)
    AutoencoderDC(**config).save_pretrained(tmp_path / "dc-ae")
    sizes = ("--height", 32, "--width", 32)
    code, _, error = run_command(
        "init", tmp_path / "made", "--vlm", tmp_path / "nothing", "--vae", tmp_path / "dc-ae", *sizes
    )
    assert code != 0
    (line,) = error.strip().splitlines()
    assert re.search(message, line), line
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "change", [{"attention_head_dim": 0}, {"decoder_block_types": ["ResBlock"]}, {"latent_channels": None}]
)
def test_a_config_of_which_diffusers_makes_nothing_is_one_line(change: dict[str, Any], broken: Path) -> None:
    """Tracebacks of a ZeroDivisionError, an IndexError and a TypeError."""
    path = broken / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    for load in (load_checkpoint, load_outline, lambda checkpoint: load_vae(checkpoint / "vae")):
        with pytest.raises(CheckpointError, match=r"vae cannot be loaded as AutoencoderDC: .*") as caught:
            load(broken)
        assert "\n" not in str(caught.value)


def test_init_refuses_an_autoencoder_whose_weights_are_not_numbers(
    tmp_path: Path, run_command: Callable[..., tuple[int, str, str]]
) -> None:
    autoencoder = tiny_autoencoder()
    with torch.no_grad():
        next(autoencoder.decoder.parameters()).fill_(torch.nan)
    autoencoder.save_pretrained(tmp_path / "dc-ae")
    arguments = ("--vlm", tmp_path / "nothing", "--vae", tmp_path / "dc-ae")
    code, _, error = run_command("init", tmp_path / "made", *arguments, "--height", 32, "--width", 32)
    assert code != 0
    assert "to pixels that are not finite" in error


@pytest.mark.parametrize(
    ("template", "message"),
    [(None, "contains no chat_template.jinja"), ("{% if", "the chat template of .* cannot be used")],
)
def test_a_checkpoint_without_a_chat_template_is_one_line(
    template: str | None, message: str, broken: Path, tmp_path: Path, run_command: Callable[..., tuple[int, str, str]]
) -> None:
    if template is None:
        (broken / "chat_template.jinja").unlink()
    else:
        (broken / "chat_template.jinja").write_text(template)
    for options in ((), ("--no-verify",)):
        code, _, error = run_command("export", broken, tmp_path / "bundle", *options)
        assert code != 0
        assert re.search(message, error.strip().splitlines()[-1])
        assert not (tmp_path / "bundle").exists()


def test_a_part_of_another_class_is_refused(broken: Path) -> None:
    config = json.loads((broken / "vae" / "config.json").read_text())
    (broken / "vae" / "config.json").write_text(json.dumps(config | {"_class_name": "qwen2_vl"}))
    for load in (load_checkpoint, load_outline):
        with pytest.raises(CheckpointError, match="_class_name is 'qwen2_vl', expected 'AutoencoderDC'"):
            load(broken)
    (broken / "vae" / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="is not a config"):
        load_checkpoint(broken)


def test_saving_in_another_dtype_copies_no_tensor_but_those_it_casts(checkpoint: Path) -> None:
    vlm = load_checkpoint(checkpoint).vlm
    half = _as(vlm, torch.float16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float16}
    assert half.get_output_embeddings().weight is half.get_input_embeddings().weight
    assert {parameter.dtype for parameter in vlm.parameters()} == {torch.float32}
    assert _as(half, torch.float16) is half
