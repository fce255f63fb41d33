"""`latte-flow train` on data sets: from a folder of images to a checkpoint, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from latte.checkpoint import load_checkpoint
from latte.data.batches import ImageTextBatches
from latte.data.images import ImagePolicy
from latte.data.pixel_rows import PixelRows
from latte.data.source import open_data_set
from latte.lora import PRODUCTS
from latte.training.data_set import DataOptions, DataSetWorld
from latte.training.dry_run import Sizes, needs_of
from latte.training.flow import FlowStage
from latte.training.log import LOG
from latte.training.loop import make_accelerator
from latte.training.settings import TrainSettings
from latte.training.validation import VALIDATION_LOG, FlowValidation, ValidationOptions
from runtime.cli import load_command
from runtime.errors import CheckpointError, InputError
from tests.tiny import save_tiny, save_untrained


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("command") / "tiny"
    save_tiny(path)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
        for i in range(12):
            colour = rng.integers(0, 256, 3)
            Image.fromarray(np.full((40, 40, 3), colour, np.uint8)).save(folder / f"{i}.png")
            questions = [{"question": "what is it?", "answer": f"colour {i}"}]
            row = {"file_name": f"{i}.png", "text": f"a wall of colour {i}", "questions": questions}
            metadata.write(json.dumps(row) + "\n")
    (folder / "3.png").write_bytes(b"no image")
    return folder


def run(*arguments: object, steps: int | None = 4) -> None:
    options = ["--train-batch-size", 4, "--lr-warmup-steps", 0, "--cpu"]
    options += [] if steps is None else ["--max-train-steps", steps]
    load_command("train").main([str(a) for a in (*arguments, *options)], standalone_mode=False)


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoint" / "model.safetensors")


def test_a_folder_of_images_trains_the_flow_layers(
    checkpoint: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(checkpoint, "--data", images, "--out", tmp_path, "--timestep-sampling", "logit_normal")
    before, after = load_checkpoint(checkpoint), load_checkpoint(tmp_path / "checkpoint")
    assert not torch.equal(before.flow.layers[0].q_proj.weight, after.flow.layers[0].q_proj.weight)
    assert after.generate("a wall", num_inference_steps=2).shape == (1, 24, 32, 3)
    assert (tmp_path / "loss.png").is_file()
    assert "left out 3.png" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["flow", "vlm"])
def test_bf16_has_the_losses_of_fp32(checkpoint: Path, images: Path, tmp_path: Path, stage: str) -> None:
    losses = {}
    for precision in ("no", "bf16"):
        out = tmp_path / precision
        run(checkpoint, "--data", images, "--out", out, "--stage", stage, "--mixed-precision", precision)
        log = json.loads((out / LOG).read_text(encoding="utf-8").splitlines()[-1])
        losses[precision] = [value for name, value in log.items() if name == "loss" or name.startswith("group_")]
    assert len(losses["no"]) == {"flow": 2, "vlm": 1}[stage]
    assert losses["bf16"] == pytest.approx(losses["no"], rel=0.01)


def test_questions_of_a_data_set_train_the_vlm(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    run(checkpoint, "--data", images, "--out", tmp_path, "--stage", "vlm", "--learning-rate", 1e-3)
    before, after = load_checkpoint(checkpoint).vlm, load_checkpoint(tmp_path / "checkpoint").vlm
    assert not torch.equal(before.model.language_model.norm.weight, after.model.language_model.norm.weight)
    for name, weight in before.model.visual.named_parameters():
        assert torch.allclose(weight, after.model.visual.get_parameter(name), atol=2e-3), name  # fp16 on disk


def rows_of(folder: Path, **columns: object) -> Path:
    """A folder of eight images; a column has a value for all rows, or a list of eight."""
    folder.mkdir()
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
        for i in range(8):
            Image.fromarray(np.full((40, 40, 3), 30 * i, np.uint8)).save(folder / f"{i}.png")
            own = {name: value[i] if isinstance(value, list) else value for name, value in columns.items()}
            metadata.write(json.dumps({"file_name": f"{i}.png", "text": f"grey {i}"} | own) + "\n")
    return folder


def test_rows_without_questions_are_named_and_replaced(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They had an image and no tokens for it, so that training ended in transformers."""
    asked = [{"question": "what is it?", "answer": "grey"}]
    data = rows_of(tmp_path / "data", questions=[asked if i % 4 else [] for i in range(8)])
    run(checkpoint, "--data", data, "--out", tmp_path / "run", "--stage", "vlm")
    told = capsys.readouterr().err
    assert "left out 0.png: it has no questions" in told
    assert "left out 4.png: it has no questions" in told


