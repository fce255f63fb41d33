"""The distillation of guidance and steps: its targets, what it learns, and what the student says it can do."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latte.checkpoint import load_checkpoint, load_config
from latte.merge import merge
from latte.model import LatteFlow
from latte.training.distillation import Distillation, DistillationBatch, DistillationStage
from latte.training.log import LOG
from latte.training.stage import Rows, row_noise
from runtime.cli import load_command
from runtime.errors import CheckpointError, InputError
from runtime.flow_time import SamplingDefaults
from tests.tiny import save_tiny, tiny_model

CPU = torch.device("cpu")


class Walls:
    """Rows of one colour each, with prompts."""

    def batch(self, index: int, rows: range, total: int) -> WallsBatch:
        return WallsBatch(tuple(f"a wall of colour {index * total + row}" for row in rows))


class WallsBatch:
    latents = None
    token_ids = None

    def __init__(self, prompts: tuple[str, ...]) -> None:
        self.prompts = prompts
        self.pixels = torch.linspace(-1, 1, len(prompts))[:, None, None, None].expand(-1, 3, 24, 32)


@cache
def teacher_model() -> LatteFlow:
    return tiny_model()


def stage_of(how: Distillation) -> tuple[DistillationStage, DistillationBatch]:
    stage = DistillationStage(copy.deepcopy(teacher_model()), Walls(), how)
    return stage, stage.prepare(stage.batch(0, Rows(0, range(4), 4)), CPU)


def noise_of(prepared: DistillationBatch) -> torch.Tensor:
    return row_noise(Rows(0, range(4), 4).generators(0), prepared.data.shape[1:], CPU)


@pytest.mark.parametrize("group", [0, 1])
def test_a_student_as_slow_as_its_unguided_teacher_has_nothing_to_learn(group: int) -> None:
    stage, prepared = stage_of(Distillation(steps=(2,), guidance_scale=1.0, teacher_steps=2))
    (time,) = stage.validation_times(group)
    with torch.no_grad():
        error = stage.error_at(stage.module, prepared, group, time, noise_of(prepared))
    assert float(error.abs().max()) < 1e-5


def test_the_target_is_where_the_guided_teacher_leads() -> None:
    """Of rows that start at noise, by the reference's own sampler with the teacher's guidance."""
    teacher = teacher_model()
    stage, prepared = stage_of(Distillation(steps=(2, 4), guidance_scale=3.0, teacher_steps=8))
    model = stage.model
    noise = noise_of(prepared)
    start, end = model.config.schedule.interval(0)
    count = round(8 * (end - start))
    states: list[torch.Tensor] = []
    prompts = list(stage.batch(0, Rows(0, range(4), 4)).prompts)
    # As many equal steps in the interval as the teacher makes, by a schedule that is one long interval.
    x = noise
    for i in range(count):
        t = start + (end - start) * i / count
        with torch.no_grad():
            time = torch.full((4,), t)
            v_c, v_u = (
                teacher.flow(x, time, prefix.kv[0], prefix.mask, 0)
                for prefix in (teacher.encode_prompts(prompts), teacher.encode_prompts([""] * 4))
            )
        x = x + (end - start) / count * (v_u + 3.0 * (v_c - v_u))
        states.append(x)
    with torch.no_grad():
        error = stage.error_at(stage.module, prepared, 0, start, noise)
        velocity = model.flow(noise, torch.full((4,), start), prepared.prefix.kv[0], prepared.prefix.mask, 0)
    np.testing.assert_allclose(velocity - error, (states[-1] - noise) / (end - start), atol=1e-5)


def test_a_second_step_corrects_the_first() -> None:
    """From where the student's own first step leads, the target is the end of the interval."""
    stage, prepared = stage_of(Distillation(steps=(2, 4), guidance_scale=3.0, teacher_steps=8))
    noise = noise_of(prepared)
    start, end = stage.model.config.schedule.interval(0)
    middle = stage.validation_times(0)[1]
    assert start < middle < end
    flow, prefix = stage.module, prepared.prefix
    with torch.no_grad():
        first = flow(noise, torch.full((4,), start), prefix.kv[0], prefix.mask, 0)
        target = noise + (end - start) * (first - stage.error_at(flow, prepared, 0, start, noise))
        x = noise + (middle - start) * first
        second = flow(x, torch.full((4,), middle), prefix.kv[0], prefix.mask, 0)
        error = stage.error_at(flow, prepared, 0, middle, noise)
    np.testing.assert_allclose(second - error, (target - x) / (end - middle), atol=1e-4)


