"""Expert groups that were trained apart become one checkpoint, and what does not belong together is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from latte.checkpoint import load_checkpoint, load_config
from latte.merge import merge
from latte.model import group_of_weight
from latte.shapes.recipe import Shapes
from latte.training.run import RunOptions, run_stage
from latte.training.settings import TrainSettings
from runtime.errors import CheckpointError
from runtime.files import write_text
from tests.tiny import save_untrained

SETTINGS = TrainSettings(max_train_steps=3, train_batch_size=4, learning_rate=1e-2, lr_warmup_steps=0, cpu=True)


def train(base: Path, out: Path, groups: tuple[int, ...], *, freeze: bool = True, precision: str = "fp32") -> Path:
    options = RunOptions(groups=groups, freeze_embeddings=freeze, precision=precision)
    return run_stage("flow", base, Shapes(), out, SETTINGS, options)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained checkpoint whose VLM was trained after `init` copied its layers into the flow layers."""
    path = tmp_path_factory.mktemp("merge") / "base"
    save_untrained(path)
    weights = path / "vlm" / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, weights, {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def experts(base: Path) -> list[Path]:
    """Both groups, trained apart with frozen embeddings."""
    return [train(base, base.parent / f"run-{group}", (group,)) for group in (0, 1)]


def weights_of(checkpoint: Path) -> dict[str, Tensor]:
    return load_file(checkpoint / "model.safetensors")


def test_groups_that_were_trained_apart_are_merged_bit_for_bit(base: Path, experts: list[Path], tmp_path: Path) -> None:
    merged = merge(base, experts, tmp_path / "merged")
    assert merged.sources == tuple(experts)
    assert merged.embeddings == "same"
    config = load_config(tmp_path / "merged")
    assert config == load_config(experts[0])
    assert any(config.latents_mean)  # which the untrained base does not have
    parts = [weights_of(expert) for expert in experts]
    for name, weight in weights_of(tmp_path / "merged").items():
        group = group_of_weight(name, config)
        assert torch.equal(weight, parts[group or 0][name]), name
    model = load_checkpoint(tmp_path / "merged")
    assert model.generate("a red circle", num_inference_steps=4).shape == (1, 24, 32, 3)


def test_a_group_trained_after_another_leaves_it_as_it_is(base: Path, experts: list[Path], tmp_path: Path) -> None:
    """Training once copied the VLM's layers into all groups when any was untrained, and so lost the trained ones."""
    both = weights_of(train(experts[0], tmp_path / "both", (1,)))
    merge(base, experts, tmp_path / "merged")
    merged = weights_of(tmp_path / "merged")
    assert both.keys() == merged.keys()
    assert all(torch.equal(both[name], weight) for name, weight in merged.items())


@pytest.mark.parametrize("embeddings", ["average", "base"])
def test_embeddings_that_differ_are_averaged_or_the_bases(embeddings: str, base: Path, tmp_path: Path) -> None:
    experts = [train(base, tmp_path / str(group), (group,), freeze=False, precision="fp16") for group in (0, 1)]
    merged = merge(base, experts, tmp_path / "merged", embeddings)  # type: ignore[arg-type]
    assert merged.embeddings == embeddings
    start, one, two, both = map(weights_of, (base, *experts, tmp_path / "merged"))
    for name in ("latent_embed.weight", "time_modulation.bias"):
        assert not torch.equal(one[name], two[name])
        expected = (one[name].float() + two[name].float()) / 2 if embeddings == "average" else start[name]
        assert torch.equal(both[name], expected.half()), name
    assert torch.equal(both["heads.1.proj.weight"], two["heads.1.proj.weight"])


def change_config(expert: Path) -> None:
    config = load_config(expert)
    write_text(expert / "config.json", config.model_copy(update={"latents_std": (2.0,) * 4}).model_dump_json())


def change_weights(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def changed(expert: Path) -> None:
        tensors = weights_of(expert)
        change(tensors)
        save_file(tensors, expert / "model.safetensors")

    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_config, "has another latents_std than .*; merge experts that were trained from one checkpoint"),
        (lambda expert: (expert / "tokenizer.json").write_text("{}"), "differs from .* in tokenizer.json; merge"),
        (lambda expert: (expert / "vae" / "config.json").unlink(), "differs from .* in vae/config.json"),
        (change_weights(lambda t: t["heads.0.proj.weight"].add_(1)), "have both trained group 0; give one of them"),
        (change_weights(lambda t: t.pop("heads.0.proj.weight")), "only one has heads.0.proj.weight"),
        (
            change_weights(lambda t: t.update({name: tensor.half() for name, tensor in t.items()})),
            "the experts have weights of several precisions, float16, float32",
        ),
        (lambda expert: (expert / "model.safetensors").write_bytes(b"no"), "model.safetensors cannot be read"),
    ],
)  # fmt: skip
def test_what_does_not_belong_together_is_refused_in_one_line(
    change: Callable[[Path], None], message: str, base: Path, experts: list[Path], tmp_path: Path
) -> None:
    second = Path(shutil.copytree(experts[1], tmp_path / "second"))
    change(second)
    with pytest.raises(CheckpointError, match=message) as caught:
        merge(base, [experts[0], second], tmp_path / "merged")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "merged").exists()


def test_an_expert_that_trained_nothing_is_refused(base: Path, experts: list[Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has trained no expert group of .*run-0"):
        merge(experts[0], [experts[0]], tmp_path / "merged")


def test_the_command_says_where_each_group_comes_from(
    base: Path, experts: list[Path], tmp_path: Path, run_command: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, err = run_command("merge", base, experts[1], "--out", tmp_path / "merged")
    assert code == 0, err
    assert [line.split("│")[1].strip() for line in out.splitlines() if "│" in line] == ["0", "1", "embeddings"]
    assert out.splitlines()[-1] == str(tmp_path / "merged")
    code, _, err = run_command("merge", base, experts[1], "--out", tmp_path / "merged")
    assert code == 2
    assert "already contains a checkpoint; pass --force" in err
