"""Every stage trains for real, but tiny: losses fall, and a resumed run is the uninterrupted one, bit for bit."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from latte.checkpoint import load_checkpoint
from latte.shapes.autoencoder import BusyScenes, small_autoencoder
from latte.shapes.flow import ScenePairs, ShapesFlowStage, share_of_other
from latte.shapes.recipe import Shapes
from latte.shapes.vision import LabelledScenes
from latte.shapes.vlm import ShapesConversations, small_image_processor
from latte.training.autoencoder import AutoencoderStage
from latte.training.conversations import ConversationEncoder
from latte.training.flow import FlowStage, equal_probability_boundaries, times_within
from latte.training.log import LOG, plot_losses
from latte.training.loop import train
from latte.training.optimizers import make_optimizers
from latte.training.run import run_stage
from latte.training.settings import TrainSettings
from latte.training.stage import Rows, Stage
from latte.training.states import STATE, states_of
from latte.training.vision import VisionStage
from latte.training.vlm import VlmStage
from latte.training.world import STAGES
from runtime.errors import CheckpointError, InputError, TrainingError
from tests.tiny import save_tiny, tiny_model, tiny_vlm

ROWS = Rows(0, range(4), 4)


def settings(steps: int, **changes: object) -> TrainSettings:
    values = {
        "max_train_steps": steps,
        "train_batch_size": 4,
        "learning_rate": 2e-3,
        "lr_warmup_steps": 2,
        "ema_decay": 0.5,
        "cpu": True,
    }
    return TrainSettings.model_validate(values | changes)


def make_stage(name: str) -> Stage:
    torch.manual_seed(0)
    if name == "autoencoder":
        return AutoencoderStage(small_autoencoder(), BusyScenes())
    if name == "flow":
        return ShapesFlowStage(tiny_model())
    vlm, tokenizer = tiny_vlm()
    if name == "vision":
        return VisionStage(vlm, small_image_processor(), LabelledScenes())
    return VlmStage(vlm, ConversationEncoder(tokenizer, small_image_processor()), ShapesConversations())


def losses_of(stage: Stage, step: int) -> dict[str, Tensor]:
    with torch.no_grad():
        prepared = stage.prepare(stage.batch(step // stage.steps_per_batch, ROWS), torch.device("cpu"))
    return stage.losses(stage.module, prepared, step, ROWS)


@pytest.mark.parametrize("name", STAGES)
def test_a_few_steps_lower_the_loss_on_the_same_batch(name: str) -> None:
    stage = make_stage(name)
    before = float(sum(losses_of(stage, 0).values()).detach())
    optimizer = torch.optim.AdamW([p for p in stage.module.parameters() if p.requires_grad], lr=2e-3)
    for _ in range(12):
        optimizer.zero_grad()
        sum(losses_of(stage, 0).values()).backward()
        optimizer.step()
    assert float(sum(losses_of(stage, 0).values()).detach()) < 0.95 * before


@pytest.mark.parametrize(("name", "optimizer"), [*((name, "adamw") for name in STAGES), ("flow", "muon")])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    name: str, optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_stage(name)
    train(whole, settings(8, optimizer=optimizer), tmp_path / "whole")

    interrupted = make_stage(name)
    losses = type(interrupted).losses

    def stop_at_5(self: Stage, module: nn.Module, prepared: object, step: int, rows: Rows) -> dict[str, Tensor]:
        if step == 5:
            raise RuntimeError("as if the machine had failed")
        return losses(self, module, prepared, step, rows)

    monkeypatch.setattr(type(interrupted), "losses", stop_at_5)
    with pytest.raises(RuntimeError, match="machine"):
        train(interrupted, settings(8, optimizer=optimizer, checkpointing_steps=1), tmp_path / "halves")
    monkeypatch.undo()
    resumed = make_stage(name)
    train(resumed, settings(8, optimizer=optimizer), tmp_path / "halves")

    for (parameter_name, a), b in zip(whole.module.named_parameters(), resumed.module.parameters(), strict=True):
        assert torch.equal(a, b), parameter_name
    logs = [(tmp_path / run / LOG).read_text().splitlines() for run in ("whole", "halves")]
    assert [json.loads(line)["step"] for line in logs[0]] == [json.loads(line)["step"] for line in logs[1]]


def test_a_run_that_is_asked_to_stop_saves_its_state_first(tmp_path: Path) -> None:
    stage = make_stage("autoencoder")
    batch = stage.batch

    def terminate(index: int, rows: Rows) -> Tensor:
        if index == 2:
            for _ in range(2):  # to the process, and to its group
                os.kill(os.getpid(), signal.SIGTERM)
        return batch(index, rows)

    stage.batch = terminate  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        train(stage, settings(8), tmp_path)
    assert [state.name for state in states_of(tmp_path)] == ["checkpoint-3"]


def test_the_term_for_kinds_is_the_share_of_another_kind_whatever_its_size() -> None:
    other = torch.randn(3, 2, 4, 4)
    other[1] *= 0.01
    other[2] = 0  # the prompt leaves the image open
    half_way = 0.5 * other
    assert share_of_other(half_way, other).item() == pytest.approx(0.25 * 2 / 3, rel=1e-3)
    elsewhere = half_way.roll(1, 1) * torch.tensor([1.0, -1.0])[:, None, None]  # at a right angle to `other`
    assert share_of_other(elsewhere, other).item() < 1e-8
    assert share_of_other(torch.ones(3, 2, 4, 4), torch.zeros(3, 2, 4, 4)).item() == 0


def test_a_run_goes_on_only_with_the_settings_that_it_began_with(tmp_path: Path) -> None:
    train(make_stage("autoencoder"), settings(2), tmp_path)
    with pytest.raises(CheckpointError, match=r"learning_rate was 0\.002, is 0\.001"):
        train(make_stage("autoencoder"), settings(2, learning_rate=1e-3), tmp_path)
    with pytest.raises(CheckpointError, match="a step had 4 rows, has 8"):
        train(make_stage("autoencoder"), settings(2, gradient_accumulation_steps=2), tmp_path)
    with pytest.raises(CheckpointError, match="2 steps are done, 1 are asked for"):
        train(make_stage("autoencoder"), settings(1), tmp_path)


def test_a_run_can_be_extended_and_keeps_the_newest_states(tmp_path: Path) -> None:
    train(make_stage("autoencoder"), settings(2), tmp_path)
    train(make_stage("autoencoder"), settings(5, checkpointing_steps=1), tmp_path)
    assert [state.name for state in states_of(tmp_path)] == ["checkpoint-5", "checkpoint-4"]
    with safe_open(tmp_path / "checkpoint-5" / STATE, framework="pt") as file:
        assert file.metadata()["step"] == "5"


def test_a_run_that_went_back_goes_on_from_there(tmp_path: Path) -> None:
    """A later run took the newest state, which was of the branch that had been left."""
    every = {"checkpointing_steps": 2, "checkpoints_total_limit": 2}
    train(make_stage("autoencoder"), settings(6, **every), tmp_path)
    train(make_stage("autoencoder"), settings(5, **every), tmp_path, resume_from=tmp_path / "checkpoint-4")
    assert [state.name for state in states_of(tmp_path)] == ["checkpoint-5", "checkpoint-4"]
    assert (tmp_path / "left-6" / STATE).is_file()


def test_a_run_does_not_go_on_with_another_autoencoder(tmp_path: Path) -> None:
    train(make_stage("flow"), settings(2), tmp_path)
    other = make_stage("flow")
    with torch.no_grad():
        next(other.frozen[1].parameters()).add_(0.1)
    with pytest.raises(CheckpointError, match="parts that are not trained"):
        train(other, settings(4), tmp_path)


def test_a_state_that_cannot_be_read_is_not_the_only_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(make_stage("autoencoder"), settings(4, checkpointing_steps=1), tmp_path)
    (tmp_path / "checkpoint-4" / STATE).write_bytes(b"cut off")
    train(make_stage("autoencoder"), settings(4), tmp_path)
    assert "going on from" in capsys.readouterr().err
    for path in tmp_path.glob("*/*.safetensors"):
        path.write_bytes(b"cut off")
    with pytest.raises(CheckpointError, match="cannot be read"):
        train(make_stage("autoencoder"), settings(4), tmp_path)


def test_a_state_with_damaged_values_is_named(tmp_path: Path) -> None:
    """It became a checkpoint of values that are not finite, and the good state before it was removed."""
    train(make_stage("autoencoder"), settings(2, checkpointing_steps=1), tmp_path)
    path = tmp_path / "checkpoint-2" / STATE
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = b"\xff" * (len(content) - len(content) // 2)
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is damaged: .* is not finite; delete it"):
        train(make_stage("autoencoder"), settings(3), tmp_path)
    assert [state.name for state in states_of(tmp_path)] == ["checkpoint-2", "checkpoint-1"]


def test_a_save_that_is_cut_off_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(make_stage("autoencoder"), settings(2), tmp_path)
    before = (tmp_path / "checkpoint-2" / STATE).read_bytes()

    def write_half(tensors: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(before[:1000])
        raise OSError("no space left on device")

    monkeypatch.setattr("latte.training.states.save_file", write_half)
    with pytest.raises(OSError, match="no space"):
        train(make_stage("autoencoder"), settings(3), tmp_path)
    monkeypatch.undo()
    assert [state.name for state in states_of(tmp_path)] == ["checkpoint-2"]
    load_file(tmp_path / "checkpoint-2" / STATE)
    train(make_stage("autoencoder"), settings(3), tmp_path)
    assert states_of(tmp_path)[0].name == "checkpoint-3"


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    stage = make_stage("autoencoder")
    with torch.no_grad():
        next(stage.module.parameters()).fill_(float("nan"))
    with pytest.raises(TrainingError, match="lower the learning rate"):
        train(stage, settings(2), tmp_path)


def test_a_gradient_that_is_not_finite_touches_nothing(tmp_path: Path) -> None:
    stage = make_stage("autoencoder")
    losses = stage.losses

    def with_infinite_gradient(module: nn.Module, prepared: object, step: int, rows: Rows) -> dict[str, Tensor]:
        zero = next(stage.module.parameters()).sum() * 0
        # finite, with a slope that is not
        return {name: loss + zero.sqrt() for name, loss in losses(module, prepared, step, rows).items()}

    stage.losses = with_infinite_gradient  # type: ignore[method-assign]
    before = [p.detach().clone() for p in stage.module.parameters()]
    with pytest.raises(TrainingError, match="gradient's norm is nan"):
        train(stage, settings(2), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before, stage.module.parameters(), strict=True))


def test_weight_decay_spares_what_is_neutral_at_other_values_than_zero() -> None:
    stage = make_stage("flow")
    parameters = dict(stage.module.named_parameters())
    (adamw,) = make_optimizers(parameters, settings(1))
    decayed, spared = adamw.param_groups
    names = {id(p): name for name, p in parameters.items()}
    assert all(names[id(p)].endswith((".bias", "norm.weight", "_table")) for p in spared["params"])
    assert all(names[id(p)].endswith(".weight") and "norm" not in names[id(p)] for p in decayed["params"])
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.01, 0)


def test_muon_trains_the_matrices_inside_layers_only() -> None:
    parameters = {name: p for part in ("flow", "vlm") for name, p in make_stage(part).module.named_parameters()}
    _, muon = make_optimizers(parameters, settings(1, optimizer="muon", muon_learning_rate=0.5))
    names = {id(p): name for name, p in parameters.items()}
    trained = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    assert {"layers.0.q_proj.weight", "vlm.model.language_model.layers.0.mlp.up_proj.weight"} <= trained
    assert not {name for name in trained if "embed" in name or "head" in name or parameters[name].ndim != 2}
    assert {group["initial_lr"] for group in muon.param_groups} == {0.5}


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


def test_all_groups_are_trained_equally_often() -> None:
    stage = make_stage("flow")
    assert [name for step in range(8) for name in losses_of(stage, step)] == ["group_0", "group_1"] * 4


def test_one_group_can_be_trained_alone(tmp_path: Path) -> None:
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.flow.named_parameters()}
    stage = FlowStage(model, ScenePairs())
    stage.train_groups([1])
    train(stage, settings(3), tmp_path)
    changed = {name for name, p in model.flow.named_parameters() if not torch.equal(before[name], p)}
    assert any(name.startswith("layers.2.") for name in changed)
    assert "heads.1.proj.weight" in changed
    assert not {name for name in changed if name.startswith(("layers.0.", "layers.1.", "heads.0."))}
    assert set(json.loads((tmp_path / LOG).read_text())) >= {"group_1"}
    with pytest.raises(InputError, match="--groups must be from 0 to 1, got 2"):
        stage.train_groups([2])


def test_gradient_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for enabled in (False, True):
        stage = make_stage("flow")
        stage.module.gradient_checkpointing = enabled
        sum(losses_of(stage, 0).values()).backward()
        gradients.append({name: p.grad for name, p in stage.module.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_logit_normal_times_are_in_their_groups_interval_and_dense_in_the_middle() -> None:
    shares = (np.arange(1000) + 0.5) / 1000
    times = times_within((0.0, 1.0), shares, "logit_normal")
    assert np.mean((times > 0.25) & (times < 0.75)) == pytest.approx(0.728, abs=0.005)  # Φ(ln 3) − Φ(−ln 3)
    part = times_within((0.3, 0.6), shares, "logit_normal")
    assert part.min() >= 0.3
    assert part.max() <= 0.6
    boundaries = equal_probability_boundaries(4)
    counts, _ = np.histogram(times, boundaries)
    assert (abs(counts - 250) <= 1).all()


def test_the_stages_make_a_checkpoint_that_draws(tmp_path: Path) -> None:
    """The whole path from nothing to a checkpoint, a few steps a stage; every stage keeps what it does not train."""
    save_tiny(tmp_path / "start")
    checkpoint, world = tmp_path / "start", Shapes()
    for name in STAGES:
        before = load_checkpoint(checkpoint)
        checkpoint = run_stage(name, checkpoint, world, tmp_path / name, settings(4 if name == "flow" else 2))
        after = load_checkpoint(checkpoint)
        trained = {"autoencoder": "vae", "vision": "vlm"}.get(name, name)
        for part in ("flow", "vlm", "vae"):
            pairs = zip(getattr(before, part).parameters(), getattr(after, part).parameters(), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs) == (part != trained), (name, part)
        assert (before.config.latents_mean == after.config.latents_mean) == (name != "autoencoder")
    assert load_checkpoint(checkpoint).generate("a red circle", num_inference_steps=4).shape == (1, 24, 32, 3)
    assert (tmp_path / "flow" / "loss.png").is_file()
