"""What the arguments of the training commands mean.

All functions raise `InputError` for an argument that cannot be used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from pydantic import ValidationError

from latte.checkpoint import save_checkpoint
from latte.emoji.package import is_named_package
from latte.emoji.recipe import Emoji
from latte.emoji.recipe import untrained as untrained_emoji
from latte.shapes.recipe import Shapes
from latte.shapes.recipe import untrained as untrained_shapes
from latte.training.settings import TrainSettings
from latte.training.states import states_of
from latte.training.validation import ValidationOptions, read_prompts
from latte.training.world import World
from runtime.errors import InputError

Precision = Literal["fp32", "fp16", "bf16"]
MixedPrecision = Literal["no", "bf16"]
Optimizer = Literal["adamw", "muon"]
OutFolder = Annotated[Path, typer.Option("--out", "-o", help="Folder of the run; a run that was stopped continues.")]
BatchSize = Annotated[int | None, typer.Option(help="Rows of a process in a forward pass.")]
LearningRate = Annotated[float | None, typer.Option(help="Peak learning rate.")]
MuonLearningRate = Annotated[float | None, typer.Option(help="Peak learning rate of Muon.")]
WarmupSteps = Annotated[int | None, typer.Option(help="Steps of linear warm-up.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.", min=0)]
Mixed = Annotated[MixedPrecision, typer.Option(help="bf16: autocast, with weights in fp32.")]
OnCpu = Annotated[bool, typer.Option("--cpu", help="Train on the CPU even where there is a GPU.")]
ResumeFrom = Annotated[str, typer.Option(help="`latest`, or the folder of a state in --out.")]
ValidationPrompts = Annotated[
    list[str] | None,
    typer.Option(help="What to draw on the way: a prompt, or a file with one on each line; may be repeated."),
]
ReportTo = Annotated[
    list[str] | None, typer.Option(help="tensorboard or wandb, besides the log in --out; may be repeated.")
]
TRACKERS = ("tensorboard", "wandb", "jsonl")
"""Where a run can report to; the log in JSON lines is always written."""


def drawn_world(data: str, seed: int) -> Shapes | Emoji | None:
    """Returns the world whose scenes are drawn as they are needed; None for a data set."""
    if data == Shapes.name:
        return Shapes(seed)
    return Emoji(Path(data), seed) if is_named_package(Path(data)) else None


def validation_of(prompts: list[str] | None, steps: int | None, split: str | None) -> ValidationOptions | None:
    """Returns how to validate; None where no argument asks for it."""
    if not prompts and steps is None and split is None:
        return None
    every = ValidationOptions.every if steps is None else steps
    return ValidationOptions(every, read_prompts(prompts or []))


def size_of(text: str) -> tuple[int, int]:
    """Returns height and width of `--resolution`."""
    try:
        sides = [int(part) for part in text.split("x")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise InputError(f"--resolution must be a number of pixels, or height x width such as 256x384, got {text!r}")
    return sides[0], sides[-1]


def numbers_of(text: str, option: str) -> list[int]:
    """Returns the numbers of an option such as `--groups 0,1`."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"{option} must be numbers with commas between them, got {text!r}") from error


def trackers_of(names: list[str]) -> tuple[str, ...]:
    """Returns accelerate's trackers of `--report-to`."""
    if unknown := set(names) - set(TRACKERS):
        raise InputError(f"--report-to must be one of {', '.join(TRACKERS)}, got {sorted(unknown)[0]}")
    return tuple(name for name in names if name != "jsonl")


def changed(settings: TrainSettings, given: dict[str, Any]) -> TrainSettings:
    """Returns settings with what the arguments say instead; an argument that is None says nothing."""
    changes = {name: value for name, value in given.items() if value is not None}
    try:
        return TrainSettings.model_validate(settings.model_dump() | changes)
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0]).replace("_", "-")
        raise InputError(f"--{option} {first['input']}: {first['msg'].lower()}") from error


def untrained_checkpoint(out: Path, world: World, seed: int) -> Path:
    """Writes the untrained model of a world into a run's folder, once."""
    folder = out / "untrained"
    if not (folder / "config.json").is_file():
        if isinstance(world, Shapes):
            model, image_processor = untrained_shapes(seed)
        elif isinstance(world, Emoji):
            model, image_processor = untrained_emoji(world.catalogue, seed)
        else:
            raise InputError(f"{world.name} brings no model along; give a checkpoint, such as one of `latte-flow init`")
        save_checkpoint(model, image_processor, folder, torch.float32)
    return folder


def state_of(name: str, out: Path) -> Path | None:
    """Returns the folder of a state to resume from; None for the newest."""
    if name == "latest":
        return None
    path = Path(name) if Path(name).is_dir() else out / name
    if not path.is_dir():
        known = ", ".join(state.name for state in states_of(out)) or "none yet"
        raise InputError(f"no state at {name}; {out} contains: {known}")
    return path
