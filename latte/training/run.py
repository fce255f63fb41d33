"""A run: a stage of a checkpoint's training, whose result is a checkpoint again.

A run is a folder: `checkpoint-<step>/` are states to resume from, `log.jsonl` and `loss.png` show the losses, and
`checkpoint/` is the result, which has the trained part of the model, and all other files of the checkpoint that the run
started from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from latte.checkpoint import (
    TORCH_DTYPES,
    cast_parameters,
    copy_from_vlm,
    has_latents_statistics,
    load_checkpoint,
    load_image_processor,
    own_state,
    save_changed,
    untrained_groups,
)
from latte.config import LatteFlowConfig
from latte.lora import add_adapter, check_adaptable, save_adapter
from latte.model import FlowTransformer, LatteFlow
from latte.training.autoencoder import AutoencoderStage, latents_statistics
from latte.training.conversations import ConversationEncoder
from latte.training.distillation import Distillation, DistillationStage
from latte.training.flow import Batches, FlowStage, TimestepSampling
from latte.training.log import LOG, plot_losses
from latte.training.loop import Validation, make_accelerator, train
from latte.training.settings import TrainSettings
from latte.training.stage import Stage
from latte.training.states import rows_of_a_step, states_of, whole
from latte.training.validation import FlowValidation, ValidationOptions
from latte.training.vision import VisionStage
from latte.training.world import StageName, World
from runtime.errors import InputError
from runtime.files import make_writable_folder, write_text

RESULT = "checkpoint"
ADAPTER = "adapter"
PLOT = "loss.png"
STATISTICS = "latents.json"


@dataclass(frozen=True)
class RunOptions:
    """What a run may be asked for beyond its settings."""

    report_to: tuple[str, ...] = ()
    """Accelerate's trackers."""
    resume_from: Path | None = None
    """A state to resume from; the newest by default."""
    precision: str = "fp16"
    """Precision of the trained weights on disk."""
    validation: ValidationOptions | None = None
    """How to validate the flow layers; None: not at all."""
    groups: tuple[int, ...] | None = None
    """The expert groups to train; all by default."""
    freeze_embeddings: bool = False
    """Whether the embeddings of latents and time, which all groups share, stay as they are."""
    lora_rank: int | None = None
    """The rank of an adapter to train instead of the flow layers."""
    timestep_sampling: TimestepSampling = "uniform"
    """The distribution of flow times."""
    num_train_epochs: int | None = None
    """So many epochs replace the number of steps of the settings."""
    distillation: Distillation | None = None
    """What to distil into the flow layers, instead of training them on images."""


def run_stage(
    name: StageName,
    checkpoint: Path,
    world: World,
    run_dir: Path,
    settings: TrainSettings,
    options: RunOptions | None = None,
) -> Path:
    """Trains one stage of a checkpoint, or resumes it; returns the folder of the new checkpoint.

    Raises:
        InputError: the stage cannot be trained like this.
        CheckpointError: the checkpoint cannot be loaded, or the run's state was written with other settings.
        TrainingError: a loss or a gradient is not finite.
    """
    options = options or RunOptions()
    make_writable_folder(run_dir)
    if settings.sharding == "fsdp2" and name != "flow":
        raise InputError(f"--sharding fsdp2 is for the flow layers; train the stage {name} without it")
    if settings.sharding == "fsdp2" and settings.optimizer == "muon":
        raise InputError("--optimizer muon needs whole matrices, and --sharding fsdp2 splits them; use adamw")
    accelerator = make_accelerator(settings, run_dir, options.report_to)
    accelerator.init_trackers("latte-flow", config=settings.model_dump(mode="json"))
    torch.manual_seed(settings.seed)
    model = load_checkpoint(checkpoint)
    copy_from_vlm(model.flow, model.vlm)  # an earlier stage may have trained the VLM
    if name == "flow":
        cast_parameters(model.vlm, frozen_dtype(model.config, settings))
    stage = _make_stage(name, model, checkpoint, world, options)
    if options.num_train_epochs is not None:
        settings = of_epochs(
            settings, options.num_train_epochs, world, stage.steps_per_batch, accelerator.num_processes
        )
    if isinstance(stage, FlowStage) and untrained_groups(model.flow) and not has_latents_statistics(model.config):
        _measure_latents(model, stage.batches, run_dir, accelerator)
    adapter = None if options.lora_rank is None else _add_adapter(stage, options.lora_rank, settings)
    if settings.gradient_checkpointing:
        _checkpoint_gradients(name, model)
    if settings.compile:
        _compile_layers(name, model, stage)
    validation = None
    if isinstance(stage, FlowStage) and options.validation is not None:
        held_out = world.captioned_images(model, held_out=True)
        what = FlowValidation(stage, held_out, run_dir, options.validation, accelerator)
        validation = Validation(options.validation.every, what.run)
    identity = dict(world.identity)
    if name == "flow":
        identity["timestep_sampling"] = options.timestep_sampling
    trained = train(stage, settings, run_dir, accelerator, validation, options.resume_from, identity)
    if adapter is not None:
        if accelerator.is_main_process:
            save_adapter(adapter, checkpoint, run_dir / ADAPTER)
        adapter.merge_and_unload()
    flow = {key: whole(value) for key, value in own_state(model.flow).items()} if name == "flow" else None
    if accelerator.is_main_process:
        _save(name, model, flow, checkpoint, world, run_dir / RESULT, TORCH_DTYPES[options.precision])
        plot_losses(run_dir / LOG, run_dir / PLOT)
    accelerator.end_training()
    del trained
    return run_dir / RESULT


