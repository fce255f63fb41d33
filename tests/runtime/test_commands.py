"""`generate` and `inspect` as a user calls them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from PIL import Image

from runtime.cli import COMMANDS
from runtime.manifest import load_manifest

RunCommand = Callable[..., tuple[int, str, str]]


def test_generate_writes_pngs_that_say_how_they_were_made(
    bundle: Path, tmp_path: Path, run_command: RunCommand
) -> None:
    arguments = ("--seed", 3, "--num-inference-steps", 2, "--guidance-scale", 2.5, "--num-images-per-prompt", 2)
    arguments += ("--guidance-interval", 0, 0.75)  # type: ignore[assignment]
    code, out, _ = run_command("generate", bundle, "a red circle", "a ring", "-o", tmp_path, *arguments, "--grid")
    assert code == 0
    files = [Path(line) for line in out.splitlines()]
    assert [file.name for file in files] == [
        "000-a-red-circle-3.png",
        "001-a-red-circle-4.png",
        "002-a-ring-5.png",
        "003-a-ring-6.png",
        "grid.png",
    ]
    with Image.open(files[2]) as image:
        text = image.text
    assert text["prompt"] == "a ring"
    assert (text["seed"], text["num_inference_steps"], text["guidance_scale"]) == ("5", "2", "2.5")
    assert text["guidance_interval"] == "0 0.75"
    assert text["bundle"] == load_manifest(bundle).bundle_hash()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(file.name for file in files)


def test_json_is_one_object_on_stdout(bundle: Path, tmp_path: Path, run_command: RunCommand) -> None:
    code, out, _ = run_command(
        "generate", bundle, "a ring", "-o", tmp_path, "--seed", 0, "--num-inference-steps", 10, "--json"
    )
    report = json.loads(out)
    assert code == 0
    assert set(report) == {"files", "seeds", "seconds", "steps_per_group", "bundle"}
    assert report["steps_per_group"] == [3, 7]
    assert Path(report["files"][0]).is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--num-inference-steps", 0), "num_inference_steps must be at least 1"),
        (("--guidance-scale", "nan"), "guidance_scale must be from -100 to 100"),
        (("--provider", "tpu"), "unknown provider 'tpu'"),
        (("--num-images-per-prompt", 0), "at least 1"),
        (("--guidance-interval", 0.5, 2), "guidance_interval must be flow times 0 <= start < end <= 1, got 0.5 to 2"),
        (("--seed", -4), "a seed must be from 0 to"),
    ],
)
def test_a_bad_option_is_one_line_and_exit_code_2(
    arguments: tuple[object, ...], message: str, bundle: Path, tmp_path: Path, run_command: RunCommand
) -> None:
    code, out, error = run_command("generate", bundle, "a ring", "-o", tmp_path / "out", *arguments)
    assert (code, out) == (2, "")
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_an_output_folder_that_cannot_be_written_is_said_before_any_work(
    bundle: Path, tmp_path: Path, run_command: RunCommand
) -> None:
    (tmp_path / "file").write_text("in the way")
    code, out, error = run_command("generate", bundle, "a ring", "-o", tmp_path / "file" / "images")
    assert (code, out) == (2, "")
    assert "choose another output folder" in error


def test_inspect_shows_engines_and_who_serves_which_time(bundle: Path, run_command: RunCommand) -> None:
    code, out, _ = run_command("inspect", bundle)
    assert code == 0
    for engine in ("vlm", "expert_0", "expert_1", "solver_step", "vae_decoder"):
        assert engine in out
    assert re.search(r"noise +0: 0 to 0.3 +1: 0.3 to 1 +data", out)
    assert "verified: " in out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name: str, run_command: RunCommand) -> None:
    code, out, _ = run_command(name, "--help")
    assert code == 0
    assert "Example" in out
    assert f"latte-flow {name}" in out


def test_the_version_is_printed(run_command: RunCommand) -> None:
    assert run_command("--version") == (0, f"latte-flow {version('latte-flow')}\n", "")


def test_an_unknown_command_is_said_so(run_command: RunCommand) -> None:
    code, _, error = run_command("paint")
    assert code == 2
    assert "No such command 'paint'" in error


def test_renamed_options_still_work_and_say_so(
    bundle: Path, tmp_path: Path, run_command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("generate", bundle, "a ring", "-o", tmp_path, "--num-inference-steps", 1)
    code, _, error = run_command(*command, "--profile", tmp_path / "trace.json")
    assert code == 0
    assert error.startswith("note: --profile is now --trace")
    assert (tmp_path / "trace.json").is_file()
    old = ("build", bundle, "--backend", "tensorrt-rtx", "--engines", "solver_step", "--explain")
    code, out, error = run_command(*old)
    assert code == 0, error
    assert "solver_step" in out
    assert "expert_0" not in out
    assert run_command("build", bundle, "--engine", "expert_0", "--engines", "solver_step", "--dry-run")[0] == 2
    for name in ("--backend is now --provider", "--engines is now --engine", "--explain is now --dry-run"):
        assert name in error
    missing = ("init", tmp_path / "new", "--vlm", tmp_path / "nothing", "--vae", tmp_path / "nothing")
    code, _, error = run_command(*missing, "--dtype", "float32")
    assert code == 2
    assert error.startswith("note: --dtype is now --precision")


@pytest.mark.parametrize("command", [("build",), ("init",), ("generate",)])
def test_help_does_not_show_old_names(command: tuple[str, ...], run_command: RunCommand) -> None:
    out = run_command(*command, "--help")[1]
    assert not {"--backend", "--engines", "--explain", "--dtype", "--profile"} & set(out.split())
