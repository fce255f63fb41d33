"""The commands of the reference: `init`, `merge` and `score`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import typer
from PIL import Image
from rich.progress import Progress
from rich.table import Table

from latte.checkpoint import (
    TORCH_DTYPES,
    assemble,
    cast_parameters,
    check_autoencoder,
    load_checkpoint,
    load_image_processor,
    load_tokenizer,
    load_vae,
    load_vlm,
    resolve_checkpoint,
    save_checkpoint,
    vae_scale_factor,
)
from latte.emoji.catalogue import load_catalogue
from latte.emoji.package import is_package
from latte.emoji.score import exam as emoji_exam
from latte.lora import is_adapter, merge_adapter
from latte.merge import Embeddings
from latte.merge import merge as merge_experts
from latte.score import MAX_EXAMPLES, AnswerScore, DrawingScore, Exam, JudgedImage, answer
from latte.shapes.score import EXAM as SHAPES_EXAM
from latte.training.flow import equal_probability_boundaries
from runtime.console import progress_bar, renamed_option, stdout
from runtime.errors import InputError
from runtime.files import check_replaceable
from runtime.flow_time import ExpertSchedule
from runtime.images import contact_sheet, save_png

Variant = Literal["couple", "blend"]
Precision = Literal["fp32", "fp16", "bf16"]
Dtype = Literal["float32", "float16", "bfloat16"]
PRECISION_OF: dict[str, Precision] = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def init(
    out: Annotated[Path, typer.Argument(help="Folder for the new checkpoint.")],
    vlm: Annotated[Path, typer.Option(help="Folder of a Qwen2-VL, as transformers saves it.")],
    vae: Annotated[Path, typer.Option(help="Folder of an AutoencoderDC, as diffusers saves it.")],
    groups: Annotated[
        int | None, typer.Option(help="Number of expert groups; must divide the VLM's layers. Default: 4.", min=1)
    ] = None,
    boundaries: Annotated[
        str,
        typer.Option(
            help="Flow times between which groups serve: `uniform`, `equal-probability` (logit-normal times fall "
            "equally often into each), or numbers such as 0,0.2,0.6,1."
        ),
    ] = "uniform",
    variant: Annotated[Variant, typer.Option(help="couple: own weights; blend: the VLM's weights.")] = "couple",
    height: Annotated[int, typer.Option(help="Default image height in pixels.")] = 256,
    width: Annotated[int, typer.Option(help="Default image width in pixels.")] = 256,
    precision: Annotated[Precision, typer.Option(help="Precision of the weights on disk.")] = "fp16",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing checkpoint.")] = False,
    dtype: Annotated[Dtype | None, typer.Option(hidden=True)] = None,
) -> None:
    """Make a checkpoint from a Qwen2-VL and a DC-AE, its flow layers ready to be trained.

    \b
    Example:
      latte-flow init my-checkpoint --vlm Qwen2-VL-2B-Instruct --vae dc-ae-f32c32-sana-1.0-diffusers
      latte-flow init my-checkpoint --vlm Qwen2-VL-2B-Instruct --vae dc-ae --groups 7 --boundaries equal-probability
    """
    precision = renamed_option(
        "--dtype", None if dtype is None else PRECISION_OF[dtype], "--precision", precision, "fp16"
    )
    if (out / "config.json").exists() and not force:
        raise InputError(f"{out} already contains a checkpoint; pass --force to replace it")
    schedule = _schedule(groups, boundaries)
    autoencoder = load_vae(vae)
    latent_size = _latent_size(autoencoder, height, width)
    check_autoencoder(autoencoder, latent_size, vae)
    # The VLM is loaded as it will be written, and the flow layers are cast one tensor at a time: fp32 copies of a large
    # model would not fit into memory.
    dtype_on_disk = TORCH_DTYPES[precision]
    image_processor = load_image_processor(vlm)
    model = assemble(
        load_vlm(vlm, dtype_on_disk),
        autoencoder,
        load_tokenizer(vlm),
        boundaries=schedule.boundaries,
        num_groups=schedule.num_groups,
        variant=variant,
        latent_size=latent_size,
    )
    cast_parameters(model.flow, dtype_on_disk)
    save_checkpoint(model, image_processor, out, dtype_on_disk)
    typer.echo(str(out))


def _schedule(groups: int | None, boundaries: str) -> ExpertSchedule:
    """Returns the schedule that `--groups` and `--boundaries` describe."""
    if boundaries == "uniform":
        return ExpertSchedule.uniform(DEFAULT_GROUPS if groups is None else groups)
    if boundaries == "equal-probability":
        return ExpertSchedule(boundaries=equal_probability_boundaries(DEFAULT_GROUPS if groups is None else groups))
    try:
        schedule = ExpertSchedule(boundaries=tuple(float(part) for part in boundaries.split(",")))
    except ValueError as error:
        raise InputError(
            "--boundaries must be uniform, equal-probability, or flow times that rise from 0 to 1, such as "
            f"0,0.2,0.6,1; got {boundaries!r}"
        ) from error
    if groups not in (None, schedule.num_groups):
        raise InputError(f"--boundaries {boundaries} bound {schedule.num_groups} groups, --groups is {groups}")
    return schedule


def merge(
    base: Annotated[str, typer.Argument(help="The checkpoint that all experts started from.")],
    experts: Annotated[
        list[Path],
        typer.Argument(metavar="EXPERT...", help="Checkpoints, each with some groups trained; or one adapter."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the merged checkpoint.")],
    embeddings: Annotated[
        Embeddings, typer.Option(help="What to take where experts have trained the embeddings that all groups share.")
    ] = "average",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing checkpoint.")] = False,
) -> None:
    """Put together expert groups that were trained apart, by `train --groups`; or add an adapter of `--lora-rank`.

    \b
    Examples:
      latte-flow merge start run-0/checkpoint run-1/checkpoint run-2/checkpoint run-3/checkpoint --out merged
      latte-flow merge my-checkpoint run/adapter --out merged
    """
    check_replaceable(out, "config.json", "checkpoint", force=force)
    if any(map(is_adapter, experts)):
        if len(experts) > 1:
            raise InputError("an adapter is merged alone: give its base and the adapter only")
        merge_adapter(resolve_checkpoint(base), experts[0], out)
        typer.echo(str(out))
        return
    merged = merge_experts(resolve_checkpoint(base), [resolve_checkpoint(path) for path in experts], out, embeddings)
    table = Table("group", "from")
    for group, source in enumerate(merged.sources):
        table.add_row(str(group), str(source))
    table.add_section()
    table.add_row("embeddings", merged.embeddings)
    stdout.print(table)
    typer.echo(str(out))


def _latent_size(vae: object, height: int, width: int) -> tuple[int, int]:
    factor = vae_scale_factor(vae)
    if height < factor or width < factor or height % factor or width % factor:
        raise InputError(
            f"height and width must be positive multiples of {factor} for this autoencoder, got {height}x{width}"
        )
    return height // factor, width // factor


MAX_FAILURES = 48
"""Largest number of images on a sheet of wrong ones."""
ROW_NAMES = {"all": "all attributes, and nothing else", "attributes": "all attributes"}
"""Of the rows that count more than one attribute."""
DEFAULT_GROUPS = 4
"""Number of expert groups of the paper's model."""


