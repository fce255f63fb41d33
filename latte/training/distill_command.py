"""The command `latte-flow distill`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from latte.checkpoint import load_config, resolve_checkpoint
from latte.data.source import open_data_set
from latte.training.arguments import (
    BatchSize,
    LearningRate,
    Mixed,
    MuonLearningRate,
    OnCpu,
    Optimizer,
    OutFolder,
    Precision,
    ReportTo,
    ResumeFrom,
    Seed,
    ValidationPrompts,
    WarmupSteps,
    changed,
    drawn_world,
    numbers_of,
    state_of,
    trackers_of,
    validation_of,
)
from latte.training.data_set import DataOptions, DataSetWorld
from latte.training.distillation import Distillation
from latte.training.run import RunOptions, run_stage
from latte.training.settings import TrainSettings
from runtime.flow_time import check_guidance_scale

SETTINGS = TrainSettings(
    max_train_steps=8000, train_batch_size=64, learning_rate=5e-4, lr_warmup_steps=200, ema_decay=0.999
)


def distill(
    checkpoint: Annotated[str, typer.Argument(help="The teacher: the name of a shipped checkpoint, or a folder.")],
    out: OutFolder,
    data: Annotated[
        str, typer.Option(help="What the teacher was trained on: see `latte-flow train --help`.")
    ] = "shapes",
    steps: Annotated[
        str,
        typer.Option(help="Numbers of sampling steps of the student, multiples of its groups; the default first."),
    ] = "4,8",
    guidance_scale: Annotated[
        float | None, typer.Option(help="Guidance scale to build in; by default the teacher's.")
    ] = None,
    teacher_steps: Annotated[
        int | None, typer.Option(help="Number of sampling steps of the teacher; by default its own.", min=1)
    ] = None,
    groups: Annotated[
        str | None, typer.Option(help="Expert groups to distil, such as 2 or 0,1; all by default.")
    ] = None,
    precision: Annotated[Precision, typer.Option(help="Precision of the weights on disk.")] = "fp16",
    max_train_steps: Annotated[int | None, typer.Option(help="Number of training steps.")] = None,
    train_batch_size: BatchSize = None,
    learning_rate: LearningRate = None,
    optimizer: Annotated[Optimizer | None, typer.Option(help="muon: of the matrices inside layers.")] = None,
    muon_learning_rate: MuonLearningRate = None,
    lr_warmup_steps: WarmupSteps = None,
    seed: Seed = 0,
    mixed_precision: Mixed = "no",
    compile: Annotated[
        bool, typer.Option("--compile", help="torch.compile for the layers; takes a minute first.")
    ] = False,
    cpu: OnCpu = False,
    resume_from_checkpoint: ResumeFrom = "latest",
    validation_prompts: ValidationPrompts = None,
    validation_steps: Annotated[
        int | None, typer.Option(help="Validate every so many training steps; 500 where prompts are given.", min=1)
    ] = None,
    report_to: ReportTo = None,
) -> None:
    """Distil a checkpoint into one that draws in few steps of one row each.

    The student has the teacher's guidance built in, and goes through each expert's interval in one step or a few. The
    result is a checkpoint again, in OUT/checkpoint, whose config says how it is sampled.

    \b
    Examples:
      latte-flow distill shapes --out run --steps 4,8 --mixed-precision bf16
      latte-flow distill my-checkpoint --data my-images --out run --steps 4 --guidance-scale 3
    """
    given: dict[str, Any] = {
        "max_train_steps": max_train_steps,
        "train_batch_size": train_batch_size,
        "learning_rate": learning_rate,
        "optimizer": optimizer,
        "muon_learning_rate": muon_learning_rate,
        "lr_warmup_steps": lr_warmup_steps,
        "seed": seed,
        "mixed_precision": mixed_precision,
        "compile": compile,
        "cpu": cpu,
    }
    world = drawn_world(data, seed) or DataSetWorld(open_data_set(data), DataOptions(), seed)
    settings = changed(SETTINGS, given)
    teacher = resolve_checkpoint(checkpoint)
    sampling = load_config(teacher).sampling
    scale = sampling.guidance_scale if guidance_scale is None else guidance_scale
    check_guidance_scale(scale, "--guidance-scale")
    options = RunOptions(
        groups=None if groups is None else tuple(numbers_of(groups, "--groups")),
        freeze_embeddings=groups is not None,  # other runs distil the other groups with the same
        report_to=trackers_of(report_to or []),
        resume_from=state_of(resume_from_checkpoint, out),
        precision=precision,
        validation=validation_of(validation_prompts, validation_steps, None),
        distillation=Distillation(
            steps=tuple(numbers_of(steps, "--steps")),
            guidance_scale=scale,
            teacher_steps=teacher_steps or sampling.num_inference_steps,
        ),
    )
    typer.echo(str(run_stage("flow", teacher, world, out, settings, options)))
