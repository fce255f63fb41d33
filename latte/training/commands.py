"""The command `train`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from latte.checkpoint import resolve_checkpoint
from latte.data.batches import CAPTION_DROPOUT
from latte.data.captions import TEMPLATES
from latte.data.images import CropName
from latte.data.source import open_data_set
from latte.data.streams import SHUFFLE_BUFFER
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
    size_of,
    state_of,
    trackers_of,
    untrained_checkpoint,
    validation_of,
)
from latte.training.data_set import DataOptions, DataSetWorld
from latte.training.dry_run import PAPER_NAME, Sizes, needs_of, print_needs
from latte.training.flow import TimestepSampling
from latte.training.run import RunOptions, of_epochs, run_stage
from latte.training.settings import TrainSettings
from latte.training.world import STAGES, World, settings_of
from runtime.errors import InputError

Stages = Literal["autoencoder", "vision", "vlm", "flow", "all"]
Scheduler = Literal["cosine", "linear", "constant"]
Sharding = Literal["none", "fsdp2"]
SPLIT = "train"
"""The split to train on."""
FRESH = "new"
"""The checkpoint to name for a model that is trained from nothing."""


def train(
    checkpoint: Annotated[
        str,
        typer.Argument(help="The name of a shipped checkpoint, a folder, or `new`: an untrained model for the data."),
    ],
    out: OutFolder,
    data: Annotated[
        str,
        typer.Option(
            help="Folder of images with captions, Parquet files, WebDataset tars, a name on the hub; `shapes`, or the "
            "package that `latte-flow data emoji` fetched: scenes that are drawn as they are needed."
        ),
    ],
    split: Annotated[str, typer.Option(help="Split of the data.")] = SPLIT,
    streaming: Annotated[
        bool, typer.Option("--streaming", help="Read the data in order, without a copy on the disk.")
    ] = False,
    shuffle_buffer: Annotated[int, typer.Option(help="Rows among which a stream is shuffled.", min=1)] = SHUFFLE_BUFFER,
    image_column: Annotated[str | None, typer.Option(help="Column of images. Default: the only one.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="Column of captions, one or a list.")] = None,
    class_column: Annotated[str | None, typer.Option(help="Column of classes, for data without captions.")] = None,
    class_names: Annotated[Path | None, typer.Option(help="JSON file with the names of classes.")] = None,
    template: Annotated[
        list[str] | None, typer.Option(help="Prompt of a class, with {class} for its name; may be repeated.")
    ] = None,
    resolution: Annotated[
        str | None, typer.Option(help="Pixels, such as 256 or 256x384. Default: the checkpoint's.")
    ] = None,
    crop: Annotated[
        CropName, typer.Option(help="Of images of another shape; `buckets`: batches of several aspect ratios.")
    ] = "center",
    random_flip: Annotated[
        bool, typer.Option("--random-flip", help="Mirror half of the images; not where captions say left or right.")
    ] = False,
    caption_dropout: Annotated[
        float, typer.Option(help="Share of rows with an empty prompt, for guidance.", min=0, max=1)
    ] = CAPTION_DROPOUT,
    cache_latents: Annotated[
        Path | None,
        typer.Option(help="Folder for the latents of the images, so that each is encoded once.", metavar="DIR"),
    ] = None,
    stage: Annotated[Stages, typer.Option(help="Part to train: `flow`, or from nothing `all` in a row.")] = "flow",
    precision: Annotated[Precision, typer.Option(help="Precision of the trained weights on disk.")] = "fp16",
    max_train_steps: Annotated[int | None, typer.Option(help="Number of steps.")] = None,
    num_train_epochs: Annotated[
        int | None, typer.Option(help="Instead of steps: how often each image is used.", min=1)
    ] = None,
    train_batch_size: BatchSize = None,
    gradient_accumulation_steps: Annotated[
        int | None, typer.Option(help="Forward passes whose gradients are averaged.")
    ] = None,
    learning_rate: LearningRate = None,
    optimizer: Annotated[
        Optimizer | None, typer.Option(help="muon: of the matrices inside layers, which needs fewer steps.")
    ] = None,
    muon_learning_rate: MuonLearningRate = None,
    lr_scheduler: Annotated[Scheduler | None, typer.Option(help="Decay after the warm-up.")] = None,
    lr_warmup_steps: WarmupSteps = None,
    adam_beta1: Annotated[float | None, typer.Option(help="AdamW's β₁.")] = None,
    adam_beta2: Annotated[float | None, typer.Option(help="AdamW's β₂.")] = None,
    adam_weight_decay: Annotated[float | None, typer.Option(help="Of matrices; norms and biases are spared.")] = None,
    max_grad_norm: Annotated[float | None, typer.Option(help="Clip the gradient to this norm.")] = None,
    ema_decay: Annotated[float | None, typer.Option(help="Of the weights' moving average; 0 disables it.")] = None,
    seed: Seed = 0,
    mixed_precision: Mixed = "no",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute activations again instead of keeping them.")
    ] = False,
    compile: Annotated[
        bool,
        typer.Option("--compile", help="torch.compile for the layers of VLM and flow; takes a minute first."),
    ] = False,
    sharding: Annotated[Sharding, typer.Option(help="fsdp2: split the flow layers' weights over processes.")] = "none",
    cpu: OnCpu = False,
    dataloader_num_workers: Annotated[int | None, typer.Option(help="Processes that prepare batches.")] = None,
    checkpointing_steps: Annotated[int | None, typer.Option(help="Save a state every so many steps.")] = None,
    checkpoints_total_limit: Annotated[int | None, typer.Option(help="Number of states to keep.")] = None,
    resume_from_checkpoint: ResumeFrom = "latest",
    groups: Annotated[
        str | None, typer.Option(help="Expert groups to train, such as 2 or 0,1; all by default.")
    ] = None,
    freeze_embeddings: Annotated[
        bool, typer.Option("--freeze-embeddings", help="Do not train the embeddings that all groups share.")
    ] = False,
    lora_rank: Annotated[
        int | None, typer.Option(help="Train an adapter of this rank instead of the flow layers (LoRA).", min=1)
    ] = None,
    timestep_sampling: Annotated[TimestepSampling, typer.Option(help="Distribution of flow times.")] = "uniform",
    validation_prompts: ValidationPrompts = None,
    validation_steps: Annotated[
        int | None, typer.Option(help="Validate every so many steps; 500 where prompts or a split are given.", min=1)
    ] = None,
    validation_split: Annotated[
        str | None, typer.Option(help="Split of the data with held-out rows for the validation.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print parameters, memory, FLOPs and time, and train nothing.")
    ] = False,
    report_to: ReportTo = None,
) -> None:
    """Train a stage of a checkpoint on images and captions; by default its flow layers.

    The result is a checkpoint again, in OUT/checkpoint. Options that are not given have the values that suit the data.
    With torchrun, several processes share each step's rows; `accelerate launch` works too.

    \b
    Examples:
      latte-flow train my-checkpoint --data my-images --out run --mixed-precision bf16
      latte-flow train my-checkpoint --data my-images --out run --validation-prompts "a red bus" --validation-steps 1000
      latte-flow train shapes --data shapes --out finer --max-train-steps 2000 --learning-rate 2e-4
      latte-flow train new --data data/emoji-package --stage all --out run --mixed-precision bf16
      latte-flow train new --data shapes --stage all --out run --mixed-precision bf16
      latte-flow train paper --data shapes --out run --train-batch-size 64 --mixed-precision bf16 --dry-run
      torchrun --nproc-per-node 8 $(which latte-flow) train my-checkpoint --data my-images --out run
    """
    given: dict[str, Any] = {
        "max_train_steps": max_train_steps,
        "train_batch_size": train_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "learning_rate": learning_rate,
        "optimizer": optimizer,
        "muon_learning_rate": muon_learning_rate,
        "lr_scheduler": lr_scheduler,
        "lr_warmup_steps": lr_warmup_steps,
        "adam_beta1": adam_beta1,
        "adam_beta2": adam_beta2,
        "adam_weight_decay": adam_weight_decay,
        "max_grad_norm": max_grad_norm,
        "ema_decay": ema_decay,
        "seed": seed,
        "mixed_precision": mixed_precision,
        "gradient_checkpointing": gradient_checkpointing,
        "compile": compile,
        "sharding": sharding,
        "cpu": cpu,
        "dataloader_num_workers": dataloader_num_workers,
        "checkpointing_steps": checkpointing_steps,
        "checkpoints_total_limit": checkpoints_total_limit,
    }
    if max_train_steps is not None and num_train_epochs is not None:
        raise InputError("--max-train-steps and --num-train-epochs exclude each other; give one")
    world: World
    if (drawn := drawn_world(data, seed)) is not None:
        for_data_sets = {
            "streaming": streaming,
            "cache_latents": cache_latents is not None,
            "validation_split": validation_split is not None,
            "split": split != SPLIT,
            "image_column": image_column is not None,
            "caption_column": caption_column is not None,
            "class_column": class_column is not None,
            "class_names": class_names is not None,
            "template": bool(template),
            "resolution": resolution is not None and not dry_run,
            "crop": crop != DataOptions.crop,
            "random_flip": random_flip,
            "caption_dropout": caption_dropout != DataOptions.caption_dropout,
            "shuffle_buffer": shuffle_buffer != DataOptions.shuffle_buffer,
        }
        _refuse(for_data_sets, f"is for data sets, and {data} is drawn as it is needed")
        world = drawn
    else:
        opened = partial(
            open_data_set,
            data,
            streaming=streaming,
            image_column=image_column,
            caption_column=caption_column,
            class_column=class_column,
            class_names=class_names,
            templates=template or TEMPLATES,
        )
        held_out = None if validation_split is None else opened(validation_split)
        size = None if resolution is None else size_of(resolution)
        workers = dataloader_num_workers or 0
        how = DataOptions(size, crop, random_flip, caption_dropout, shuffle_buffer, cache_latents, workers)
        world = DataSetWorld(opened(split), how, seed, held_out)
    chosen = None if groups is None else numbers_of(groups, "--groups")
    if stage not in ("flow", "all"):
        of_the_flow_layers = {
            "groups": groups is not None,
            "freeze_embeddings": freeze_embeddings,
            "timestep_sampling": timestep_sampling != RunOptions.timestep_sampling,
            "cache_latents": cache_latents is not None,
            "validation_prompts": bool(validation_prompts),
            "validation_steps": validation_steps is not None,
            "validation_split": validation_split is not None,
            "dry_run": dry_run,
        }
        _refuse(of_the_flow_layers, f"is for the flow layers, and the stage is {stage}")
    if dry_run:
        if lora_rank is not None:
            raise InputError("--dry-run counts a training of whole layers; leave out --lora-rank")
        sizes = _sizes_of(checkpoint, world, seed)
        if resolution is not None:
            sizes = sizes.at(*size_of(resolution))
        _dry_run(checkpoint, sizes, world, changed(settings_of(world, "flow"), given), chosen, num_train_epochs)
        return
    stages = STAGES if stage == "all" else (stage,)
    settings = {name: changed(settings_of(world, name), given) for name in stages}
    options = RunOptions(
        groups=None if chosen is None else tuple(chosen),
        freeze_embeddings=freeze_embeddings,
        lora_rank=lora_rank,
        timestep_sampling=timestep_sampling,
        report_to=trackers_of(report_to or []),
        resume_from=state_of(resume_from_checkpoint, out),
        precision=precision,
        num_train_epochs=num_train_epochs,
        validation=validation_of(validation_prompts, validation_steps, validation_split),
    )
    source = untrained_checkpoint(out, world, seed) if checkpoint == FRESH else resolve_checkpoint(checkpoint)
    for name in stages:
        source = run_stage(name, source, world, out / name if stage == "all" else out, settings[name], options)
    typer.echo(str(source))


def _refuse(given: Mapping[str, bool], reason: str) -> None:
    """Raises `InputError` if one of these options is given."""
    for name, is_given in given.items():
        if is_given:
            raise InputError(f"--{name.replace('_', '-')} {reason}; leave it out")


def _sizes_of(checkpoint: str, world: World, seed: int) -> Sizes:
    if checkpoint == PAPER_NAME:
        return Sizes.of(checkpoint)
    if checkpoint != FRESH:
        return Sizes.of(resolve_checkpoint(checkpoint))
    with tempfile.TemporaryDirectory() as folder:
        return Sizes.of(untrained_checkpoint(Path(folder), world, seed))


def _dry_run(
    checkpoint: str, sizes: Sizes, world: World, settings: TrainSettings, groups: list[int] | None, epochs: int | None
) -> None:
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if epochs is not None:
        steps_per_batch = sizes.flow.schedule.num_groups if groups is None else len(groups)
        settings = of_epochs(settings, epochs, world, steps_per_batch, num_processes)
    if int(os.environ.get("RANK", "0")) == 0:
        print_needs(checkpoint, needs_of(sizes, settings, num_processes, groups), settings, num_processes)