def score(
    checkpoint: Annotated[str, typer.Argument(help="The name of a shipped checkpoint, or a folder.")] = "shapes",
    data: Annotated[
        str,
        typer.Option(help="What it was trained on: `shapes`, or the package that `latte-flow data emoji` fetched."),
    ] = "shapes",
    prompts: Annotated[int, typer.Option(help="Number of held-out prompts of each kind.", min=0)] = 500,
    questions: Annotated[int, typer.Option(help="Number of held-out questions.", min=0)] = 500,
    num_inference_steps: Annotated[int | None, typer.Option(help="Number of sampling steps.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of prompts, noise and questions.")] = 0,
    sheet: Annotated[Path | None, typer.Option(help="Write the first images to this PNG.")] = None,
    examples: Annotated[
        int, typer.Option(help="Number of images of each kind on the sheet.", min=1, max=MAX_EXAMPLES)
    ] = 20,
    failures: Annotated[Path | None, typer.Option(help="Write the wrong images to this PNG.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Score a checkpoint on combinations and sentences that its training never saw.

    A reader judges the images by their pixels, and by what else they show.

    \b
    Examples:
      latte-flow score
      latte-flow score shapes --prompts 100 --questions 0 --failures wrong.png
      latte-flow score emoji --data data/emoji-package --prompts 100
    """
    exam = _exam(data)
    path = resolve_checkpoint(checkpoint)
    model = load_checkpoint(path)
    with progress_bar() as progress:

        def draw(texts: object, seeds: object) -> np.ndarray:
            return model.generate(
                list(texts),  # type: ignore[call-overload]
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                seed=list(seeds),  # type: ignore[call-overload]
            )

        def ask(images: Sequence[np.ndarray], texts: Sequence[str]) -> list[str]:
            return answer(model.vlm, model.tokenizer, processor, images, texts)

        processor = load_image_processor(path)
        drawings, answers = {}, {}
        for name, score_drawings in exam.drawings.items() if prompts else ():
            advance = _advancing(progress, f"draw {name}", prompts)
            drawings[name] = score_drawings(draw_images=draw, count=prompts, seed=seed, on_progress=advance)
        for name, score_answers in exam.answers.items() if questions else ():
            advance = _advancing(progress, f"ask: {name}", questions)
            answers[name] = score_answers(answer=ask, count=questions, seed=seed, on_progress=advance)
    if sheet is not None:
        _save_sheet([image for result in drawings.values() for image in result.examples[:examples]], sheet)
    if failures is not None:
        _save_sheet([image for result in drawings.values() for image in result.failures][:MAX_FAILURES], failures)
    _report(exam, drawings, answers, as_json)


def _exam(data: str) -> Exam:
    if data == "shapes":
        return SHAPES_EXAM
    if not is_package(Path(data)):
        raise InputError(f"--data must be shapes, or a package that `latte-flow data emoji` fetched; {data} is neither")
    return emoji_exam(load_catalogue(Path(data)))


def _advancing(progress: Progress, name: str, total: int) -> Callable[[int], None]:
    task = progress.add_task(name, total=total)
    return lambda n: progress.advance(task, n)


def _report(
    exam: Exam, drawings: Mapping[str, DrawingScore], answers: Mapping[str, AnswerScore], as_json: bool
) -> None:
    parts = ("all", "attributes", *exam.attributes)
    if as_json:
        report: dict[str, object] = {
            _key(name): {
                "prompts": result.prompts,
                **{part: result.share(part) for part in parts if part in result.stated},
            }
            for name, result in drawings.items()
        }
        for name, result in answers.items():
            report[_key(name)] = {"questions": sum(result.asked.values()), "right": result.share()}
        typer.echo(json.dumps(report))
        return
    if drawings:
        table = Table("right in the image", *drawings, title="Held-out prompts")
        for part in parts:
            cells = [f"{r.share(part):.1%} of {r.stated[part]}" if part in r.stated else "" for r in drawings.values()]
            table.add_row(ROW_NAMES.get(part, part), *cells, end_section=part == "attributes")
        stdout.print(table)
    if answers:
        table = Table("question about", "right", title="Held-out questions about rendered images")
        everything, *only = answers.items()
        for name, result in (("everything", everything[1]), *only):
            table.add_row(name, f"{result.share():.1%} of {sum(result.asked.values())}")
        table.add_section()
        right, asked = everything[1].right, everything[1].asked
        for kind in sorted(asked):
            table.add_row(kind, f"{right[kind] / asked[kind]:.1%} of {asked[kind]}")
        stdout.print(table)


def _key(name: str) -> str:
    """Returns the name of a kind in JSON, such as "1_shape_unseen_words"."""
    return "_".join(re.findall(r"\w+", name))


def _save_sheet(images: Sequence[JudgedImage], path: Path) -> None:
    if images:
        labels = [image.label for image in images]
        save_png(
            contact_sheet([Image.fromarray(image.image) for image in images], labels, columns=min(8, len(images))), path
        )
