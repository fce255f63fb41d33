"""Every stage trains for real, but tiny: losses fall, and a resumed run is the uninterrupted one, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from latte.checkpoint import SHIPPED, load_checkpoint, load_image_processor, load_tokenizer, load_vlm, save_part
from latte.shapes.autoencoder import AutoencoderStage, small_autoencoder
from latte.shapes.flow import FlowStage, share_of_other
from latte.shapes.recipe import run_stage
from latte.shapes.scenes import Scene, Shape
from latte.shapes.vision import VisionStage, token_labels
from latte.shapes.vlm import (
    Conversation,
    ConversationEncoder,
    VlmStage,
    sample_conversation,
    small_image_processor,
    small_vlm,
    train_tokenizer,
)
from latte.training import Stage, TrainSettings, _optimizer, plot_losses, train
from runtime.errors import CheckpointError, InputError, TrainingError
from tests.tiny import tiny_model, tiny_vlm


def settings(steps: int, **changes: object) -> TrainSettings:
    values = {"steps": steps, "batch_size": 4, "learning_rate": 2e-3, "warmup_steps": 2, "ema_decay": 0.5} | changes
    return TrainSettings.model_validate(values)


def make_stage(name: str) -> Stage:
    torch.manual_seed(0)
    if name == "autoencoder":
        return AutoencoderStage(small_autoencoder(), 4)
    if name == "flow":
        return FlowStage(tiny_model(), 4)
    vlm, tokenizer = tiny_vlm()
    if name == "vision":
        return VisionStage(vlm, small_image_processor(), 4)
    return VlmStage(vlm.train(), ConversationEncoder(tokenizer, small_image_processor()), 4)


STAGES = ("autoencoder", "vision", "vlm", "flow")


@pytest.mark.parametrize("name", STAGES)
def test_a_few_steps_lower_the_loss_on_the_same_batch(name: str) -> None:
    stage = make_stage(name)

    def loss_of_step_0() -> float:
        torch.manual_seed(0)
        with torch.no_grad():
            return float(sum(loss for _, loss in stage.losses(0, np.random.default_rng(0))))

    before = loss_of_step_0()
    optimizer = torch.optim.AdamW([p for p in stage.trainable().parameters() if p.requires_grad], lr=2e-3)
    for _ in range(12):
        torch.manual_seed(0)
        optimizer.zero_grad()
        for _, loss in stage.losses(0, np.random.default_rng(0)):
            loss.backward()
        optimizer.step()
    assert loss_of_step_0() < 0.95 * before


@pytest.mark.parametrize("name", STAGES)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_stage(name)
    train(whole, settings(8), tmp_path / "whole")

    interrupted = make_stage(name)
    losses = type(interrupted).losses

    def stop_at_5(self: Stage, step: int, rng: np.random.Generator) -> object:
        if step == 5:
            raise KeyboardInterrupt
        return losses(self, step, rng)

    monkeypatch.setattr(type(interrupted), "losses", stop_at_5)
    with pytest.raises(KeyboardInterrupt):
        train(interrupted, settings(8, save_every_seconds=1e-6), tmp_path / "halves")
    monkeypatch.undo()
    resumed = make_stage(name)
    train(resumed, settings(8), tmp_path / "halves")

    for (parameter_name, a), b in zip(
        whole.trainable().named_parameters(), resumed.trainable().parameters(), strict=True
    ):
        assert torch.equal(a, b), parameter_name
    logs = [(tmp_path / run / f"{name}.jsonl").read_text().splitlines() for run in ("whole", "halves")]
    assert [json.loads(line)["step"] for line in logs[0]] == [json.loads(line)["step"] for line in logs[1]]


def test_the_term_for_kinds_is_the_share_of_another_kind_whatever_its_size() -> None:
    other = torch.randn(3, 2, 4, 4)
    other[1] *= 0.01
    other[2] = 0  # the prompt leaves the image open
    half_way = 0.5 * other
    assert share_of_other(half_way, other).item() == pytest.approx(0.25, rel=1e-3)
    elsewhere = half_way.roll(1, 1) * torch.tensor([1.0, -1.0])[:, None, None]  # at a right angle to `other`
    assert share_of_other(elsewhere, other).item() < 1e-8
    assert share_of_other(torch.ones(3, 2, 4, 4), torch.zeros(3, 2, 4, 4)).item() == 0


def test_a_run_goes_on_only_with_the_settings_that_it_began_with(tmp_path: Path) -> None:
    train(make_stage("autoencoder"), settings(2), tmp_path)
    with pytest.raises(CheckpointError, match=r"learning_rate was 0\.002, is 0\.001"):
        train(make_stage("autoencoder"), settings(2, learning_rate=1e-3), tmp_path)
    with pytest.raises(CheckpointError, match="2 steps are done, 1 are asked for"):
        train(make_stage("autoencoder"), settings(1), tmp_path)


def test_a_run_can_be_extended(tmp_path: Path) -> None:
    train(make_stage("autoencoder"), settings(2), tmp_path)
    train(make_stage("autoencoder"), settings(4), tmp_path)
    with safe_open(tmp_path / "autoencoder.safetensors", framework="pt") as file:
        assert file.metadata()["step"] == "4"


def test_a_run_does_not_go_on_with_another_autoencoder(tmp_path: Path) -> None:
    train(make_stage("flow"), settings(2), tmp_path)
    other = make_stage("flow")
    with torch.no_grad():
        next(other.frozen()[1].parameters()).add_(0.1)
    with pytest.raises(CheckpointError, match="parts that are not trained"):
        train(other, settings(4), tmp_path)


def test_a_state_that_cannot_be_read_is_not_the_only_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(make_stage("autoencoder"), settings(6, save_every_seconds=1e-6), tmp_path)
    (tmp_path / "autoencoder.safetensors").write_bytes(b"cut off")
    train(make_stage("autoencoder"), settings(6), tmp_path)
    assert "going on from" in capsys.readouterr().err
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(b"cut off")
    with pytest.raises(CheckpointError, match="cannot be read"):
        train(make_stage("autoencoder"), settings(6), tmp_path)


def test_a_save_that_is_cut_off_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(make_stage("autoencoder"), settings(2), tmp_path)
    before = (tmp_path / "autoencoder.safetensors").read_bytes()

    def write_half(tensors: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(before[:1000])
        raise OSError("no space left on device")

    monkeypatch.setattr("latte.training.save_file", write_half)
    with pytest.raises(OSError, match="no space"):
        train(make_stage("autoencoder"), settings(2), tmp_path)
    assert (tmp_path / "autoencoder.safetensors").read_bytes() == before
    load_file(tmp_path / "autoencoder.safetensors")


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    stage = make_stage("autoencoder")
    with torch.no_grad():
        next(stage.trainable().parameters()).fill_(float("nan"))
    with pytest.raises(TrainingError, match="lower the learning rate"):
        train(stage, settings(2), tmp_path)


def test_a_gradient_that_is_not_finite_touches_nothing(tmp_path: Path) -> None:
    stage = make_stage("autoencoder")
    losses = stage.losses

    def with_infinite_gradient(step: int, rng: np.random.Generator) -> Iterator[tuple[str, torch.Tensor]]:
        for name, loss in losses(step, rng):
            zero = next(stage.trainable().parameters()).sum() * 0
            yield name, loss + zero.sqrt()  # finite, with a slope that is not

    stage.losses = with_infinite_gradient  # type: ignore[method-assign]
    before = [p.detach().clone() for p in stage.trainable().parameters()]
    with pytest.raises(TrainingError, match="gradient's norm is nan"):
        train(stage, settings(2), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before, stage.trainable().parameters(), strict=True))


def test_weight_decay_spares_what_is_neutral_at_other_values_than_zero() -> None:
    stage = make_stage("flow")
    parameters = dict(stage.trainable().named_parameters())
    decayed, spared = _optimizer(parameters, settings(1)).param_groups
    names = {id(p): name for name, p in parameters.items()}
    assert all(names[id(p)].endswith((".bias", "norm.weight", "_table")) for p in spared["params"])
    assert all(names[id(p)].endswith(".weight") and "norm" not in names[id(p)] for p in decayed["params"])
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.01, 0)


@pytest.mark.parametrize("groups", [1, 3, 28])
def test_losses_are_plotted_for_any_number_of_groups(groups: int, tmp_path: Path) -> None:
    log = tmp_path / "flow.jsonl"
    rows = [
        {
            "step": 20 * (i + 1),
            "seconds": float(i),
            **{f"group_{(20 * i + k) % groups}": 1.0 / (i + 1) for k in range(20)},
        }
        for i in range(30)
    ]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot_losses(log, tmp_path / "flow.png")
    assert (tmp_path / "flow.png").stat().st_size > 10_000


def test_all_groups_are_trained_equally_often(tmp_path: Path) -> None:
    stage = make_stage("flow")
    names = [name for step in range(8) for name, _ in stage.losses(step, np.random.default_rng(step))]
    assert names == ["group_0", "group_1"] * 4


def test_the_stages_make_a_checkpoint_that_draws(tmp_path: Path) -> None:
    """The recipe's whole path from nothing to a checkpoint, two steps a stage."""
    for name in STAGES:
        steps = 4 if name == "flow" else 2
        run_stage(name, tmp_path, settings(steps))
    checkpoint = load_checkpoint(tmp_path / "checkpoint")
    assert checkpoint.generate("a red circle", num_inference_steps=4).shape == (1, 64, 64, 3)

    # Every stage starts from a checkpoint's weights where it is told to: with no step to speak of, they stay.
    finer = tmp_path / "finer"
    for name in STAGES:
        run_stage(name, finer, settings(1, learning_rate=1e-12, ema_decay=0.0), start_from=tmp_path / "checkpoint")
    same = load_checkpoint(finer / "checkpoint")
    for part in ("flow", "vlm", "vae"):
        pairs = zip(getattr(checkpoint, part).parameters(), getattr(same, part).parameters(), strict=True)
        assert all(torch.allclose(before, after, atol=1e-6) for before, after in pairs)


