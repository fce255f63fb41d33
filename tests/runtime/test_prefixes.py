"""Prompts that come again are not encoded again, in bounded memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from runtime.pipeline import LatteFlowPipeline
from runtime.prefixes import PrefixCache, PromptEncoder
from runtime.rows import PrefixRow

TEXTS = ["a red star", "a ring", "a new one"]


def row(tokens: int) -> PrefixRow:
    return PrefixRow((np.zeros((1, 2, 1, tokens, 4), np.float32),))  # 32 bytes a token


def test_what_was_used_longest_ago_is_dropped_first() -> None:
    cache = PrefixCache(32 * 10)
    a, b, c, d = (1,), (2,), (3,), (4,)
    cache.add(a, row(4))
    cache.add(b, row(4))
    assert cache.get(a) is not None
    cache.add(c, row(2))
    assert (len(cache), cache.nbytes) == (3, 320)
    cache.add(d, row(1))
    assert cache.get(b) is None
    assert all(cache.get(prompt) is not None for prompt in (a, c, d))
    cache.add(d, row(3))
    assert (len(cache), cache.nbytes) == (3, 32 * 9)


def test_a_prompt_that_does_not_fit_is_not_kept() -> None:
    cache = PrefixCache(100)
    cache.add((1, 2), row(4))
    assert (len(cache), cache.nbytes) == (0, 0)


@pytest.mark.parametrize("limit", [0, 2**20])
def test_a_cached_prompt_draws_the_same_image(bundle: Path, pipe: LatteFlowPipeline, limit: int) -> None:
    expected = pipe(TEXTS[:2], seed=3, num_inference_steps=4, output_type="latent").images
    runs = []
    with LatteFlowPipeline.from_pretrained(bundle, prefix_cache_bytes=limit) as own:
        session = own.engines["vlm"]
        original = session.run
        session.run = lambda feed: (runs.append(feed["input_ids"].shape), original(feed))[1]  # type: ignore[method-assign]
        for _ in range(2):
            drawn = own(TEXTS[:2], seed=3, num_inference_steps=4, output_type="latent").images
            np.testing.assert_allclose(drawn, expected, rtol=1e-5, atol=1e-5)
        own(["a ring", "a ring", TEXTS[2]], seed=3, num_inference_steps=1)
    head, *calls = runs
    assert head[0] == 1
    assert head[1] + max(tokens for _, tokens in calls) == max(len(own.chat.prompt_tokens(text)) for text in TEXTS)
    assert [rows for rows, _ in calls] == ([2, 1, 1] if limit else [2, 1, 2, 1, 2, 1])  # prompts, and the empty one


def test_a_prompt_that_changes_the_tokens_before_it_is_encoded_whole(pipe: LatteFlowPipeline) -> None:
    prompts = ["\n\na red star", "a red star"]
    together = pipe.prompts(prompts)
    with LatteFlowPipeline.from_pretrained(pipe.bundle, prefix_cache_bytes=0) as own:
        own.prompts = PromptEncoder(own.chat, own._language, 0, shares_head=False)
        for ours, whole in zip(together, own.prompts(prompts), strict=True):
            for kv, expected in zip(ours.kv, whole.kv, strict=True):
                np.testing.assert_allclose(kv, expected, rtol=1e-5, atol=1e-5)
