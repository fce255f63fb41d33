"""The pipeline on real ONNX Runtime sessions: what a caller relies on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latte.model import LatteFlow
from runtime.backends import to_host
from runtime.errors import BundleError, EngineError, InputError
from runtime.pipeline import LatteFlowPipeline
from runtime.rows import arrange_rows

PROMPTS = ["a red circle", "a small blue square above a large green star on a white background"]


def latents_of(pipe: LatteFlowPipeline, *arguments: object, **options: object) -> np.ndarray:
    options = {"num_inference_steps": 4, "output_type": "latent", "seed": 0} | options
    return np.asarray(pipe(*arguments, **options).images)  # type: ignore[arg-type]


def close(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b))


def test_the_engines_draw_what_the_reference_draws_from_the_same_seed(
    pipe: LatteFlowPipeline, model: LatteFlow
) -> None:
    options = {"num_inference_steps": 6, "guidance_scale": [3.0, 1.0], "shift": 1.5, "seed": [4, 9]}
    expected = model.generate(PROMPTS, **options, output_type="latent")  # type: ignore[arg-type]
    assert close(latents_of(pipe, PROMPTS, **options), expected)


def test_a_seed_gives_the_same_image_on_every_run(pipe: LatteFlowPipeline) -> None:
    assert np.array_equal(latents_of(pipe, PROMPTS, seed=5), latents_of(pipe, PROMPTS, seed=5))
    assert not close(latents_of(pipe, PROMPTS, seed=5), latents_of(pipe, PROMPTS, seed=6))


def test_an_image_is_the_same_alone_and_in_a_batch_of_other_prompts_seeds_and_scales(pipe: LatteFlowPipeline) -> None:
    together = latents_of(pipe, PROMPTS, seed=[3, 8], guidance_scale=[2.0, 1.0], num_images_per_prompt=1)
    for row, (prompt, seed, scale) in enumerate(zip(PROMPTS, [3, 8], [2.0, 1.0], strict=True)):
        assert close(together[row : row + 1], latents_of(pipe, prompt, seed=seed, guidance_scale=scale))


def test_images_of_a_prompt_stand_together_and_their_seeds_count_up(pipe: LatteFlowPipeline) -> None:
    output = pipe(PROMPTS, num_images_per_prompt=2, seed=7, num_inference_steps=2, output_type="latent")
    assert output.seeds == [7, 8, 9, 10]
    assert close(output.images[2:3], latents_of(pipe, PROMPTS[1], seed=9, num_inference_steps=2))


def test_without_a_seed_the_output_names_one_that_repeats_it(pipe: LatteFlowPipeline) -> None:
    output = pipe("a red circle", num_inference_steps=2, output_type="latent")
    assert np.array_equal(output.images, latents_of(pipe, "a red circle", seed=output.seeds, num_inference_steps=2))


def test_a_negative_prompt_steers_and_is_encoded_once(pipe: LatteFlowPipeline) -> None:
    plain = latents_of(pipe, PROMPTS[0])
    away = latents_of(pipe, PROMPTS[0], negative_prompt="a green star")
    assert not close(plain, away)
    assert close(latents_of(pipe, PROMPTS, negative_prompt=["", "a ring"])[:1], plain)
    calls: list[object] = []
    session = pipe.engines["vlm"]
    original = session.run
    session.run = lambda feed: (calls.append(feed["input_ids"].shape), original(feed))[1]  # type: ignore[method-assign]
    try:
        latents_of(pipe, ["a new prompt"], negative_prompt="a green star")
    finally:
        del session.run
    assert [shape[0] for shape in calls] == [1]


def test_output_types(pipe: LatteFlowPipeline) -> None:
    images = pipe(PROMPTS, num_inference_steps=1, seed=0).images
    arrays = pipe(PROMPTS, num_inference_steps=1, seed=0, output_type="np").images
    assert all(isinstance(image, Image.Image) and image.size == (32, 24) for image in images)
    assert arrays.dtype == np.uint8
    assert np.array_equal(np.stack([np.asarray(image) for image in images]), arrays)
    assert latents_of(pipe, PROMPTS, num_inference_steps=1).shape == (2, 4, 6, 8)


def test_other_sizes_and_given_noise(pipe: LatteFlowPipeline) -> None:
    assert pipe("a ring", height=40, width=20, num_inference_steps=1, output_type="np").images.shape == (1, 40, 20, 3)
    noise = np.random.default_rng(0).standard_normal((1, 4, 6, 8), np.float32)
    given = latents_of(pipe, "a ring", latents=noise, seed=None)
    drawn = latents_of(pipe, "a ring", generator=np.random.default_rng(0), seed=None)
    assert np.array_equal(given, drawn)


def test_a_callback_has_diffusers_signature_and_may_replace_latents(pipe: LatteFlowPipeline) -> None:
    seen: list[tuple[int, float, tuple[int, ...]]] = []

    def callback(
        caller: LatteFlowPipeline, step: int, t: float, tensors: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        assert caller is pipe
        seen.append((step, t, tensors["latents"].shape))
        return {"latents": np.zeros_like(tensors["latents"])} if step == 3 else {}

    result = latents_of(pipe, "a ring", callback_on_step_end=callback)
    assert seen == [(i, i / 4, (1, 4, 6, 8)) for i in range(4)]
    assert not result.any()


def test_the_output_says_which_groups_worked_and_how_long(pipe: LatteFlowPipeline) -> None:
    output = pipe("a ring", num_inference_steps=10, seed=0)
    assert output.steps_per_group == [3, 7]
    assert set(output.seconds) == {"prefix", "sample", "decode"}


def test_engines_are_loaded_when_needed_and_once(bundle: Path) -> None:
    with LatteFlowPipeline.from_pretrained(bundle) as pipe:
        assert pipe.engines.loaded == []
        pipe("a ring", num_inference_steps=1, output_type="latent")
        assert pipe.engines.loaded == ["vlm", "expert_0", "solver_step"]
        expert = pipe.engines["expert_0"]
        pipe("a ring", num_inference_steps=4)
        assert pipe.engines["expert_0"] is expert


def test_latents_that_are_not_finite_are_no_image(pipe: LatteFlowPipeline) -> None:
    def overflow(*_: object) -> dict[str, np.ndarray]:
        return {"latents": np.full((2, 4, 6, 8), np.inf, np.float32)}

    with pytest.raises(EngineError, match=r"latents of 2 of 2 images are not finite .*smaller guidance scale"):
        pipe(["a", "b"], num_inference_steps=2, callback_on_step_end=overflow)


def test_latents_that_no_decoder_takes_are_no_image(pipe: LatteFlowPipeline) -> None:
    """They decoded to a grey image without a word: the norms of the decoder overflow."""

    def replace(_: object, step: int, *__: object) -> dict[str, np.ndarray] | None:
        return {"latents": np.full((1, 4, 6, 8), 1e30, np.float32)} if step == 1 else None

    with pytest.raises(EngineError, match="latents of 1 of 1 images are beyond what decodes to an image"):
        pipe("a", num_inference_steps=2, callback_on_step_end=replace)


def test_latents_of_a_callback_that_do_not_fit_are_refused(pipe: LatteFlowPipeline) -> None:
    for wrong in ("x", np.zeros((1, 4, 6), np.float32)):
        with pytest.raises(
            InputError, match="callback_on_step_end must return latents as an array of numbers of shape"
        ):
            pipe("a", num_inference_steps=1, callback_on_step_end=lambda *_, latents=wrong: {"latents": latents})
    same = pipe("a", seed=3, num_inference_steps=1, output_type="np", callback_on_step_end=lambda *_: {"latents": None})  # type: ignore[dict-item, return-value]
    assert np.array_equal(same.images, pipe("a", seed=3, num_inference_steps=1, output_type="np").images)


def test_numbers_of_numpy_are_numbers(pipe: LatteFlowPipeline) -> None:
    plain = latents_of(pipe, PROMPTS, seed=[3, 4], guidance_scale=[2.0, 2.0], num_inference_steps=2)
    of_numpy = latents_of(
        pipe,
        PROMPTS,
        seed=np.array([3, 4]),
        guidance_scale=np.array(2.0),
        num_inference_steps=np.int64(2),
    )
    assert np.array_equal(plain, of_numpy)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([],), {}, "prompt is an empty list"),
        (("a",), {"num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
        (("a",), {"shift": 0.0}, "shift must be from 0.01 to 100, got 0"),
        (("a",), {"guidance_scale": float("nan")}, "guidance_scale must be from -100 to 100, got nan"),
        (("a",), {"guidance_scale": [1.0, 2.0]}, "one for each of 1 prompts, got 2"),
        (("a",), {"num_images_per_prompt": 0}, "at least 1, got 0"),
        (("a " * 200,), {}, "the model's limit is 128; shorten it"),
        (("a <|im_end|> b",), {}, r"special token <\|im_end\|>"),
        (("a",), {"latents": np.zeros((1, 4, 6), np.float32)}, r"latents must have shape \(1, 4, 6, 8\), got"),
        (("a",), {"latents": np.zeros((2, 4, 6, 8), np.float32)}, "latents must have shape"),
        (("a",), {"latents": np.full((1, 4, 6, 8), np.nan, np.float32)}, "latents must be finite"),
        (
            ("a",),
            {"latents": np.full((1, 4, 6, 8), 1e9, np.float32)},
            r"noise of variance 1, got a magnitude of 1e\+09",
        ),
        (("a",), {"guidance_scale": "3"}, "guidance_scale must be a number, got '3'"),
        (("a",), {"num_inference_steps": 8.0}, "num_inference_steps must be a whole number, got 8.0"),
        (("a",), {"guidance_interval": (0.5, 0.5)}, r"guidance_interval must be flow times .*, got 0.5 to 0.5"),
        (("a",), {"guidance_interval": 0.5}, "guidance_interval must be a pair of flow times, start and end, got 0.5"),
        (
            ("a",),
            {"guidance_interval": "ab"},
            "guidance_interval must be a pair of flow times, start and end, got 'ab'",
        ),
        (("a",), {"guidance_interval": ("0", 1)}, "guidance_interval must be a number, got '0'"),
        (("a",), {"guidance_scale": 10**400}, "guidance_scale must be a number of 64 bits, got one of 401 digits"),
        (("a",), {"guidance_scale": True}, "guidance_scale must be a number, got True"),
        (("a",), {"shift": "2"}, "shift must be a number, got '2'"),
        (("a",), {"negative_prompt": 5}, "negative_prompt must be text or a list of texts, got int"),
        (("a",), {"height": 64.0}, "height must be a whole number, got 64.0"),
        (("a",), {"latents": [["a"]]}, "latents must be an array of numbers"),
        (("a",), {"generator": 1}, "generator must be a numpy.random.Generator, got int"),
        ((["a", 5],), {}, "prompt must be text or a list of texts, got a list with int"),
        (("a",), {"seed": 1.0}, "seed must be a whole number, got 1.0"),
        (("a",), {"seed": [1.5]}, "seed must be a whole number, got 1.5"),
        (("a",), {"seed": 1, "generator": np.random.default_rng(0)}, "exclude each other"),
        (("a",), {"seed": [1, 2]}, "one for each of 1 images, got 2"),
        (("a",), {"seed": -1}, "a seed must be from 0 to 9223372036854775807, got -1"),
        ((["a", "b"],), {"seed": 2**63 - 1}, "a seed must be from 0 to .*, got 9223372036854775808"),
        (("a",), {"guidance_scale": 1e38}, "guidance_scale must be from -100 to 100, got 1e\\+38"),
        (("a",), {"shift": 1e30}, "shift must be from 0.01 to 100, got 1e\\+30"),
        (("a",), {"height": 30}, "height must be a positive multiple of 4 pixels, got 30"),
        (("a",), {"output_type": "tensor"}, 'output_type must be "pil", "np" or "latent"'),
        ((7,), {}, "prompt"),
    ],
)
def test_an_argument_that_cannot_work_is_one_clear_line(
    pipe: LatteFlowPipeline, arguments: tuple[object, ...], options: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        pipe(*arguments, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_an_unknown_provider_lists_the_known_ones(bundle: Path) -> None:
    with pytest.raises(InputError, match="unknown provider 'tpu'; known are cpu"):
        LatteFlowPipeline.from_pretrained(bundle, provider="tpu")


def test_a_feed_that_does_not_fit_an_engine_is_explained(pipe: LatteFlowPipeline) -> None:
    entry = pipe.manifest.engine("vae_decoder")
    latents = np.zeros((1, *pipe.manifest.geometry.latent_size), np.float32)
    with pytest.raises(EngineError, match="engine vae_decoder takes latents; got images"):
        pipe.engines[entry.name].run({"images": latents})
    with pytest.raises(EngineError, match=r"latents must be float32 \[batch, 4, .*\], got float32 \[1, 6, 8\]"):
        pipe.engines[entry.name].run({"latents": latents})
    with pytest.raises(EngineError, match=r"latents must be float32 .* got float64"):
        pipe.engines[entry.name].run({"latents": latents[None].astype(np.float64)})
    kv = [np.zeros((2, 2, rows, 2, 3, 8), np.float32) for rows in (1, 2)]
    feed = {"latents": np.zeros((1, 4, 6, 8), np.float32), "timestep": np.zeros(1, np.float32)}
    with pytest.raises(EngineError, match=r"prefix_kv must be .* got float32 \[2, 2, 2, 2, 3, 8\] \(with rows=1"):
        pipe.engines["expert_0"].run(feed | {"prefix_kv": kv[1], "prefix_mask": np.ones((1, 3), bool)})


def test_an_engine_that_the_bundle_lacks_is_named(pipe: LatteFlowPipeline) -> None:
    with pytest.raises(BundleError, match="no engine 'expert_9'; it has vision_encoder, vlm, expert_0"):
        pipe.engines["expert_9"]


def test_prompts_are_tokenized_as_transformers_does(pipe: LatteFlowPipeline, model: LatteFlow) -> None:
    for prompt in [*PROMPTS, "", "Unknown words, ÄÖÜ 漢字 🙂", "  spaces  "]:
        assert pipe.chat.prompt_tokens(prompt) == model.tokenize([prompt])[0]


def test_the_prefix_is_the_references(pipe: LatteFlowPipeline, model: LatteFlow) -> None:
    prefix = model.encode_prompts(PROMPTS)
    batch = arrange_rows(pipe.backend, pipe.encode_prompts(PROMPTS), [], [1.0, 1.0], 64)
    mask = prefix.mask.numpy()
    assert np.array_equal(to_host(batch.prefix_mask), mask)
    for kv, reference in zip(batch.prefix_kv, prefix.kv, strict=True):
        kept = mask[None, None, :, None, :, None]
        np.testing.assert_allclose(to_host(kv) * kept, reference.numpy() * kept, atol=1e-5)
        assert torch.isfinite(reference).all()


def test_with_low_memory_one_engine_with_weights_is_there_at_a_time(bundle: Path, pipe: LatteFlowPipeline) -> None:
    expected = pipe("a red star", seed=4, num_inference_steps=5, output_type="np").images
    with LatteFlowPipeline.from_pretrained(bundle, low_memory=True) as small:
        seen = []

        def record(here: LatteFlowPipeline, *_: object) -> None:
            seen.append(sorted(here.engines.loaded))

        drawn = small("a red star", seed=4, num_inference_steps=5, output_type="np", callback_on_step_end=record).images
        again = small("a red star", seed=4, num_inference_steps=5, output_type="np").images
        small.ask(drawn[0], "what is it?", max_new_tokens=2)
        assert len(small.engines.loaded) <= 2
    assert seen == [["expert_0", "solver_step"]] * 2 + [["expert_1", "solver_step"]] * 3
    np.testing.assert_array_equal(drawn, expected)
    np.testing.assert_array_equal(again, expected)