def test_the_vlm_stage_goes_on_from_a_vision_stage_with_the_same_start(tmp_path: Path) -> None:
    """The VLM's training ignored the vision stage of its run, whose tokenizer was new."""
    start = SHIPPED["shapes"]
    run_stage("vision", tmp_path, settings(1, learning_rate=1e-2, ema_decay=0.0), start_from=start)
    assert load_tokenizer(tmp_path / "vlm-vision").get_vocab() == load_tokenizer(start).get_vocab()
    run_stage("vlm", tmp_path, settings(1, learning_rate=1e-12, ema_decay=0.0), start_from=start)
    towers = [load_vlm(path).model.visual.state_dict() for path in (tmp_path / "vlm", tmp_path / "vlm-vision")]
    assert all(torch.allclose(towers[0][name], towers[1][name], atol=1e-6) for name in towers[1])
    before = load_vlm(start / "vlm").model.visual.state_dict()
    assert not all(torch.allclose(before[name], towers[1][name], atol=1e-4) for name in before)

    vlm = load_vlm(tmp_path / "vlm-vision")
    vlm.model.language_model.norm.weight.data += 1
    save_part(vlm, tmp_path / "vlm-vision", load_tokenizer(start), load_image_processor(start))
    with pytest.raises(InputError, match=r"vlm-vision did not start from .*; leave out --start-from to go on with it"):
        run_stage("vlm", tmp_path, settings(1), start_from=start)


