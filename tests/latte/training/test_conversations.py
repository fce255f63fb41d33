"""Conversations become what Qwen2-VL's own code makes of them, with loss on the answers alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from latte.shapes.scenes import Scene, Shape
from latte.shapes.vision import token_labels
from latte.shapes.vlm import sample_conversation, small_image_processor, small_vlm, train_tokenizer
from latte.training.conversations import Conversation, ConversationEncoder


def test_a_scene_that_leaves_something_open_has_no_labels() -> None:
    with pytest.raises(ValueError, match="needs a background"):
        token_labels(Scene((Shape("star", "red", "large", "top left"),), None))
    with pytest.raises(ValueError, match="needs a size and a cell"):
        token_labels(Scene((Shape("star", "red", None, "top left"),), "white"))


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (128, 48)])
def test_positions_and_patches_of_a_conversation_are_qwen2_vls_own(size: tuple[int, int]) -> None:
    tokenizer = train_tokenizer()
    vlm = small_vlm(tokenizer)
    rng = np.random.default_rng(0)
    conversation = next(c for c in iter(lambda: sample_conversation(rng), None) if c.image is not None)
    conversation = replace(conversation, image=np.zeros((*size, 3), np.uint8))
    batch = ConversationEncoder(tokenizer, small_image_processor()).encode([conversation])
    is_image = (batch.input_ids == vlm.config.image_token_id).int()
    expected, _ = vlm.model.get_rope_index(batch.input_ids, is_image, image_grid_thw=batch.image_grid_thw)
    assert torch.equal(batch.position_ids, expected)


def test_there_is_loss_on_the_answers_alone() -> None:
    tokenizer = train_tokenizer()
    batch = ConversationEncoder(tokenizer, small_image_processor()).encode([Conversation((("what?", "red"),))])
    learned = batch.labels[batch.labels != -100]
    assert tokenizer.decode(learned) == "red<|im_end|>"


def test_token_labels_say_what_a_token_shows() -> None:
    labels = token_labels(Scene((Shape("star", "red", "large", "top left"),), "white"))
    assert (labels[0] == [5, 1, 3, 1, 0]).all()
    assert (labels[-1, :4] == 0).all()
