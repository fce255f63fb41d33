"""Several processes on this machine, over gloo: what they learn, and how they go on after one was killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

import runtime.cli
from latte.checkpoint import load_checkpoint
from latte.shapes.recipe import Shapes
from latte.training.log import LOG
from latte.training.loop import make_accelerator
from latte.training.run import RunOptions, run_stage
from latte.training.settings import TrainSettings
from latte.training.states import STATE, states_of
from model_repository.server import free_port
from runtime.errors import InputError
from tests.latte.data.worlds import folder_with_metadata
from tests.tiny import save_tiny, save_untrained

ROOT = Path(__file__).parents[3]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
SETTINGS = {
    "max_train_steps": 6,
    "ema_decay": 0.5,
    "optimizer": "adamw",
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


def training(checkpoint: Path, out: Path, *options: object, data: object = "shapes") -> list[str]:
    """The arguments of `latte-flow`."""
    values = {name: value for name, value in SETTINGS.items() if name != "cpu"} | {"train_batch_size": 2}
    given = [item for name, value in values.items() for item in (f"--{name.replace('_', '-')}", value)]
    arguments = ("train", checkpoint, "--data", data, "--out", out, "--cpu", "--precision", "fp32", *given, *options)
    return [str(argument) for argument in arguments]


def start(checkpoint: Path, out: Path, *options: object, data: object = "shapes", processes: int = 2) -> list[Any]:
    """Starts what `torchrun` would, as forks of a process that has imported everything: most of the time is imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["latte.training.commands", "latte.training.run", "latte.shapes.recipe"])
    variables = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    arguments = training(checkpoint, out, *options, data=data)
    ranks: list[Any] = []
    for rank in range(processes):
        own = variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(context.Process(target=train_as_rank, args=(arguments, own, said_by(out, rank))))
        with patch.dict(os.environ, ENVIRONMENT):  # of the process that they are forks of
            ranks[-1].start()
    return ranks


def said_by(out: Path, rank: int) -> Path:
    return out.with_name(f"{out.name}.{rank}.txt")


def run(checkpoint: Path, out: Path, *options: object, data: object = "shapes", processes: int = 2) -> None:
    ranks = start(checkpoint, out, *options, data=data, processes=processes)
    for process in ranks:
        process.join(300)
    said = [said_by(out, rank).read_text() for rank in range(processes)]
    assert [process.exitcode for process in ranks] == [0] * processes, said


def train_as_rank(arguments: list[str], variables: dict[str, str], said: Path) -> None:
    """One process of a run; what it says goes to a file."""
    with said.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= variables
    torch.set_num_threads(1)
    sys.argv = ["latte-flow", *arguments]
    runtime.cli.main()


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
    ranks = start(checkpoint, out, "--checkpointing-steps", 3)
    deadline = time.monotonic() + 200
    while not states_of(out) and any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
        time.sleep(0.01)
    for process in ranks:
        process.kill()
        process.join()
    (state,) = states_of(out)[-1:]
    assert state.name == "checkpoint-3"
    for newer in states_of(out)[:-1]:  # it may have been too quick for the signal
        (newer / STATE).unlink()
        newer.rmdir()
    run(checkpoint, out, "--checkpointing-steps", 3)
    assert distance(out, two_processes) == 0


def test_torchrun_starts_the_processes(checkpoint: Path, tmp_path: Path) -> None:
    """Without `--cpu`, where no GPU is to be seen: the processes make one run, with one log."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    arguments = training(checkpoint, tmp_path / "run", "--max-train-steps", 1)
    command = [*launcher, "runtime.cli", *(argument for argument in arguments if argument != "--cpu")]
    environment = ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": ""}
    finished = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert len((tmp_path / "run" / LOG).read_text(encoding="utf-8").splitlines()) == 1
    assert load_checkpoint(tmp_path / "run" / "checkpoint").config.schedule.num_groups == 2


def test_sharding_needs_several_processes() -> None:
    with pytest.raises(InputError, match="fsdp2 splits the weights over processes, and there is one"):
        make_accelerator(TrainSettings.model_validate(SETTINGS | {"train_batch_size": 4, "sharding": "fsdp2"}))