def test_groups_that_are_not_trained_lead_as_the_teacher_does() -> None:
    """So that machines that distil one group each need not wait for each other."""
    how = Distillation(steps=(2,), guidance_scale=3.0, teacher_steps=8)
    alone, prepared = stage_of(how)
    alone.train_groups([1])
    together, _ = stage_of(how)
    noise = noise_of(prepared)
    with torch.no_grad():
        start = alone.model.config.schedule.interval(1)[0]
        from_teacher = alone._starts(alone.module, prepared, 1, noise)
        from_student = together._starts(together.module, prepared, 1, noise)
        taught = alone._teach(prepared, 0, noise)
    torch.testing.assert_close(from_teacher[::2], taught[::2])
    assert not torch.allclose(from_student[::2], taught[::2])
    torch.testing.assert_close(from_teacher[1::2], (start * prepared.data + (1 - start) * noise)[1::2])
    torch.testing.assert_close(from_student[1::2], from_teacher[1::2])


def test_the_command_makes_a_student_that_is_nearer_to_its_teacher(tmp_path: Path) -> None:
    save_tiny(tmp_path / "teacher")
    config = json.loads((tmp_path / "teacher" / "config.json").read_text(encoding="utf-8"))
    config["sampling"] |= {"num_inference_steps": 8, "guidance_scale": 2.5}
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    images = tmp_path / "images"
    images.mkdir()
    for i in range(4):
        Image.fromarray(np.full((24, 32, 3), 60 * i, np.uint8)).save(images / f"{i}.png")
        (images / f"{i}.txt").write_text(f"a wall of colour {i}\n", encoding="utf-8")
    arguments = [
        *(str(tmp_path / "teacher"), "--data", str(images), "--out", str(tmp_path / "run"), "--steps", "2,4"),
        *("--max-train-steps", "120", "--train-batch-size", "8", "--learning-rate", "4e-3"),
        *("--lr-warmup-steps", "0", "--validation-steps", "120", "--cpu"),
    ]
    load_command("distill").main(arguments, standalone_mode=False)
    lines = [json.loads(line) for line in (tmp_path / "run" / LOG).read_text(encoding="utf-8").splitlines()]
    for group in ("group_0", "group_1"):
        assert lines[-1][group] < 0.7 * lines[0][group], group
    assert (tmp_path / "run" / "validation" / "step-120.png").is_file()

    student = load_checkpoint(tmp_path / "run" / "checkpoint")
    assert student.config.sampling == SamplingDefaults(
        num_inference_steps=2, guidance_scale=2.5, guidance_distilled=True, allowed_steps=(2, 4)
    )
    teacher = load_checkpoint(tmp_path / "teacher")
    prompt = "a wall of colour 2"
    prompts = [f"a wall of colour {i}" for i in range(8)]
    wanted = teacher.generate(prompts, output_type="latent")

    def distance(model: LatteFlow, **options: object) -> float:
        latents = model.generate(prompts, output_type="latent", **options)  # type: ignore[arg-type]
        return float(np.square(latents - wanted).mean())

    assert distance(student) < 0.9 * distance(teacher, num_inference_steps=2, guidance_scale=1.0)
    with pytest.raises(InputError, match="distilled for 2 or 4 steps, got num_inference_steps 20"):
        student.generate(prompt, num_inference_steps=20)
    with pytest.raises(InputError, match=r"guidance of scale 2\.5 built in, got guidance_scale 5; leave it out"):
        student.generate(prompt, guidance_scale=5.0)
    with pytest.raises(InputError, match="without a negative prompt; leave it out"):
        student.generate(prompt, "a wall")
    again = ["--data", str(images), "--out", str(tmp_path / "run"), "--steps", "2", "--cpu"]
    with pytest.raises(CheckpointError, match=r"the stage was flow in 2, 4 steps .* is flow in 2 steps"):
        load_command("distill").main([str(tmp_path / "teacher"), *again], standalone_mode=False)
    with pytest.raises(InputError, match="which training on images would undo"):
        load_command("train").main(
            [str(tmp_path / "run" / "checkpoint"), "--data", str(images), "--out", str(tmp_path / "plain"), "--cpu"],
            standalone_mode=False,
        )
    with pytest.raises(InputError, match="is distilled already"):
        load_command("distill").main(
            [str(tmp_path / "run" / "checkpoint"), "--data", str(images), "--out", str(tmp_path / "again"), "--cpu"],
            standalone_mode=False,
        )


