"""Answers: what transformers' own `generate` says, alone, in batches, and piece by piece."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latte.checkpoint import load_image_processor
from latte.model import LatteFlow
from runtime.answers import AnswerSettings, _Writer, choose_token, likeliest_tokens
from runtime.errors import EngineError, InputError
from runtime.language import LanguageModel
from runtime.pipeline import LatteFlowPipeline
from tests.reference import reference_tokens
from tests.tiny import scale_weight

RunCommand = Callable[..., tuple[int, str, str]]
QUESTION = "what colour is the large circle?"


def random_image(seed: int, width: int = 64, height: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


CONVERSATIONS = {
    "text alone": ([], QUESTION),
    "an image": ([random_image(0)], QUESTION),
    "a wide image": ([random_image(1, 200, 50)], "describe the image"),
    "two images": ([random_image(2, 96, 64), random_image(3, 40, 130)], "is there a ring?"),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_greedy_answers_are_those_of_transformers(name: str, pipe: LatteFlowPipeline, model: LatteFlow) -> None:
    images, question = CONVERSATIONS[name]
    expected = reference_tokens(model, load_image_processor(pipe.bundle), images, question, 32)
    answer = pipe.ask(images, question, max_new_tokens=32)
    assert answer == model.tokenizer.decode(expected, skip_special_tokens=True)
    assert answer


def test_a_batch_answers_as_each_alone(pipe: LatteFlowPipeline) -> None:
    """Rows of other lengths and other numbers of images change nothing."""
    images = [images for images, _ in CONVERSATIONS.values()]
    questions = [question for _, question in CONVERSATIONS.values()]
    together = pipe.ask(images, questions, max_new_tokens=12)
    alone = [pipe.ask(*pair, max_new_tokens=12) for pair in zip(images, questions, strict=True)]
    assert together == alone


def test_a_stream_is_the_answer_in_pieces(pipe: LatteFlowPipeline) -> None:
    pieces = list(pipe.ask_stream(random_image(0), QUESTION, max_new_tokens=12))
    assert len(pieces) > 1
    assert "".join(pieces) == pipe.ask(random_image(0), QUESTION, max_new_tokens=12)


def test_messages_are_several_turns(pipe: LatteFlowPipeline, model: LatteFlow) -> None:
    turns = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": [{"type": "image", "image": random_image(0)}, {"type": "text", "text": QUESTION}]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "where is it?"},
    ]
    inputs = pipe.chat.encode_conversations([turns])
    text = model.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    expected = text.replace("<|image_pad|>", "<|image_pad|>" * inputs.images.tokens[0])
    assert inputs.input_ids[0].tolist() == model.tokenizer(expected, add_special_tokens=False)["input_ids"]
    assert pipe.ask(messages=[turns, turns[:2]], max_new_tokens=4)[1] == pipe.ask(
        random_image(0), QUESTION, max_new_tokens=4
    )


@pytest.mark.parametrize("count", [1, 3])
def test_positions_are_those_of_transformers(count: int, pipe: LatteFlowPipeline, model: LatteFlow) -> None:
    images = [random_image(i, 64 + 30 * i, 100 - 20 * i) for i in range(count)]
    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": QUESTION}]
    inputs = pipe.chat.encode_conversations(
        [[{"role": "user", "content": content}], [{"role": "user", "content": "hello"}]]
    )
    ids = torch.from_numpy(inputs.input_ids)
    expected, deltas = model.vlm.model.get_rope_index(
        input_ids=ids,
        mm_token_type_ids=(ids == model.vlm.config.image_token_id).int(),
        image_grid_thw=torch.tensor([(1, 2 * rows, 2 * columns) for rows, columns in inputs.images.grids]),
        attention_mask=torch.from_numpy(inputs.attention_mask).long(),
    )
    kept = inputs.attention_mask[None].repeat(3, axis=0)
    assert np.array_equal(inputs.position_ids[kept], expected.numpy()[kept])
    assert inputs.next_position.tolist() == (inputs.attention_mask.sum(axis=1) + deltas[:, 0].numpy()).tolist()


def test_large_images_go_through_the_tower_one_by_one(pipe: LatteFlowPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    images = pipe.chat.image_processor([random_image(0), random_image(1, 128, 64), random_image(2)])
    together = pipe.answerer.encode_images(images).numpy()
    monkeypatch.setattr("runtime.answers.PATCHES_PER_RUN", 64)
    assert np.abs(pipe.answerer.encode_images(images) - together).max() < 1e-5


def test_one_session_draws_and_answers(bundle: Path) -> None:
    """The VLM's weights are in memory once."""
    with LatteFlowPipeline.from_pretrained(bundle) as pipe:
        pipe("a red star", num_inference_steps=2)
        session = pipe.engines["vlm"]
        pipe.ask(random_image(0), QUESTION, max_new_tokens=2)
        assert pipe.engines["vlm"] is session
        assert sorted(pipe.engines.loaded) == [
            "expert_0",
            "expert_1",
            "solver_step",
            "vae_decoder",
            "vision_encoder",
            "vlm",
        ]


