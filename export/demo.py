"""`latte-flow demo`: the shipped checkpoints from export to images, and to answers about one of them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from export.bundle import OnStage, export_bundle
from latte.shipped import shipped_checkpoints
from runtime.files import make_writable_folder
from runtime.images import contact_sheet, save_png
from runtime.manifest import ParityRow
from runtime.pipeline import LatteFlowPipeline

PROMPTS = (
    "a large red circle in the center on a white background",
    "a medium yellow star at the top right on a navy background",
    "a small cyan diamond on the left, a black background",
    "a large purple cross at the bottom on a beige background",
    "a small green triangle above a large orange ring on a white background",
    "a large blue square to the left of a small pink star on a grey background",
    "a medium pink cross below a medium cyan circle on a black background",
    "on a beige background, a large green diamond to the right of a medium red square",
)
ASKED_IMAGE = 1
EMOJI_PROMPTS = (
    "a large red apple on a navy background",
    "a large octopus in the middle on a peach background",
    "a small rocket at the top right on a purple background",
    "draw a big birthday cake at the bottom, on teal",
    "a cat face to the left of a dog face on a green background",
    "a crescent moon above a house on a navy background",
    "a strawberry at the top left and a banana at the bottom right on a lavender background",
    "on maroon, a large jack-o-lantern on the left",
)
QUESTIONS = ("describe the image", "what colour is the star?", "where is the star?", "what is the background colour?")
TRAJECTORY_STEPS = 20
TRAJECTORY_EVERY = 2


@dataclass
class DemoResult:
    """The output of the demo."""

    files: list[Path] = field(default_factory=list)
    answers: list[tuple[str, str]] = field(default_factory=list)
    """Questions about an image of the grid, with the bundle's answers."""
    seconds: dict[str, float] = field(default_factory=dict)
    failed: list[ParityRow] = field(default_factory=list)


def run_demo(out: Path, seed: int, on_stage: OnStage) -> DemoResult:
    """Writes bundles of the installed checkpoints, and images of what they draw and answer, into `out`."""
    make_writable_folder(out)
    result = DemoResult()
    current, started = "", time.perf_counter()

    def stage(name: str, of: str = "") -> None:
        nonlocal current, started
        name = f"{of}: {name}" if of else name
        now = time.perf_counter()
        if current:
            result.seconds[current] = now - started
        current, started = name, now
        if name:
            on_stage(name)

    bundles = {name: out / name.replace("shapes", "bundle") for name in ("shapes", "shapes-4step")}
    for name, bundle in bundles.items():
        _, failed = export_bundle(name, bundle, force=True, on_stage=partial(stage, of=name))
        result.failed += failed
    with LatteFlowPipeline.from_pretrained(bundles["shapes"]) as pipe:
        stage(f"draw {len(PROMPTS)} images")
        images = pipe(PROMPTS, seed=seed).images
        save_png(contact_sheet(images, PROMPTS), out / "grid.png")
        stage("draw a trajectory")
        save_png(_trajectory(pipe, PROMPTS[5], seed), out / "trajectory.png")
        stage("ask about an image")
        asked = images[ASKED_IMAGE]
        answers = pipe.ask([asked] * len(QUESTIONS), QUESTIONS)
        result.answers = list(zip(QUESTIONS, answers, strict=True))
        labels = [f"{question} {answer}" for question, answer in result.answers]
        save_png(contact_sheet([asked] * len(labels), labels, columns=len(labels)), out / "answers.png")
    stage("draw in 20 steps and in 4")
    save_png(_side_by_side(list(bundles.values()), seed), out / "steps.png")
    result.files = [out / name for name in ("grid.png", "trajectory.png", "answers.png", "steps.png")]
    if "emoji" in shipped_checkpoints():
        bundle = out / "bundle-emoji"
        _, failed = export_bundle("emoji", bundle, force=True, on_stage=partial(stage, of="emoji"))
        result.failed += failed
        with LatteFlowPipeline.from_pretrained(bundle) as pipe:
            stage(f"draw {len(EMOJI_PROMPTS)} images of emoji")
            save_png(contact_sheet(pipe(EMOJI_PROMPTS, seed=seed).images, EMOJI_PROMPTS), out / "emoji.png")
        result.files.append(out / "emoji.png")
    stage("")
    return result


def _side_by_side(bundles: Sequence[Path], seed: int) -> Image.Image:
    """Shows the prompts as each bundle draws them one by one, a row each, with the time of every call."""
    images, labels = [], []
    for bundle in bundles:
        with LatteFlowPipeline.from_pretrained(bundle, prefix_cache_bytes=0) as pipe:
            steps = pipe.manifest.sampling.num_inference_steps
            pipe(PROMPTS[0], seed=seed)  # engines are loaded by the first call
            for i, prompt in enumerate(PROMPTS):
                output = pipe(prompt, seed=seed + i)
                images += output.images
                labels.append(f"{steps} steps, {1000 * sum(output.seconds.values()):.0f} ms")
    return contact_sheet(images, labels, columns=len(PROMPTS))


def _trajectory(pipe: LatteFlowPipeline, prompt: str, seed: int) -> Image.Image:
    """Shows one image decoded after every few steps, with the expert group of each step."""
    frames: list[np.ndarray] = []
    labels: list[str] = []

    def record(_: LatteFlowPipeline, step: int, t: float, tensors: Mapping[str, np.ndarray]) -> None:
        if step % TRAJECTORY_EVERY == TRAJECTORY_EVERY - 1:
            frames.append(tensors["latents"])
            group = pipe.manifest.schedule.group_of(t)
            labels.append(f"after step {step + 1}, t = {(step + 1) / TRAJECTORY_STEPS:g}, expert {group}")

    pipe(prompt, seed=seed, num_inference_steps=TRAJECTORY_STEPS, output_type="latent", callback_on_step_end=record)
    decoded = pipe.decode(np.concatenate(frames))
    return contact_sheet([Image.fromarray(image) for image in decoded], labels, columns=5)