@pytest.mark.parametrize("scale", ["nan", "1e9"])
def test_a_guidance_scale_that_is_none_is_refused(tmp_path: Path, scale: str) -> None:
    save_tiny(tmp_path / "teacher")
    with pytest.raises(InputError, match="--guidance-scale must be from"):
        load_command("distill").main(
            [str(tmp_path / "teacher"), "--out", str(tmp_path / "run"), "--guidance-scale", scale],
            standalone_mode=False,
        )


def test_a_teacher_guides_in_its_own_interval_only() -> None:
    model = copy.deepcopy(teacher_model())
    first = model.config.schedule.interval(0)
    sampling = model.config.sampling.model_copy(update={"guidance_interval": first})
    model.config = model.config.model_copy(update={"sampling": sampling})
    how = Distillation(steps=(2,), guidance_scale=3.0, teacher_steps=8)
    stage = DistillationStage(model, Walls(), how)
    prepared = stage.prepare(stage.batch(0, Rows(0, range(4), 4)), CPU)
    x = noise_of(prepared)
    unguided, _ = stage_of(Distillation(steps=(2,), guidance_scale=1.0, teacher_steps=8))
    guided, _ = stage_of(how)
    with torch.no_grad():
        assert torch.equal(stage._teach(prepared, 0, x), guided._teach(prepared, 0, x))
        assert torch.equal(stage._teach(prepared, 1, x), unguided._teach(prepared, 1, x))


def test_groups_that_were_distilled_apart_are_merged(tmp_path: Path) -> None:
    save_tiny(tmp_path / "teacher")
    students = []
    for group in (0, 1):
        out = tmp_path / f"run-{group}"
        arguments = ["--data", "shapes", "--out", str(out), "--steps", "2", "--groups", str(group), "--cpu"]
        arguments += ["--max-train-steps", "2", "--train-batch-size", "4"]
        load_command("distill").main([str(tmp_path / "teacher"), *arguments], standalone_mode=False)
        students.append(out / "checkpoint")
    with pytest.raises(CheckpointError, match="group 1 is not"):
        merge(tmp_path / "teacher", students[:1], tmp_path / "half")
    merged = merge(tmp_path / "teacher", students, tmp_path / "merged")
    assert (merged.sources, merged.embeddings) == (tuple(students), "same")
    assert load_config(tmp_path / "merged").sampling.allowed_steps == (2,)


def test_a_number_of_steps_must_fit_the_groups() -> None:
    with pytest.raises(InputError, match="--steps must be a multiple of the number of expert groups, 2; got 3"):
        stage_of(Distillation(steps=(2, 3), guidance_scale=3.0, teacher_steps=8))