def test_a_scene_that_leaves_something_open_has_no_labels() -> None:
    with pytest.raises(ValueError, match="needs a background"):
        token_labels(Scene((Shape("star", "red", "large", "top left"),), None))
    with pytest.raises(ValueError, match="needs a size and a cell"):
        token_labels(Scene((Shape("star", "red", None, "top left"),), "white"))


def test_a_stage_says_which_one_must_come_before(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--stage autoencoder"):
        run_stage("flow", tmp_path, settings(2))


def test_positions_and_patches_of_a_conversation_are_qwen2_vls_own() -> None:
    tokenizer = train_tokenizer()
    vlm = small_vlm(tokenizer)
    rng = np.random.default_rng(0)
    conversation = next(c for c in iter(lambda: sample_conversation(rng), None) if c.image is not None)
    batch = ConversationEncoder(tokenizer, small_image_processor()).encode([conversation])
    is_image = (batch.input_ids == vlm.config.image_token_id).int()
    expected, _ = vlm.model.get_rope_index(batch.input_ids, is_image, image_grid_thw=batch.image_grid_thw)
    assert torch.equal(batch.position_ids, expected)


def test_there_is_loss_on_the_answers_alone() -> None:
    tokenizer = train_tokenizer()
    batch = ConversationEncoder(tokenizer, small_image_processor()).encode([Conversation((("what?", "red"),))])
    learned = batch.labels[batch.labels != -100]
    assert tokenizer.decode(learned) == "red<|im_end|>"


def test_token_labels_say_what_a_token_shows() -> None:
    labels = token_labels(Scene((Shape("star", "red", "large", "top left"),), "white"))
    assert (labels[0] == [5, 1, 3, 1, 0]).all()
    assert (labels[-1, :4] == 0).all()
