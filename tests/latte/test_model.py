"""The reference model does what the paper's design says, at its edges too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from latte.checkpoint import share_with_vlm
from latte.model import FlowTransformer, LatteFlow, Prefix, residual_attention_scores
from runtime.errors import EngineError, InputError
from tests.tiny import tiny_model

PROMPTS = ("a red circle", "a small blue square above a large green star on a white background")


def velocity(model: LatteFlow, latents: torch.Tensor, prefix: Prefix, group: int) -> torch.Tensor:
    times = torch.full((len(latents),), 0.4)
    with torch.no_grad():
        return model.flow(latents, times, prefix.kv[group], prefix.mask, group)


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn((2, 4, 6, 8), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("group", [0, 1])
def test_a_prompt_gives_the_same_velocity_alone_and_padded_in_a_batch(
    model: LatteFlow, latents: torch.Tensor, group: int
) -> None:
    together = velocity(model, latents, model.encode_prompts(PROMPTS), group)
    for row, prompt in enumerate(PROMPTS):
        alone = velocity(model, latents[row : row + 1], model.encode_prompts([prompt]), group)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)


def test_the_prompt_matters(model: LatteFlow, latents: torch.Tensor) -> None:
    same = latents[:1].expand(2, -1, -1, -1)
    v = velocity(model, same, model.encode_prompts(PROMPTS), 0)
    assert (v[0] - v[1]).abs().max() > 1e-3


def test_a_group_depends_on_no_other_groups_weights(latents: torch.Tensor) -> None:
    model = tiny_model()
    prefix = model.encode_prompts(PROMPTS)
    before = [velocity(model, latents, prefix, group) for group in range(2)]
    with torch.no_grad():
        for layer in model.config.layers_of(1):
            for parameter in model.flow.layers[layer].parameters():
                parameter.normal_()
        for parameter in model.flow.heads[1].parameters():
            parameter.normal_()
    assert torch.equal(velocity(model, latents, prefix, 0), before[0])
    assert not torch.allclose(velocity(model, latents, prefix, 1), before[1])


def test_an_untrained_gate_is_neutral_and_the_prompts_scores_are_not_handed_on() -> None:
    generator = torch.Generator().manual_seed(0)
    query, prefix, key = (torch.randn((1, 2, size, 8), generator=generator) for size in (6, 4, 3))
    previous = torch.randn((1, 2, 6, 3), generator=generator)
    plain, latent = residual_attention_scores(query, prefix, key, None, None)
    assert torch.equal(plain[..., :3], latent)
    neutral, _ = residual_attention_scores(query, prefix, key, previous, torch.zeros(1, 2, 6, 1))
    assert torch.equal(neutral, plain)
    handed_on, _ = residual_attention_scores(query, prefix, key, previous, torch.ones(1, 2, 6, 1))
    assert torch.equal(handed_on[..., 3:], plain[..., 3:])
    torch.testing.assert_close(handed_on[..., :3], latent + previous)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_as_large_as_a_pretrained_models_stay_finite(dtype: torch.dtype) -> None:
    """Keys of Qwen2 reach some hundreds, so that products of keys and queries are beyond fp16."""
    query, prefix, key = (torch.full((1, 1, 2, 128), size, dtype=dtype) for size in (40.0, 300.0, 300.0))
    scores, _ = residual_attention_scores(query, prefix, key, None, None)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.full_like(scores, 40.0 * 300.0 * 128**0.5), rtol=0.005, atol=0.0)


def test_a_fresh_model_predicts_zero_and_has_zero_gates(model: LatteFlow, latents: torch.Tensor) -> None:
    fresh = FlowTransformer(model.config)
    prefix = model.encode_prompts(PROMPTS)
    gates = [layer.attention_gate for layer in fresh.layers]
    assert [gate is None for gate in gates] == [True, False, True, False]
    assert all((gate.weight == 0).all() for gate in gates if gate is not None)
    v = fresh(latents, torch.tensor([0.1, 0.2]), prefix.kv[0], prefix.mask, 0)
    assert (v == 0).all()


def test_prefix_cached_equals_prefix_encoded_at_every_step(model: LatteFlow, latents: torch.Tensor) -> None:
    cached = model.encode_prompts(PROMPTS)
    x = y = latents
    for t in (0.0, 0.25, 0.5, 0.75):
        group = model.config.schedule.group_of(t)
        x = x + 0.25 * velocity(model, x, cached, group)
        y = y + 0.25 * velocity(model, y, model.encode_prompts(PROMPTS), group)
    assert torch.equal(x, y)


def test_the_prefix_is_what_transformers_computes(model: LatteFlow) -> None:
    encoded = model.tokenizer(["<|im_start|>a red circle"], return_tensors="pt")
    cache = model.vlm.model(**encoded, use_cache=True).past_key_values
    prefix = model.encode_tokens(encoded["input_ids"], encoded["attention_mask"])
    for layer in range(4):
        group, index = divmod(layer, 2)
        torch.testing.assert_close(prefix.kv[group][index, 0], cache.layers[layer].keys)
        torch.testing.assert_close(prefix.kv[group][index, 1], cache.layers[layer].values)


def test_latents_continue_the_prompts_positions(model: LatteFlow) -> None:
    """Latent (r, c) of a prompt of p tokens is rotated as a token at M-RoPE position (p, p + r, p + c)."""
    mask = torch.tensor([[True, True, True, False]])
    row, column = torch.tensor([0.0, 0, 0, 1, 1, 1]), torch.tensor([0.0, 1, 2, 0, 1, 2])
    cos, _ = model.flow._rotary(mask, row, column)
    rotary = model.vlm.model.language_model.rotary_emb
    positions = torch.tensor([[3] * 6, [3, 3, 3, 4, 4, 4], [3, 4, 5, 3, 4, 5]])[:, None]
    expected, _ = rotary(torch.zeros(1), positions)
    torch.testing.assert_close(cos[0, 0], expected[0])


def test_guidance_of_one_is_no_guidance(model: LatteFlow) -> None:
    plain = model.generate(PROMPTS, num_inference_steps=3, guidance_scale=1.0, output_type="latent")
    other = model.generate(
        PROMPTS, negative_prompt="a cross", num_inference_steps=3, guidance_scale=1.0, output_type="latent"
    )
    assert (plain == other).all()


def test_blend_trains_only_what_is_specific_to_generation() -> None:
    model = tiny_model("blend")
    share_with_vlm(model.flow, model.vlm)
    trained = {name for name, p in model.flow.named_parameters() if p.requires_grad}
    assert not any("proj" in name and name.startswith("layers") for name in trained)
    assert {"latent_embed.weight", "heads.1.proj.weight", "layers.0.scale_shift_table"} <= trained
    shared = model.vlm.model.language_model.layers[2].self_attn.q_proj.weight
    assert model.flow.layers[2].q_proj.weight is shared


def test_guidance_outside_its_interval_is_none_and_throughout_is_guidance(model: LatteFlow) -> None:
    def latents(**options: Any) -> np.ndarray:
        return model.generate(PROMPTS, num_inference_steps=6, seed=3, output_type="latent", **options)

    guided = latents(guidance_scale=4.0)
    plain = latents(guidance_scale=1.0)
    np.testing.assert_allclose(latents(guidance_scale=4.0, guidance_interval=(0.99, 1.0)), plain, atol=1e-5)
    np.testing.assert_array_equal(latents(guidance_scale=4.0, guidance_interval=(0.0, 1.0)), guided)
    partly = latents(guidance_scale=4.0, guidance_interval=(0.0, 0.5))
    assert np.abs(partly - guided).max() > 1e-3
    assert np.abs(partly - plain).max() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": [1]}, "seed must be one number or one for each of 2 images, got 1"),
        ({"guidance_scale": [1.0, 2.0, 3.0]}, "guidance_scale must be one value .* got 3"),
        ({"guidance_scale": 1e38}, "guidance_scale must be from -100 to 100"),
        ({"seed": 1.0}, "seed must be a whole number, got 1.0"),
        ({"shift": "2"}, "shift must be a number, got '2'"),
        ({"guidance_interval": 0.5}, "guidance_interval must be a pair of flow times"),
        ({"negative_prompt": ["a"]}, "negative_prompt must be one value .* got 1"),
        ({"output_type": "pil"}, 'output_type must be "np" or "latent"'),
        ({"seed": 2**63 - 1}, "a seed must be from 0 to"),
    ],
)
def test_an_argument_that_cannot_work_is_refused(model: LatteFlow, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        model.generate(PROMPTS, num_inference_steps=1, **options)


def test_a_model_that_was_never_trained_says_so() -> None:
    model = tiny_model()
    for head in model.flow.heads:
        torch.nn.init.zeros_(head.get_parameter("proj.weight"))
        torch.nn.init.zeros_(head.get_parameter("proj.bias"))
    with pytest.raises(EngineError, match="the checkpoint is untrained"):
        model.generate("a", num_inference_steps=1)
