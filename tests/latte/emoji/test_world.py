"""What the stages of a model of emoji are trained on, and how it is scored."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from latte.checkpoint import save_checkpoint
from latte.commands import score
from latte.emoji.appearance import looks_of
from latte.emoji.captions import describe
from latte.emoji.catalogue import Catalogue
from latte.emoji.questions import WHAT
from latte.emoji.recipe import Emoji, untrained
from latte.emoji.scenes import Placed, Scene, draw
from latte.emoji.score import held_out_prompts, score_answers, score_drawing
from latte.emoji.vision import token_labels
from latte.emoji.vlm import EmojiConversations, emoji_tokenizer, texts_of
from latte.model import LatteFlow
from latte.score import JudgedImage
from latte.training.autoencoder import AutoencoderStage
from latte.training.conversations import ConversationEncoder
from latte.training.stage import Rows, Stage
from latte.training.vision import VisionStage

ROWS = Rows(0, range(2), 2)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model_and_processor(catalogue: Catalogue) -> tuple[LatteFlow, object]:
    return untrained(catalogue)


@pytest.fixture(scope="module")
def world(package: Path) -> Emoji:
    return Emoji(package)


def test_every_stage_trains_on_the_world(world: Emoji, model_and_processor: tuple[LatteFlow, object]) -> None:
    model, processor = model_and_processor
    encoder = ConversationEncoder(model.tokenizer, processor)  # type: ignore[arg-type]
    stages: Sequence[Stage] = (
        AutoencoderStage(model.vae.requires_grad_(True), world.images(model)),
        VisionStage(model.vlm, processor, world.labelled_images(model)),  # type: ignore[arg-type]
        world.vlm_stage(model, encoder),
        world.flow_stage(model),
    )
    assert [stage.name for stage in stages] == list(world.settings)
    for stage in stages:
        prepared = stage.prepare(stage.batch(0, ROWS), CPU)
        loss = torch.stack(list(stage.losses(stage.module, prepared, 0, ROWS).values())).sum()
        loss.backward()
        assert torch.isfinite(loss)


def test_rows_do_not_depend_on_how_they_are_shared(world: Emoji, model_and_processor: tuple[LatteFlow, object]) -> None:
    model, _ = model_and_processor
    together = world.flow_stage(model).batches.batch(3, range(4), 4)
    parts = [world.flow_stage(model).batches.batch(3, rows, 4) for rows in (range(2), range(2, 4))]
    assert together.prompts == (*parts[0].prompts, *parts[1].prompts)
    assert torch.equal(together.pixels, torch.cat([part.pixels for part in parts]))  # type: ignore[arg-type]


def test_prompts_fit_the_model(world: Emoji, model_and_processor: tuple[LatteFlow, object]) -> None:
    model, _ = model_and_processor
    model.encode_prompts([prompt for prompt, _ in held_out_prompts(world.catalogue, 20, 2, 0, unseen_words=True)])


def test_the_tokens_of_an_emoji_are_labelled_with_it(catalogue: Catalogue) -> None:
    scene = Scene((Placed("red disc", "small", "left"), Placed("green box", "small", "right")), "navy")
    emoji, size, place, background = token_labels(scene, catalogue).T.reshape(4, 4, 4)
    red, green = catalogue.index("red disc") + 1, catalogue.index("green box") + 1
    assert emoji.tolist() == [[0] * 4, [red, red, green, green], [red, red, green, green], [0] * 4]
    assert size[1].tolist() == [2] * 4
    assert place[1].tolist() == [4, 4, 6, 6]
    assert np.all(background == 5)


def test_a_large_emoji_fills_its_tokens(catalogue: Catalogue) -> None:
    labels = token_labels(Scene((Placed("lol", "large", "bottom right"),), "pink"), catalogue)
    assert (labels[:, 0].reshape(4, 4) > 0).tolist() == [[False] * 4, *([[False, True, True, True]] * 3)]


def test_conversations_have_the_answers_of_their_scene(world: Emoji) -> None:
    seen_image = seen_text = False
    for conversation in EmojiConversations(world.catalogue).batch(0, range(40), 40):
        if conversation.image is not None:
            seen_image = True
            assert len(conversation.turns) == 4
        else:
            seen_text = True
            _, canonical = conversation.turns[0]
            names = [name for name in world.catalogue.names if name in canonical]
            assert names
    assert seen_image
    assert seen_text


def test_the_tokenizer_knows_all_names(catalogue: Catalogue) -> None:
    tokenizer = emoji_tokenizer(texts_of(catalogue))
    for name in catalogue.names:
        ids = tokenizer(f"a {name}")["input_ids"]
        assert tokenizer.decode(ids) == f"a {name}"
        assert len(ids) <= 2 * len(f"a {name}".split())


@pytest.mark.parametrize(("emoji", "unseen_words"), [(1, False), (2, True)])
def test_perfect_images_score_100_percent_and_wrong_ones_0(
    catalogue: Catalogue, emoji: int, unseen_words: bool
) -> None:
    prompts = dict(held_out_prompts(catalogue, 30, emoji, 1, unseen_words=unseen_words))
    sized = {
        prompt: Scene(tuple(Placed(e.name, e.size or "small", e.place) for e in scene.emoji), scene.background)
        for prompt, scene in prompts.items()
    }

    def right(texts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        return np.stack([draw(sized[text], catalogue) for text in texts])

    def wrong(texts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        return np.stack([right(texts, seeds)[i - 1] for i in range(len(texts))])

    perfect = score_drawing(right, catalogue, 30, emoji, 1, unseen_words=unseen_words)
    assert perfect.share() == 1
    assert perfect.prompts == 30
    assert not perfect.failures
    poor = score_drawing(wrong, catalogue, 30, emoji, 1, unseen_words=unseen_words)
    assert poor.share() < 0.1
    assert "emoji" in poor.failures[0].wrong


def test_answers_are_scored_by_kind(catalogue: Catalogue) -> None:
    asked = []

    def answer(images: Sequence[np.ndarray], questions: Sequence[str]) -> list[str]:
        asked.extend(questions)
        return ["two" if question.startswith("how many") else "?" for question in questions]

    result = score_answers(answer, catalogue, 120, seed=1)
    assert sum(result.asked.values()) == len(asked) == 120
    assert set(result.asked) >= {"count", "background", "place", "emoji", "presence", "description"}
    assert 0 < result.right["count"] < result.asked["count"]
    only = score_answers(answer, catalogue, 5, only=WHAT)
    assert only.asked == {"emoji": 5}
    assert all(expected in catalogue.names for _, expected, _ in only.failures)


def test_descriptions_are_canonical(catalogue: Catalogue) -> None:
    """A prompt that states everything and the description of its image are one text."""
    for _, stated in held_out_prompts(catalogue, 20, 1, 0):
        (emoji,) = stated.emoji
        assert describe(stated).startswith(f"{emoji.size} {emoji.name} ")


def test_a_checkpoint_is_scored_on_the_world(
    tmp_path: Path, package: Path, model_and_processor: tuple[LatteFlow, object]
) -> None:
    model, processor = model_and_processor
    with torch.no_grad():
        for parameter in model.flow.parameters():
            if (parameter == 0).all():  # the velocity's, among others: an untrained model is refused
                parameter.normal_(std=0.2)
    checkpoint = tmp_path / "checkpoint"
    save_checkpoint(model, processor, checkpoint)  # type: ignore[arg-type]
    app = typer.Typer()
    app.command()(score)
    sheets = {name: tmp_path / f"{name}.png" for name in ("sheet", "failures")}
    few = ["--prompts", "2", "--questions", "3", "--num-inference-steps", "4", "--examples", "1", "--json"]
    few += [text for name, path in sheets.items() for text in (f"--{name}", str(path))]
    result = CliRunner().invoke(app, [str(checkpoint), "--data", str(package), *few])
    assert result.exit_code == 0, result.output
    report = json.loads(result.output.splitlines()[-1])
    assert report["1_emoji"]["prompts"] == 2
    assert report["1_emoji"]["all"] == report["2_emoji"]["all"] == report["1_emoji_unseen_words"]["all"] == 0
    assert report["answers"]["questions"] == report["what_is_this"]["questions"] == 3
    with Image.open(sheets["sheet"]) as sheet, Image.open(sheets["failures"]) as failures:
        assert sheet.width < failures.width  # 3 examples, and 6 images that are all wrong

    refused = CliRunner().invoke(app, [str(checkpoint), "--data", str(tmp_path)])
    assert "--data must be shapes, or a package" in str(refused.exception)


def test_an_image_is_labelled_with_what_is_wrong() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    assert JudgedImage("a cat", 0, image, ("emoji", "place")).label == "a cat | WRONG: emoji, place"
    assert JudgedImage("a cat", 0, image, ()).label == "a cat"


def test_looks_are_told_where_a_name_ends_and_up_to_the_next(
    world: Emoji, model_and_processor: tuple[LatteFlow, object]
) -> None:
    model, processor = model_and_processor
    encoder = ConversationEncoder(model.tokenizer, processor)  # type: ignore[arg-type]
    prompts = world.vlm_stage(model, encoder).batch(0, ROWS).prompts
    looks = looks_of(world.catalogue)
    all_behind = ""
    for n, (row, place, look) in enumerate(zip(prompts.rows, prompts.places, prompts.looks, strict=True)):
        (emoji,) = np.flatnonzero((looks == look.numpy()).all(axis=1))
        read = model.tokenizer.decode(prompts.input_ids[row, : int(place) + 1])
        names = (world.catalogue.emoji[emoji].name, *world.catalogue.emoji[emoji].synonyms)
        if n % 2 == 0:
            assert read.endswith(names), (read, names)
            named = read
        else:
            assert read.startswith(named)
            behind = read.removeprefix(named)
            assert not any(name in behind for name in world.catalogue.names), (read, named)
            all_behind += behind
    assert all_behind
