"""transformers' own answers: the truth that the engines are held to. Text and patches are made by transformers too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from latte.model import LatteFlow


def reference_inputs(
    model: LatteFlow, processor: Qwen2VLImageProcessorPil, images: Sequence[Image.Image], question: str
) -> dict[str, Any]:
    """What `Qwen2VLForConditionalGeneration` takes for one question about some images."""
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
    text = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    vision: dict[str, Any] = {}
    if images:
        vision = dict(processor(list(images), return_tensors="pt"))
        for count in (vision["image_grid_thw"].prod(dim=1) // processor.merge_size**2).tolist():
            text = text.replace("<|image_pad|>", "<placeholder>" * count, 1)
        text = text.replace("<placeholder>", "<|image_pad|>")
    ids = torch.tensor([model.tokenizer(text, add_special_tokens=False)["input_ids"]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == model.vlm.config.image_token_id).int(),
        **vision,
    }


@torch.no_grad()
def reference_logits(
    model: LatteFlow, processor: Qwen2VLImageProcessorPil, images: Sequence[Image.Image], question: str
) -> Tensor:
    """Logits of the first token of the answer, `[1, vocabulary]`."""
    return model.vlm(**reference_inputs(model, processor, images, question)).logits[:, -1]


@torch.no_grad()
def reference_tokens(
    model: LatteFlow, processor: Qwen2VLImageProcessorPil, images: Sequence[Image.Image], question: str, tokens: int
) -> list[int]:
    """Greedy tokens of the answer."""
    inputs = reference_inputs(model, processor, images, question)
    generated = model.vlm.generate(**inputs, do_sample=False, max_new_tokens=tokens)
    return generated[0, inputs["input_ids"].shape[1] :].tolist()
