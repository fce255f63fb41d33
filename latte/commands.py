"""The commands of the reference: `init`, `merge` and `score`."""

from __future__ import annotations

import json
from collections.abc import Sequence
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
from latte.lora import is_adapter, merge_adapter
from latte.merge import Embeddings
from latte.merge import merge as merge_experts
from latte.model import LatteFlow
from latte.shapes.reader import ATTRIBUTES
from latte.shapes.score import AnswerScore, DrawingScore, answer, score_answers, score_drawing
from latte.training.flow import equal_probability_boundaries
from runtime.console import progress_bar, renamed_option, stdout
from runtime.errors import InputError
from runtime.files import check_replaceable
from runtime.flow_time import DEFAULT_GUIDANCE_SCALE, DEFAULT_STEPS, ExpertSchedule
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


DEFAULT_GROUPS = 4
"""Number of expert groups of the paper's model."""
KINDS_OF_PROMPTS = {"1 shape": (1, False), "2 shapes": (2, False), "1 shape, unseen words": (1, True)}
"""What `score` draws: the number of shapes, and whether the prompts are sentences that training never uses."""


def score(
    checkpoint: Annotated[str, typer.Argument(help="`shapes`, or a checkpoint folder.")] = "shapes",
    prompts: Annotated[int, typer.Option(help="Number of held-out prompts of each kind.", min=0)] = 500,
    questions: Annotated[int, typer.Option(help="Number of held-out questions.", min=0)] = 500,
    num_inference_steps: Annotated[int, typer.Option(help="Number of sampling steps.")] = DEFAULT_STEPS,
    guidance_scale: Annotated[float, typer.Option(help="Guidance scale.")] = DEFAULT_GUIDANCE_SCALE,
    seed: Annotated[int, typer.Option(help="Seed of prompts, noise and questions.")] = 0,
    sheet: Annotated[Path | None, typer.Option(help="Write the first images to this PNG.")] = None,
    failures: Annotated[Path | None, typer.Option(help="Write the wrong images to this PNG.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Score a checkpoint on combinations and sentences that its training never saw.

    A reader judges the images by their pixels, and by what else they show.

    \b
    Examples:
      latte-flow score
      latte-flow score shapes --prompts 100 --questions 0 --failures wrong.png
    """
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

        drawings = {}
        for name, (shapes, unseen_words) in KINDS_OF_PROMPTS.items() if prompts else ():
            task = progress.add_task(f"draw {name}", total=prompts)
            drawings[name] = score_drawing(
                draw,
                prompts,
                shapes,
                seed,
                lambda n, task=task: progress.advance(task, n),  # type: ignore[misc]
                unseen_words=unseen_words,
            )
        answers = _score_answers(model, path, questions, seed, progress) if questions else None
    if sheet is not None:
        examples = [example for result in drawings.values() for example in result.examples]
        _save_sheet([image for _, image in examples], [prompt for prompt, _ in examples], sheet)
    if failures is not None:
        wrong = [failure for result in drawings.values() for failure in result.failures][:48]
        labels = [f"{failure.prompt}: {', '.join(failure.wrong)}" for failure in wrong]
        _save_sheet([failure.image for failure in wrong], labels, failures)
    _report(drawings, answers, as_json)


def _score_answers(model: LatteFlow, path: Path, count: int, seed: int, progress: Progress) -> AnswerScore:
    processor = load_image_processor(path)
    task = progress.add_task("ask questions", total=count)
    return score_answers(
        lambda images, texts: answer(model.vlm, model.tokenizer, processor, images, texts),
        count,
        seed,
        lambda n: progress.advance(task, n),
    )


def _report(drawings: dict[str, DrawingScore], answers: AnswerScore | None, as_json: bool) -> None:
    if as_json:
        report: dict[str, object] = {
            name.replace(", ", "_").replace(" ", "_"): {
                "prompts": result.prompts,
                **{part: result.share(part) for part in ("all", *ATTRIBUTES) if part in result.stated},
            }
            for name, result in drawings.items()
        }
        if answers is not None:
            report["answers"] = {"questions": sum(answers.asked.values()), "right": answers.share()}
        typer.echo(json.dumps(report))
        return
    if drawings:
        table = Table("right in the image", *drawings, title="Held-out prompts")
        for name in ("all", *ATTRIBUTES):
            cells = [f"{r.share(name):.1%} of {r.stated[name]}" if name in r.stated else "" for r in drawings.values()]
            table.add_row("all attributes" if name == "all" else name, *cells, end_section=name == "all")
        stdout.print(table)
    if answers is not None:
        table = Table("question about", "right", title="Held-out questions about rendered images")
        table.add_row("everything", f"{answers.share():.1%} of {sum(answers.asked.values())}", end_section=True)
        for kind in sorted(answers.asked):
            table.add_row(kind, f"{answers.right[kind] / answers.asked[kind]:.1%} of {answers.asked[kind]}")
        stdout.print(table)


def _save_sheet(images: Sequence[np.ndarray], labels: Sequence[str], path: Path) -> None:
    if images:
        save_png(contact_sheet([Image.fromarray(image) for image in images], labels, columns=8), path)