def _make_stage(name: StageName, model: LatteFlow, checkpoint: Path, world: World, options: RunOptions) -> Stage:
    if name == "flow":
        if options.distillation is None:
            if model.config.sampling.guidance_distilled:
                raise InputError(
                    f"{checkpoint} is distilled, which training on images would undo; train the checkpoint that it was "
                    "made from, and distil that again"
                )
            stage = world.flow_stage(model)
        else:
            stage = DistillationStage(model, world.captioned_images(model), options.distillation)
        stage.timestep_sampling = options.timestep_sampling
        if options.groups is not None:
            stage.train_groups(options.groups)
        if options.freeze_embeddings:
            stage.freeze_embeddings()
        return stage
    model.flow.requires_grad_(False)
    if name == "autoencoder":
        return AutoencoderStage(model.vae.requires_grad_(True), world.images(model))
    image_processor = load_image_processor(checkpoint)
    if name == "vision":
        return VisionStage(model.vlm, image_processor, world.labelled_images(model))
    encoder = ConversationEncoder(model.tokenizer, image_processor)
    return world.vlm_stage(model, encoder)


def _add_adapter(stage: Stage, rank: int, settings: TrainSettings) -> Any:
    """Adds an adapter to a stage's flow layers, and freezes all else; returns peft's model of it."""
    if not isinstance(stage, FlowStage):
        raise InputError(f"--lora-rank is for the flow layers; train the stage {stage.name} without it")
    if settings.sharding == "fsdp2":
        raise InputError("--lora-rank leaves little to split; train without --sharding fsdp2")
    check_adaptable(stage.model.flow)
    return add_adapter(stage.model.flow, rank, stage.groups)


def of_epochs(
    settings: TrainSettings, epochs: int, world: World, steps_per_batch: int, num_processes: int
) -> TrainSettings:
    """Returns settings with the number of steps in which every image is used `epochs` times, by each expert group.

    Raises:
        InputError: the number of images is not known.
    """
    if world.num_rows is None:
        raise InputError(f"{world.name} has no known number of images for --num-train-epochs; give --max-train-steps")
    batches = -(-epochs * world.num_rows // rows_of_a_step(settings, num_processes))
    return settings.model_copy(update={"max_train_steps": batches * steps_per_batch})


def _measure_latents(model: LatteFlow, batches: Batches, run_dir: Path, accelerator: Accelerator) -> None:
    """Gives a model the statistics of the latents of its data.

    One process measures them, and a resumed run reads what it began with: rounding may differ between devices.
    """
    path = run_dir / STATISTICS
    if accelerator.is_main_process and not (path.is_file() and states_of(run_dir)):
        mean, std = latents_statistics(model.vae.to(accelerator.device), batches)
        write_text(path, json.dumps({"mean": mean, "std": std}) + "\n")
    accelerator.wait_for_everyone()
    statistics = json.loads(path.read_text(encoding="utf-8"))
    model.set_latents_statistics(statistics["mean"], statistics["std"])


def frozen_dtype(config: LatteFlowConfig, settings: TrainSettings) -> torch.dtype:
    """Returns the dtype of the VLM in memory while the flow layers are trained.

    Autocast computes with weights in bf16 anyway. In the `blend` variant the flow layers share weights of the VLM, and
    have one dtype.
    """
    half = settings.mixed_precision == "bf16" and config.variant == "couple"
    return torch.bfloat16 if half else torch.float32


def _checkpoint_gradients(name: StageName, model: LatteFlow) -> None:
    if name == "flow":
        model.flow.gradient_checkpointing = True
    elif name == "vlm":
        model.vlm.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        raise InputError(f"--gradient-checkpointing is for the stages flow and vlm; train the stage {name} without it")


def _compile_layers(name: StageName, model: LatteFlow, stage: Stage) -> None:
    """Compiles the language model's layers and the flow layers, in place; layers of one kind share their code.

    The other stages gain nothing: convolutions are fast already, and the vision tower computes image by image.
    """
    if name in ("vlm", "flow"):
        for layer in model.vlm.model.language_model.layers:
            layer.compile(dynamic=True)
    if name == "flow":
        for flow in (model.flow, *(part for part in stage.frozen if isinstance(part, FlowTransformer))):
            for layer in flow.layers:
                layer.compile(dynamic=True)


def _save(
    name: StageName,
    model: LatteFlow,
    flow: Mapping[str, Tensor] | None,
    source: Path,
    world: World,
    target: Path,
    dtype: torch.dtype,
) -> None:
    if name == "flow":
        save_changed(source, target, dtype, flow=flow, config=model.config)
        return
    model.cpu().eval()
    if name == "autoencoder":
        model.set_latents_statistics(*latents_statistics(model.vae, world.captioned_images(model)))
        save_changed(source, target, dtype, vae=model.vae, config=model.config)
    else:
        save_changed(source, target, dtype, vlm=model.vlm)
