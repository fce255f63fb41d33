"""The training recipe of `shapes`: its stages in order, their settings, and the files that each reads and writes.

A run is a folder. `training/` contains the state, the log and the loss plot of every stage. Each stage saves its
result when it is done:

1. autoencoder   writes `vae/`
2. vision        writes `vlm-vision/`, a VLM with a trained vision tower
3. vlm           reads `vlm-vision/`; writes `vlm/`
4. flow          reads `vae/` and `vlm/`; writes `checkpoint/`, a whole checkpoint
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import Qwen2VLForConditionalGeneration

from latte.checkpoint import (
    assemble,
    load_flow,
    load_image_processor,
    load_tokenizer,
    load_vae,
    load_vlm,
    save_checkpoint,
    save_part,
)
from latte.shapes.autoencoder import AutoencoderStage, latents_statistics, small_autoencoder
from latte.shapes.flow import FlowStage
from latte.shapes.vision import VisionStage
from latte.shapes.vlm import ConversationEncoder, VlmStage, small_image_processor, small_vlm, train_tokenizer
from latte.training import TrainSettings, plot_losses, train
from runtime.errors import InputError

NUM_GROUPS = 4
"""Number of expert groups, K."""
MAX_PROMPT_TOKENS = 128
LATENT_SIZE = (8, 8)
"""Height and width in latents."""
RECIPE: Mapping[str, TrainSettings] = {
    "autoencoder": TrainSettings(steps=6000, batch_size=32, learning_rate=2e-3, ema_decay=0.995),
    "vision": TrainSettings(steps=4800, batch_size=64, learning_rate=1.5e-3),
    "vlm": TrainSettings(
        steps=8000, batch_size=32, learning_rate=1.2e-3, warmup_steps=150, weight_decay=0.05, ema_decay=0.995
    ),
    "flow": TrainSettings(steps=56000, batch_size=64, learning_rate=1.5e-3, warmup_steps=400, ema_decay=0.999),
}
"""The settings of each stage, in the order of training."""
STAGES = tuple(RECIPE)


def run_stage(
    name: str,
    run_dir: Path,
    settings: TrainSettings,
    dtype: torch.dtype = torch.float16,
    start_from: Path | None = None,
) -> None:
    """Trains one stage of a run, saves its result, and plots its losses.

    Args:
        name: one of `STAGES`.
        run_dir: the run's folder.
        dtype: dtype of the weights in the checkpoint that the last stage writes.
        start_from: a checkpoint of the same geometry, whose weights the stage starts from instead of its usual ones,
            with its tokenizer and image processor. The vlm stage starts from `vlm-vision/` if the run's vision stage
            started from the same checkpoint. A resumed stage continues from its own state.

    Raises:
        InputError: an earlier stage has not run yet.
        CheckpointError: `start_from` cannot be used, or the stage's state was written with other settings.
    """
    torch.manual_seed(settings.seed)
    _STAGE_FUNCTIONS[name](run_dir, settings, dtype, start_from)
    plot_losses(run_dir / "training" / f"{name}.jsonl", run_dir / "training" / f"{name}.png")


def _autoencoder(run_dir: Path, settings: TrainSettings, _: torch.dtype, start_from: Path | None) -> None:
    autoencoder = small_autoencoder() if start_from is None else load_vae(start_from / "vae").requires_grad_(True)
    train(AutoencoderStage(autoencoder, settings.batch_size, settings.device), settings, run_dir / "training")
    save_part(autoencoder.cpu(), run_dir / "vae")


def _vision(run_dir: Path, settings: TrainSettings, _: torch.dtype, start_from: Path | None) -> None:
    if start_from is None:
        tokenizer, image_processor = train_tokenizer(), small_image_processor()
        vlm = small_vlm(tokenizer)
    else:  # a new tokenizer would have other tokens than the VLM's vocabulary
        tokenizer, image_processor = load_tokenizer(start_from), load_image_processor(start_from)
        vlm = load_vlm(start_from / "vlm")
    stage = VisionStage(vlm, image_processor, settings.batch_size, settings.device)
    train(stage, settings, run_dir / "training")
    save_part(vlm.cpu(), run_dir / "vlm-vision", tokenizer, image_processor)


def _vlm(run_dir: Path, settings: TrainSettings, _: torch.dtype, start_from: Path | None) -> None:
    if start_from is None or (run_dir / "vlm-vision").is_dir():
        processors = source = _part(run_dir, "vlm-vision", "vision")
    else:
        processors, source = start_from, start_from / "vlm"
    vlm, tokenizer, image_processor = load_vlm(source), load_tokenizer(processors), load_image_processor(processors)
    if start_from is not None and processors != start_from and not _same_language_model(vlm, start_from):
        raise InputError(
            f"{source} did not start from {start_from}; leave out --start-from to go on with it, or remove it to start "
            "from there"
        )
    stage = VlmStage(vlm, ConversationEncoder(tokenizer, image_processor), settings.batch_size, settings.device)
    train(stage, settings, run_dir / "training")
    save_part(vlm.cpu(), run_dir / "vlm", tokenizer, image_processor)


def _flow(run_dir: Path, settings: TrainSettings, dtype: torch.dtype, start_from: Path | None) -> None:
    vae = load_vae(_part(run_dir, "vae", "autoencoder"))
    source = _part(run_dir, "vlm", "vlm")
    vlm, tokenizer = load_vlm(source), load_tokenizer(source)
    mean, std = latents_statistics(vae)
    model = assemble(
        vlm,
        vae,
        tokenizer,
        num_groups=NUM_GROUPS,
        latent_size=LATENT_SIZE,
        latents_mean=tuple(mean),
        latents_std=tuple(std),
        max_prompt_tokens=MAX_PROMPT_TOKENS,
    )
    if start_from is not None:
        load_flow(model.flow, start_from / "model.safetensors")
    train(FlowStage(model, settings.batch_size, settings.seed, settings.device), settings, run_dir / "training")
    save_checkpoint(model.cpu(), load_image_processor(source), run_dir / "checkpoint", dtype)


_STAGE_FUNCTIONS = {"autoencoder": _autoencoder, "vision": _vision, "vlm": _vlm, "flow": _flow}


def _same_language_model(vlm: Qwen2VLForConditionalGeneration, checkpoint: Path) -> bool:
    """Returns whether a VLM has the language model of a checkpoint, which the vision stage does not train."""
    parameters = dict(vlm.model.language_model.named_parameters())
    others = dict(load_vlm(checkpoint / "vlm").model.language_model.named_parameters())
    return parameters.keys() == others.keys() and all(torch.equal(parameters[name], others[name]) for name in others)


def _part(run_dir: Path, part: str, stage: str) -> Path:
    path = run_dir / part
    if not path.is_dir():
        raise InputError(
            f"{run_dir} contains no {part}/; run the earlier stage first: latte-flow train {run_dir} --stage {stage}"
        )
    return path
