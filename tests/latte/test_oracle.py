"""The velocity of one expert group, the time grid and the noise in NumPy, from the formulas alone.

Nothing here is shared with `latte` or `runtime`: what they share with each other is checked against this once.
"""

from __future__ import annotations

import numpy as np
import torch

from latte.model import LatteFlow
from runtime.flow_time import initial_latents, time_grid
from tests.tiny import tiny_model

PROMPTS = ["a small red circle", "a large blue square on white"]
Array = np.ndarray
NOISE_OF_SEED_7 = (-0.5023735761642456, 0.5068453550338745, 2.019348621368408)


def rms(x: Array, weight: Array, eps: float) -> Array:
    return weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def softmax(x: Array) -> Array:
    exponentials = np.exp(x - x.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def expert_velocity(
    weights: dict[str, Array], config: object, latents: Array, t: Array, prefix_kv: Array, mask: Array, group: int
) -> Array:
    """One row at a time, one head at a time, without padding."""
    c = config
    rows, channels, height, width = latents.shape
    eps, head_dim, heads, kv_heads = c.rms_norm_eps, c.head_dim, c.num_attention_heads, c.num_key_value_heads

    def linear(name: str, x: Array) -> Array:
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    velocity = np.empty_like(latents)
    for row in range(rows):
        length = int(mask[row].sum())
        tokens = latents[row].reshape(channels, -1).T  # [N, C]
        place = np.array([(r, k) for r in range(height) for k in range(width)], float)  # [N, 2]
        frequencies = np.exp(-np.log(100.0) * np.arange(c.hidden_size // 4) / (c.hidden_size // 4))
        angles = [place[:, axis, None] * frequencies for axis in (0, 1)]
        position = np.concatenate([part for a in angles for part in (np.sin(a), np.cos(a))], -1)
        h = linear("latent_embed", tokens) + position
        half = 128
        phases = 1000 * t[row] * np.exp(-np.log(10_000.0) * np.arange(half) / half)
        time = linear("time_embed.in_proj", np.concatenate([np.cos(phases), np.sin(phases)])[None])
        time = silu(linear("time_embed.out_proj", silu(time)))  # [1, hidden]
        shared = linear("time_modulation", time).reshape(4, -1)
        axes = np.repeat([0, 1, 2], c.mrope_section)
        inverse = c.rope_theta ** -(np.arange(0, head_dim, 2) / head_dim)
        where = length + np.stack([0 * place[:, 0], place[:, 0], place[:, 1]], -1)  # [N, 3]
        theta = where[:, axes] * inverse  # [N, D/2]

        def rotated(x: Array, theta: Array = theta) -> Array:
            left, right = x[:, : head_dim // 2], x[:, head_dim // 2 :]
            cos, sin = np.cos(theta), np.sin(theta)
            return np.concatenate([left * cos - right * sin, right * cos + left * sin], -1)

        maps: list[Array | None] = [None] * heads
        for index, layer in enumerate(c.layers_of(group)):
            name = f"layers.{layer}"
            scale_a, shift, scale, scale_f = shared + weights[f"{name}.scale_shift_table"]
            x = rms(h, weights[f"{name}.input_layernorm.weight"], eps)
            q, k, v = (linear(f"{name}.{part}_proj", x) for part in "qkv")
            outputs = []
            for head in range(heads):
                kv = head // (heads // kv_heads)
                of_head = slice(head * head_dim, (head + 1) * head_dim)
                of_kv = slice(kv * head_dim, (kv + 1) * head_dim)
                query, key = rotated(q[:, of_head]), rotated(k[:, of_kv])
                keys, values = prefix_kv[index, :, row, kv, :length]
                image = query @ key.T / np.sqrt(head_dim)
                before = maps[head]
                if before is not None:
                    gate = np.tanh(linear(f"{name}.attention_gate", time))[0, head]
                    image = image + gate * before
                maps[head] = image
                attention = softmax(np.concatenate([query @ keys.T / np.sqrt(head_dim), image], -1))
                outputs.append(attention @ np.concatenate([values, v[:, of_kv]]))
            attended = linear(f"{name}.o_proj", np.concatenate(outputs, -1))
            h = h + (1 + scale_a) * rms(attended, weights[f"{name}.attention_norm.weight"], eps)
            x = rms(h, weights[f"{name}.post_attention_layernorm.weight"], eps) * (1 + scale) + shift
            fed = linear(f"{name}.down_proj", silu(linear(f"{name}.gate_proj", x)) * linear(f"{name}.up_proj", x))
            h = h + (1 + scale_f) * rms(fed, weights[f"{name}.feed_forward_norm.weight"], eps)
        shift, scale = np.split(linear(f"heads.{group}.modulation", time), 2, axis=-1)
        x = rms(h, weights[f"heads.{group}.norm.weight"], eps) * (1 + scale) + shift
        velocity[row] = linear(f"heads.{group}.proj", x).T.reshape(channels, height, width)
    return velocity


def random_model() -> LatteFlow:
    model = tiny_model()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.flow.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def test_an_expert_computes_what_the_formulas_say() -> None:
    model = random_model()
    weights = {name: value.detach().double().numpy() for name, value in model.flow.named_parameters()}
    prefix = model.encode_prompts(PROMPTS)
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((2, model.config.latent_channels, 3, 5))
    for group, t in ((0, np.array([0.0, 0.3])), (1, np.array([0.6, 1.0]))):
        expected = expert_velocity(
            weights, model.config, latents, t, prefix.kv[group].double().numpy(), prefix.mask.numpy(), group
        )
        with torch.no_grad():
            got = model.flow(
                torch.from_numpy(latents).float(), torch.from_numpy(t).float(), prefix.kv[group], prefix.mask, group
            )
        error = np.linalg.norm(got.numpy() - expected) / np.linalg.norm(expected)
        assert error < 1e-4, (group, error)  # what fp32 rounding makes of time 1000 t and of four products


def test_the_time_grid_is_the_formula() -> None:
    for steps, shift in ((1, 1.0), (7, 1.0), (4, 2.0), (5, 0.5)):
        uniform = [k / steps for k in range(steps + 1)]
        # A shift s takes noise of level 1 - t to s (1 - t) / (1 + (s - 1)(1 - t)).
        expected = [1 - shift * (1 - t) / (1 + (shift - 1) * (1 - t)) for t in uniform]
        np.testing.assert_allclose(time_grid(steps, shift), expected, atol=1e-12)


def test_the_noise_of_an_image_is_that_of_its_seed() -> None:
    """The values are those of `numpy.random.Generator(Philox(seed))`, which NumPy keeps over its versions."""
    noise = initial_latents([7, 8], (4, 16, 16))
    assert noise.dtype == np.float32
    np.testing.assert_allclose(noise[0].ravel()[:3], NOISE_OF_SEED_7, rtol=1e-6)
    np.testing.assert_array_equal(initial_latents([8], (4, 16, 16))[0], noise[1])
    assert abs(noise.mean()) < 0.1
    assert abs(noise.std() - 1) < 0.1