def test_a_column_of_other_questions_is_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    data = rows_of(tmp_path / "texts", questions=[["what is it?"]] * 8)
    run(checkpoint, "--data", data, "--out", tmp_path / "run")
    with pytest.raises(InputError, match="cannot train the stage vlm; that needs a column `questions` of"):
        run(checkpoint, "--data", data, "--out", tmp_path / "vlm", "--stage", "vlm")


def test_a_caption_that_is_too_long_is_named_and_costs_only_itself(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ended the run in the middle, and again each time that it was started."""
    data = rows_of(tmp_path / "data", text=["far " * 400 if i == 5 else f"grey {i}" for i in range(8)])
    run(checkpoint, "--data", data, "--out", tmp_path / "run", "--caption-dropout", 0)
    told = capsys.readouterr().err
    assert told.count("left out the caption 'far far") == 1
    assert "the model's limit is 128" in told


def test_a_run_does_not_go_on_with_other_flips_or_flow_times(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    run(checkpoint, "--data", images, "--out", tmp_path, steps=2)
    for option, message in (
        (("--random-flip",), "random_flip was False, is True"),
        (("--timestep-sampling", "logit_normal"), "timestep_sampling was uniform, is logit_normal"),
    ):
        with pytest.raises(CheckpointError, match=message):
            run(checkpoint, "--data", images, "--out", tmp_path, *option)


def test_a_dry_run_counts_in_the_size_that_is_asked_for(checkpoint: Path) -> None:
    settings = TrainSettings(max_train_steps=1, train_batch_size=3, learning_rate=1e-3)
    sizes = Sizes.of(checkpoint)
    own, larger = (needs_of(each, settings, num_processes=1) for each in (sizes, sizes.at(96, 128)))
    assert larger.trained_parameters == own.trained_parameters
    assert larger.flops > 4 * own.flops
    assert larger.activations > 4 * own.activations


def test_cached_latents_train_as_encoded_ones_do(
    checkpoint: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, options in (("plain", ()), ("filled", ("--cache-latents", tmp_path / "cache"))):
        run(checkpoint, "--data", images, "--out", tmp_path / name, "--precision", "fp32", *options)
    monkeypatch.setattr("diffusers.AutoencoderDC.encode", None)  # nothing is left to encode
    again = ("--out", tmp_path / "again", "--cache-latents", tmp_path / "cache", "--precision", "fp32")
    run(checkpoint, "--data", images, *again)
    plain, filled, again = (weights_of(tmp_path / name) for name in ("plain", "filled", "again"))
    for name, weight in plain.items():
        assert torch.equal(filled[name], again[name]), name
        # The cache encodes in other batches; AdamW makes steps of 1e-4 of gradients that differ by rounding.
        assert torch.allclose(weight, filled[name], atol=1e-4), name


def test_a_stream_trains_the_flow_layers(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    run(checkpoint, "--data", images, "--out", tmp_path, "--streaming", "--shuffle-buffer", 5)
    assert load_checkpoint(tmp_path / "checkpoint").generate("a wall", num_inference_steps=2).shape == (1, 24, 32, 3)


def test_epochs_are_counted_for_each_group(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    for groups, steps in (((), 12), (("--groups", 1), 6)):  # 2 epochs of 12 images in batches of 4
        out = tmp_path / str(steps)
        run(checkpoint, "--data", images, "--out", out, "--num-train-epochs", 2, *groups, steps=None)
        assert json.loads((out / LOG).read_text(encoding="utf-8").splitlines()[-1])["step"] == steps
    with pytest.raises(InputError, match="has no known number of images for --num-train-epochs; give --max-train"):
        run(checkpoint, "--data", images, "--out", out, "--streaming", "--num-train-epochs", 2, steps=None)


@pytest.mark.parametrize("cached", [False, True])
def test_an_untrained_model_gets_the_statistics_of_its_data(cached: bool, images: Path, tmp_path: Path) -> None:
    save_untrained(tmp_path / "untrained")
    options = ("--cache-latents", tmp_path / "cache") if cached else ()
    out = tmp_path / "run"
    run(tmp_path / "untrained", "--data", images, "--out", out, "--precision", "fp32", *options)
    trained = load_checkpoint(out / "checkpoint")
    batches = ImageTextBatches(PixelRows(open_data_set(images), ImagePolicy(24, 32, 4)))
    pixels = batches.batch(0, range(110), 110).pixels  # ten epochs of the images that can be read
    assert pixels is not None
    with torch.no_grad():
        latents = trained.encode_images(pixels)
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.1
    assert (latents.std(dim=(0, 2, 3)) - 1).abs().max() < 0.1

    run(tmp_path / "untrained", "--data", images, "--out", out, *options, steps=6)
    assert load_checkpoint(out / "checkpoint").config == trained.config


def test_a_run_is_validated_with_its_averaged_weights_and_does_not_notice(
    checkpoint: Path, images: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a wall\n\na green wall\n", encoding="utf-8")
    prompts = ("--validation-prompts", "a red wall", "--validation-prompts", tmp_path / "prompts.txt")
    options = ("--data", images, "--precision", "fp32", "--ema-decay", 0.5, "--validation-steps", 3)
    plain, out = tmp_path / "plain", tmp_path / "validated"
    run(checkpoint, *options[:-2], "--out", plain)
    run(checkpoint, *options, *prompts, "--out", out)
    assert all(torch.equal(weight, weights_of(out)[name]) for name, weight in weights_of(plain).items())

    lines = [json.loads(line) for line in (out / VALIDATION_LOG).read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [3, 4]
    assert lines[0]["times"] == pytest.approx([0.03, 0.09, 0.15, 0.21, 0.27, 0.37, 0.51, 0.65, 0.79, 0.93])
    assert np.mean(lines[1]["losses"][:5]) == pytest.approx(lines[1]["validation_group_0"])
    with Image.open(out / "validation" / "step-4.png") as sheet:
        assert sheet.width > 3 * 160  # three images in a row
    assert (out / "validation.png").is_file()

    model = load_checkpoint(out / "checkpoint")
    world = DataSetWorld(open_data_set(images), DataOptions())
    batches = world.captioned_images(model, held_out=True)
    accelerator = make_accelerator(TrainSettings(max_train_steps=1, train_batch_size=1, learning_rate=1, cpu=True))
    again = FlowValidation(FlowStage(model, batches), batches, tmp_path / "again", ValidationOptions(), accelerator)
    assert again.run(4)["validation_group_1"] == pytest.approx(lines[1]["validation_group_1"], rel=1e-5)

    run(checkpoint, *options, *prompts, "--out", out, "--resume-from-checkpoint", "checkpoint-4", steps=5)
    lines = [json.loads(line) for line in (out / VALIDATION_LOG).read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [3, 4, 5]


def test_an_adapter_is_trained_and_added_to_the_checkpoint(
    checkpoint: Path, images: Path, tmp_path: Path, run_command: Callable[..., tuple[int, str, str]]
) -> None:
    out = tmp_path / "run"
    options = ("--data", images, "--out", out, "--precision", "fp32", "--learning-rate", 1e-2, "--groups", 1)
    run(checkpoint, *options, "--lora-rank", 3)
    before, after = load_file(checkpoint / "model.safetensors"), weights_of(out)
    assert before.keys() == after.keys()
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert changed == {f"layers.{layer}.{name}.weight" for layer in (2, 3) for name in PRODUCTS}
    assert torch.linalg.matrix_rank(after["layers.2.q_proj.weight"] - before["layers.2.q_proj.weight"], tol=1e-6) <= 3
    assert {path.name for path in (out / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert str(tmp_path.parent) not in (out / "adapter" / "adapter_config.json").read_text(encoding="utf-8")

    code, _, err = run_command("merge", checkpoint, out / "adapter", "--out", tmp_path / "merged")
    assert code == 0, err
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(merged[name], weight) for name, weight in after.items())
    code, _, err = run_command("merge", out / "checkpoint", out / "adapter", "--out", tmp_path / "other")
    assert code == 2
    assert "adapter does not belong to" in err
    code, _, err = run_command("merge", checkpoint, out / "adapter", out / "adapter", "--out", tmp_path / "other")
    assert code == 2
    assert "an adapter is merged alone" in err

    run(checkpoint, *options, "--lora-rank", 3, steps=6)  # goes on
    with pytest.raises(CheckpointError, match="contains other parameters than the model has"):
        run(checkpoint, *options, "--lora-rank", 4, steps=6)


def test_what_cannot_have_an_adapter_is_refused_in_one_line(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    save_untrained(tmp_path / "untrained")
    save_tiny(tmp_path / "blend", "blend")
    for start, options, message in (
        (checkpoint, ("--dry-run",), "--dry-run counts a training of whole layers; leave out --lora-rank"),
        (checkpoint, ("--stage", "autoencoder"), "--lora-rank is for the flow layers; train the stage autoencoder"),
        (tmp_path / "untrained", (), "--lora-rank adapts flow layers that are trained"),
        (tmp_path / "blend", (), "--lora-rank needs the variant couple"),
    ):
        with pytest.raises(InputError, match=message):
            run(start, "--data", images, "--out", tmp_path / "run", "--lora-rank", 2, *options)


def test_groups_are_trained_apart(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    run(checkpoint, "--data", images, "--out", tmp_path, "--groups", 1)
    line = json.loads((tmp_path / LOG).read_text(encoding="utf-8"))
    assert "group_1" in line
    assert "group_0" not in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--groups", "x"), "--groups must be numbers with commas between them, got 'x'"),
        (("--groups", "0,7"), "--groups must be from 0 to 1, got 0, 7"),
        (("--resolution", "5y"), "--resolution must be a number of pixels"),
        (("--resolution", 30), "multiples of 4"),
        (("--learning-rate", -1), "--learning-rate -1.0: input should be greater than 0"),
        (("--report-to", "paper"), "--report-to must be one of tensorboard, wandb, jsonl, got paper"),
        (("--stage", "vision"), "cannot train the stage vision; it supports: autoencoder, vlm, flow"),
        (("--stage", "autoencoder", "--gradient-checkpointing"), "is for the stages flow and vlm"),
        (("--cache-latents", "cache", "--crop", "random"), "--crop random cannot be cached"),
        (("--streaming", "--crop", "buckets"), "is streamed, which excludes --crop buckets; give --cache-latents"),
        (("--num-train-epochs", 2), "--max-train-steps and --num-train-epochs exclude each"),
        (("--data", "shapes", "--streaming"), "--streaming is for data sets, and shapes is drawn as it is needed"),
        (("--data", "shapes", "--caption-dropout", 0.5), "--caption-dropout is for data sets"),
        (("--data", "shapes", "--resolution", 64), "--resolution is for data sets"),
        (("--stage", "vlm", "--groups", 1), "--groups is for the flow layers, and the stage is vlm; leave it out"),
        (("--stage", "vlm", "--dry-run"), "--dry-run is for the flow layers"),
        (("--dry-run", "--resolution", 30), "--resolution must be multiples of 4 pixels, got 30x30"),
        (("--validation-split", "validation"), "has no split 'validation'; its splits: train"),
        (
            ("--validation-prompts", "far " * 100),
            "a prompt has .* tokens in its chat template, the model's limit is 128",
        ),
        (("--sharding", "fsdp2", "--optimizer", "muon"), "--optimizer muon needs whole matrices"),
        (("--resume-from-checkpoint", "checkpoint-9"), "no state at checkpoint-9; .* contains: none yet"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(
    options: tuple[object, ...],
    message: str,
    checkpoint: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        run(checkpoint, "--data", images, "--out", tmp_path, *options)


def test_a_new_model_needs_a_world_that_brings_one_along(images: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="brings no model along; give a checkpoint"):
        run("new", "--data", images, "--out", tmp_path)


def test_a_dry_run_counts_what_the_checkpoint_has(checkpoint: Path) -> None:
    settings = TrainSettings(max_train_steps=1, train_batch_size=3, learning_rate=1e-3, ema_decay=0.5)
    needs = needs_of(Sizes.of(checkpoint), settings, num_processes=1)
    model = load_checkpoint(checkpoint)
    flow = sum(p.numel() for p in model.flow.parameters())
    assert needs.trained_parameters == flow
    assert needs.frozen_parameters == sum(p.numel() for part in (model.vlm, model.vae) for p in part.parameters())
    assert needs.weights == 4 * flow
    assert needs.optimizer == 8 * flow
    assert needs.average == 4 * flow
    assert needs.active_parameters < flow
    twice = needs_of(Sizes.of(checkpoint), settings.model_copy(update={"train_batch_size": 6}), num_processes=1)
    assert twice.activations > 1.8 * needs.activations
    assert twice.flops == 2 * needs.flops
    fewer = needs_of(Sizes.of(checkpoint), settings.model_copy(update={"gradient_checkpointing": True}), 1)
    assert fewer.activations < 0.7 * needs.activations
    one = needs_of(Sizes.of(checkpoint), settings, 1, groups=[0])
    assert one.trained_parameters == one.active_parameters == needs.active_parameters


def test_a_dry_run_from_nothing_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("new", "--data", "shapes", "--out", tmp_path / "run", "--dry-run")
    assert "parameters" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_dry_run_of_the_papers_size_needs_no_weights() -> None:
    settings = TrainSettings(max_train_steps=1, train_batch_size=8, learning_rate=1e-4, mixed_precision="bf16")
    needs = needs_of(Sizes.of("paper"), settings, num_processes=8)
    assert 1.3e9 < needs.trained_parameters < 1.4e9
    assert 3.4e8 < needs.active_parameters < 3.6e8
    assert 1e12 < needs.flops < 3e12
    shared = needs_of(Sizes.of("paper"), settings.model_copy(update={"sharding": "fsdp2"}), num_processes=8)
    assert shared.optimizer == needs.optimizer // 8
    assert shared.memory < needs.memory
