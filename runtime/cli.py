"""The command `latte-flow`, assembled from the commands of each package.

A command's module is imported only when that command is called, so that `generate` runs without torch.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from runtime.console import command_group, stderr, stdout
from runtime.errors import LatteFlowError, missing_extra


@dataclass(frozen=True)
class _Command:
    module: str
    function: str
    summary: str
    extra: str


COMMANDS = {
    "demo": _Command(
        "export.commands", "demo", "Export, verify, generate and ask with the shipped checkpoints.", "export,cpu"
    ),
    "generate": _Command("runtime.commands", "generate", "Generate images from prompts.", "cpu"),
    "ask": _Command("runtime.commands", "ask", "Ask a question about images.", "cpu"),
    "run-batch": _Command("runtime.batch.commands", "run_batch", "Draw and answer all rows of a file.", "batch,cpu"),
    "inspect": _Command("runtime.commands", "inspect", "Show what a bundle contains.", "cpu"),
    "doctor": _Command("runtime.commands", "doctor", "Show what this machine has, and how to fix each problem.", ""),
    "export": _Command("export.commands", "export", "Turn a checkpoint into a bundle of engines.", "export,cpu"),
    "verify": _Command("export.commands", "verify", "Compare a bundle with PyTorch.", "export,cpu"),
    "build": _Command("export.plans.commands", "build", "Build TensorRT plans from a bundle's graphs.", "gpu"),
    "repository": _Command("model_repository.commands", "repository", "Write a Triton model repository.", "triton,cpu"),
    "serve": _Command(
        "model_repository.commands", "serve", "Serve a bundle with Triton on this machine.", "triton,cpu"
    ),
    "gateway": _Command(
        "model_repository.gateway_commands", "gateway", "Serve a bundle by OpenAI's HTTP API.", "gateway,cpu"
    ),
    "playground": _Command(
        "model_repository.gateway_commands", "playground", "Draw, ask and compare on a page.", "playground,cpu"
    ),
    "client": _Command("model_repository.client_commands", "app", "Send requests to a running service.", "triton"),
    "control": _Command("model_repository.control_commands", "app", "Operate a running service with its key.", ""),
    "roundtrip": _Command(
        "export.commands", "roundtrip", "Generate images, ask about them, and compare with the pixels.", "export,cpu"
    ),
    "bench": _Command(
        "export.benchmarks.commands", "app", "Measure speed, memory and quality on this machine.", "export,cpu"
    ),
    "init": _Command("latte.commands", "init", "Make a checkpoint from a Qwen2-VL and a DC-AE.", "export"),
    "train": _Command("latte.training.commands", "train", "Train a checkpoint on images and captions.", "export"),
    "distill": _Command(
        "latte.training.distill_command", "distill", "Distil a checkpoint into one that draws in few steps.", "export"
    ),
    "merge": _Command("latte.commands", "merge", "Put together expert groups that were trained apart.", "export"),
    "data": _Command("latte.emoji.commands", "app", "Make data sets to train on.", "train"),
    "score": _Command("latte.commands", "score", "Score a checkpoint's images and answers.", "export"),
    "fidelity": _Command(
        "latte.fidelity.commands", "fidelity", "Measure Fréchet and kernel distance to held-out images.", "train"
    ),
}


class LazyGroup(TyperGroup):
    """Lists all commands from the table, and imports only the one that is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        command = COMMANDS.get(cmd_name)
        return TyperCommand(cmd_name, help=command.summary) if command else None

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        if args and args[0] in COMMANDS:
            return args[0], load_command(args[0]), args[1:]
        return super().resolve_command(ctx, args)


def load_command(name: str) -> Any:
    """Imports a command's module and returns the command.

    Raises:
        MissingExtraError: an extra that it needs is not installed.
    """
    command = COMMANDS[name]
    try:
        function = getattr(import_module(command.module), command.function)  # or a group of commands
    except ModuleNotFoundError as error:
        raise missing_extra(name, error, command.extra) from error
    if isinstance(function, typer.Typer):
        return typer.main.get_command(function)
    single = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    single.command(name, no_args_is_help=name not in ("demo", "doctor", "score"))(function)
    return typer.main.get_command(single)


app = command_group("LaTtE-Flow from checkpoint to production: train, export, verify, generate, ask, serve.", LazyGroup)


def _show_version(wanted: bool) -> None:
    if wanted:
        stdout.print(f"latte-flow {version('latte-flow')}", markup=False)
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """The option's callback does the work, before a missing command is reported."""


def main() -> None:
    """Entry point: a user's error is one line on stderr and a non-zero exit code."""
    try:
        app()
    except LatteFlowError as error:
        stderr.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        stderr.print("interrupted")
        sys.exit(130)


if __name__ == "__main__":
    main()
