"""Asking the reference VLM about pictures, through transformers' own `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil


@torch.no_grad()
def answer(
    vlm: Qwen2VLForConditionalGeneration,
    tokenizer: Any,
    image_processor: Qwen2VLImageProcessorPil,
    images: Sequence[np.ndarray],
    questions: Sequence[str],
    max_new_tokens: int = 40,
) -> list[str]:
    """Greedy answers to one question about each image (`[H, W, 3]` uint8)."""
    pixels = image_processor(list(images), return_tensors="pt")
    image_token = "<|image_pad|>"
    texts = []
    for question, grid in zip(questions, pixels["image_grid_thw"].tolist(), strict=True):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        tokens = grid[0] * grid[1] * grid[2] // image_processor.merge_size**2
        texts.append(text.replace(image_token, image_token * tokens))
    encoded = tokenizer(texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
    generated = vlm.generate(
        input_ids=encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        mm_token_type_ids=(encoded["input_ids"] == vlm.config.image_token_id).int(),
        pixel_values=pixels["pixel_values"],
        image_grid_thw=pixels["image_grid_thw"],
        do_sample=False,
        max_new_tokens=max_new_tokens,
    )
    return tokenizer.batch_decode(generated[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