def test_keys_and_values_stay_with_the_session(pipe: LatteFlowPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between tokens nothing but the tokens comes to the host, or the logits where tokens are drawn."""
    from runtime.backends.onnxruntime import OrtTensor

    copied = []
    to_numpy = OrtTensor.numpy
    monkeypatch.setattr(OrtTensor, "numpy", lambda value: copied.append(value.shape) or to_numpy(value))
    pipe.ask(random_image(0), QUESTION, max_new_tokens=4)
    assert set(copied) == {(1,)}
    copied.clear()
    pipe.ask(random_image(0), QUESTION, max_new_tokens=4, temperature=1.0)
    assert {len(shape) for shape in copied} == {2}


def test_greedy_tokens_are_those_of_the_logits_and_minus_one_where_one_is_not_finite(
    pipe: LatteFlowPipeline, bundle_copy: Path
) -> None:
    ids = np.array([[5, 6, 7], [7, 8, 0]], np.int64)
    mask = np.array([[True, True, True], [True, True, False]])
    output = pipe._language.forward(ids, mask)
    assert output.best_token is not None
    np.testing.assert_array_equal(output.best_token.numpy(), output.logits.numpy().argmax(axis=1))
    scale_weight(bundle_copy, "vlm", "layers.0", np.inf)
    with LatteFlowPipeline.from_pretrained(bundle_copy) as broken:
        output = broken._language.forward(ids, mask)
        assert not np.isfinite(output.logits.numpy()).any()
        assert output.best_token is not None
        np.testing.assert_array_equal(output.best_token.numpy(), [-1, -1])
        with pytest.raises(EngineError, match="logits of an answer are not finite"):
            broken.ask(None, "what?", max_new_tokens=2)


def test_engines_that_choose_no_token_answer_from_their_logits(
    pipe: LatteFlowPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bundles of earlier versions have such engines."""
    expected = pipe.ask(random_image(0), QUESTION, max_new_tokens=6)
    forward = LanguageModel.forward
    monkeypatch.setattr(
        LanguageModel, "forward", lambda *args, **options: replace(forward(*args, **options), best_token=None)
    )
    assert pipe.ask(random_image(0), QUESTION, max_new_tokens=6) == expected


# ---- choosing tokens --------------------------------------------------------------------------------


def test_sampling_follows_its_seed_and_its_limits(pipe: LatteFlowPipeline) -> None:
    options = {"max_new_tokens": 8, "temperature": 1.5}
    first = pipe.ask(random_image(0), QUESTION, seed=1, **options)
    assert pipe.ask(random_image(0), QUESTION, seed=1, **options) == first
    assert any(pipe.ask(random_image(0), QUESTION, seed=seed, **options) != first for seed in (2, 3, 4))
    assert pipe.ask(random_image(0), QUESTION, seed=5, top_p=1e-9, **options) == pipe.ask(
        random_image(0), QUESTION, max_new_tokens=8
    )


def test_tokens_are_drawn_from_the_softmax_of_the_likeliest() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    rng = np.random.default_rng(0)

    def shares(settings: AnswerSettings) -> np.ndarray:
        drawn = [choose_token(logits, rng, settings) for _ in range(4000)]
        return np.bincount(drawn, minlength=4) / len(drawn)

    assert shares(AnswerSettings(temperature=1.0)) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    assert shares(AnswerSettings(temperature=1.0, top_p=0.75)) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert shares(AnswerSettings(temperature=0.5))[0] == pytest.approx(0.25 / 0.365, abs=0.03)
    assert choose_token(logits, rng, AnswerSettings()) == 0


def test_a_temperature_close_to_zero_takes_the_likeliest_token() -> None:
    """A quotient of such a temperature was infinite, and its probabilities were not numbers."""
    logits = np.array([3.0, 5.0, -2.0], np.float32)
    for temperature in (5e-324, 2.225073858507e-311, 1e-300, 1e-30):
        assert choose_token(logits, np.random.default_rng(0), AnswerSettings(temperature=temperature)) == 1


@pytest.mark.parametrize("kind", ["peaked", "flat", "equal", "equal where it matters"])
@pytest.mark.parametrize("top_p", [1e-9, 0.1, 0.9, 0.999999, 1.0])
def test_the_likeliest_tokens_are_those_of_a_sort_of_all(kind: str, top_p: float) -> None:
    rng = np.random.default_rng(0)
    logits = {
        "peaked": 5 * rng.standard_normal(5000),
        "flat": 0.01 * rng.standard_normal(5000),
        "equal": np.zeros(5000),
        "equal where it matters": np.where(rng.random(5000) < 0.3, 4.0, 0.0),
    }[kind]
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    before = np.cumsum(probabilities[order]) - probabilities[order]
    np.testing.assert_array_equal(likeliest_tokens(probabilities, top_p), order[before < top_p])


def test_an_answer_ends_before_a_stop_text(pipe: LatteFlowPipeline) -> None:
    whole = pipe.ask(random_image(0), QUESTION, max_new_tokens=24)
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    expected = whole[: whole.index(stop)]
    assert pipe.ask(random_image(0), QUESTION, max_new_tokens=24, stop=[stop, "never written"]) == expected
    assert "".join(pipe.ask_stream(random_image(0), QUESTION, max_new_tokens=24, stop=[stop])) == expected


def test_the_writer_holds_back_what_may_become_a_stop_text(model: LatteFlow) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(model.tokenizer.backend_tokenizer.to_str())
    writer = _Writer(tokenizer, ("red star",))
    pieces = [writer.add(token) for token in tokenizer.encode("a red circle", add_special_tokens=False).ids]
    assert "".join(pieces) + writer.finish() == "a red circle"
    assert not writer.stopped
    writer = _Writer(tokenizer, ("red star",))
    text = "".join(writer.add(token) for token in tokenizer.encode("a red star", add_special_tokens=False).ids)
    assert (text, writer.stopped) == ("a ", True)


def test_an_answer_ends_at_the_end_token(pipe: LatteFlowPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = pipe.chat.encode_conversations([[{"role": "user", "content": QUESTION}]])
    tokens = [int(token[0]) for token in pipe.answerer.tokens(inputs, AnswerSettings(max_new_tokens=6))]
    ending = pipe.manifest.understanding.model_copy(update={"eos_token_ids": (tokens[2],)})
    monkeypatch.setattr(pipe.answerer, "_understanding", ending)
    expected = pipe.chat.tokenizer.decode(tokens[: tokens.index(tokens[2])])
    assert pipe.ask(None, QUESTION, max_new_tokens=6) == expected


def test_an_answer_ends_where_the_context_does(pipe: LatteFlowPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = pipe.chat.encode_conversations([[{"role": "user", "content": QUESTION}]])
    short = pipe.manifest.understanding.model_copy(update={"max_context_tokens": inputs.input_ids.shape[1] + 3})
    monkeypatch.setattr(pipe.answerer, "_understanding", short)
    assert len(list(pipe.answerer.tokens(inputs, AnswerSettings(max_new_tokens=50)))) == 3


# ---- what cannot work -------------------------------------------------------------------------------

BAD_QUESTIONS = {
    "an empty question": (([], " "), {}, "the question is empty"),
    "no text": (([], 7), {}, "must be text or a list of texts"),
    "nothing": (([], None), {}, "there is no question"),
    "both": (([], "hi"), {"messages": []}, "either messages, or images and a question"),
    "no message": ((), {"messages": []}, "at least one message"),
    "no role": ((), {"messages": [{"content": "hi"}]}, "a message needs a role"),
    "an address": (
        (),
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "http://x"}]}]},
        "a part of a message must be",
    ),
    "the assistant last": ((), {"messages": [{"role": "assistant", "content": "hi"}]}, "must be the user's"),
    "a special token": (([], "a <|image_pad|>"), {}, "special token <|image_pad|>"),
    "too long": (([], "red " * 600), {}, "the model's limit is 512"),
    "too many images": (([random_image(0, 512, 512)] * 2, "hi"), {}, "of them for 2 images"),
    "more images than questions": (([[], []], ["hi"]), {}, "one entry for each of 1 questions, got 2"),
    "no new tokens": (([], "hi"), {"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
    "temperature": (([], "hi"), {"temperature": float("nan")}, "temperature must be"),
    "top_p": (([], "hi"), {"top_p": 0.0}, "top_p must be"),
    "seed": (([], "hi"), {"seed": -1}, "must not be negative"),
    "stop": (([], "hi"), {"stop": [""]}, "a stop text is empty"),
}


@pytest.mark.parametrize("name", BAD_QUESTIONS)
def test_a_bad_question_is_one_clear_line(name: str, pipe: LatteFlowPipeline) -> None:
    arguments, options, message = BAD_QUESTIONS[name]
    with pytest.raises(InputError, match=message) as raised:
        pipe.ask(*arguments, **options)
    assert "\n" not in str(raised.value)


def test_the_command_asks(bundle: Path, tmp_path: Path, run_command: RunCommand, pipe: LatteFlowPipeline) -> None:
    random_image(0).save(tmp_path / "a.png")
    random_image(1).save(tmp_path / "b.png")
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    expected = pipe.ask(files, QUESTION, max_new_tokens=6)
    code, out, error = run_command("ask", bundle, *files, QUESTION, "--max-new-tokens", 6)
    assert (code, out, error) == (0, expected + "\n", "")
    assert run_command("ask", bundle, *files, QUESTION, "--max-new-tokens", 6, "--stream")[1] == expected + "\n"
    report = json.loads(run_command("ask", bundle, *files, QUESTION, "--max-new-tokens", 6, "--json")[1])
    assert report["answer"] == expected
    assert report["images"] == [str(file) for file in files]
    code, _, error = run_command("ask", bundle, "  ")
    assert (code, error) == (2, "error: the question is empty; ask something\n")
