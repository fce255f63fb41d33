"""Several processes on this machine, over gloo: what they learn, and how they go on after one was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from latte.checkpoint import load_checkpoint
from latte.shapes.recipe import Shapes
from latte.training.log import LOG
from latte.training.loop import make_accelerator
from latte.training.run import RunOptions, run_stage
from latte.training.settings import TrainSettings
from latte.training.states import STATE, states_of
from runtime.errors import InputError
from tests.latte.data.worlds import folder_with_metadata
from tests.tiny import save_tiny, save_untrained

ROOT = Path(__file__).parents[3]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
SETTINGS = {
    "max_train_steps": 6,
    "ema_decay": 0.5,
    "learning_rate": 1e-3,
    "lr_warmup_steps": 2,
    "cpu": True,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("processes") / "tiny"
    save_tiny(path)
    return path


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("processes") / "untrained"
    save_untrained(path)
    return path


def command(checkpoint: Path, out: Path, *options: object, data: object = "shapes", processes: int = 2) -> list[str]:
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, "-m")
    values = {name: value for name, value in SETTINGS.items() if name != "cpu"} | {"train_batch_size": 2}
    given = [item for name, value in values.items() for item in (f"--{name.replace('_', '-')}", value)]
    arguments = ("train", checkpoint, "--data", data, "--out", out, "--cpu", "--precision", "fp32", *given)
    return [str(part) for part in (*launcher, "runtime.cli", *arguments, *options)]


def run(checkpoint: Path, out: Path, *options: object, data: object = "shapes", processes: int = 2) -> None:
    arguments = command(checkpoint, out, *options, data=data, processes=processes)
    result = subprocess.run(arguments, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def two_processes(checkpoint: Path) -> Path:
    out = checkpoint.parent / "two"
    run(checkpoint, out, "--checkpointing-steps", 3, "--validation-steps", 6)
    return out


def distance(first: Path, second: Path) -> float:
    a, b = (load_file(out / "checkpoint" / "model.safetensors") for out in (first, second))
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize(
    "split",
    [{"train_batch_size": 4}, {"train_batch_size": 2, "gradient_accumulation_steps": 2}],
    ids=["one pass", "two passes"],
)
def test_two_processes_learn_what_one_does_with_the_batch_doubled(
    split: dict[str, int], checkpoint: Path, two_processes: Path, tmp_path: Path
) -> None:
    settings = TrainSettings.model_validate(SETTINGS | split)
    run_stage("flow", checkpoint, Shapes(), tmp_path, settings, RunOptions(precision="fp32"))
    line, other = (json.loads((path / LOG).read_text().splitlines()[-1]) for path in (tmp_path, two_processes))
    for group in ("group_0", "group_1"):
        assert line[group] == pytest.approx(other[group], rel=1e-5)
    assert distance(tmp_path, two_processes) < 2e-5  # AdamW makes steps of 1e-3 of gradients that differ by rounding


def test_sharded_weights_learn_the_same(checkpoint: Path, two_processes: Path) -> None:
    out = checkpoint.parent / "sharded"
    run(checkpoint, out, "--sharding", "fsdp2", "--validation-steps", 6)
    assert distance(out, two_processes) < 2e-5
    sharded, shared = (json.loads((path / "validation.jsonl").read_text()) for path in (out, two_processes))
    assert sharded["losses"] == pytest.approx(shared["losses"], rel=1e-4)


def test_two_processes_fill_a_cache_and_begin_with_the_same_statistics(untrained: Path, tmp_path: Path) -> None:
    images = folder_with_metadata(tmp_path / "images", 9, (32, 24))
    for processes, size in ((2, 2), (1, 4)):
        cache, out = tmp_path / f"cache-{processes}", tmp_path / f"run-{processes}"
        options = ("--cache-latents", cache, "--train-batch-size", size)
        run(untrained, out, *options, data=images, processes=processes)
    assert len(list((tmp_path / "cache-2").glob("*/listings/*/*-of-2"))) == 2
    assert distance(tmp_path / "run-1", tmp_path / "run-2") < 2e-5
    one, two = (load_checkpoint(tmp_path / name / "checkpoint").config for name in ("run-1", "run-2"))
    assert one.latents_std == pytest.approx(two.latents_std, rel=1e-5)
    assert any(one.latents_mean)


def test_a_run_of_which_a_process_was_killed_goes_on_bit_for_bit(checkpoint: Path, two_processes: Path) -> None:
    out = checkpoint.parent / "killed"
    with subprocess.Popen(
        command(checkpoint, out, "--checkpointing-steps", 3),
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as launched:
        deadline = time.monotonic() + 200
        while not states_of(out) and launched.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        os.killpg(launched.pid, signal.SIGKILL)
    (state,) = states_of(out)[-1:]
    assert state.name == "checkpoint-3"
    for newer in states_of(out)[:-1]:  # it may have been too quick for the signal
        (newer / STATE).unlink()
        newer.rmdir()
    run(checkpoint, out, "--checkpointing-steps", 3)
    assert distance(out, two_processes) == 0


def test_sharding_needs_several_processes() -> None:
    with pytest.raises(InputError, match="fsdp2 splits the weights over processes, and there is one"):
        make_accelerator(TrainSettings.model_validate(SETTINGS | {"train_batch_size": 4, "sharding": "fsdp2"}))
