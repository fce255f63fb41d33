"""Not only `shapes`: any Qwen2-VL goes through `init` and `export`, and answers as transformers answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from export import vlm_components
from export.benchmarks.random_models import _random_weights
from export.engines import bind
from export.graph_store import GraphStore, default_store
from export.graphs import make_graphs, quiet_exporter
from export.parity import relative_error
from export.vlm_components import (
    VisionAttention,
    language_component,
    vision_component,
    wide_softmax_attention,
)
from latte.checkpoint import assemble, load_checkpoint, load_image_processor
from latte.model import LatteFlow
from latte.shapes.vlm import SPECIAL_TOKENS, train_tokenizer
from runtime.answers import AnswerSettings
from runtime.chat import user_message
from runtime.pipeline import LatteFlowPipeline
from tests.reference import reference_logits, reference_tokens
from tests.tiny import scale_weight, tiny_autoencoder


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> tuple[LatteFlow, LatteFlowPipeline]:
    """A Qwen2-VL unlike `shapes`: 14-pixel patches, an output layer of its own, two ends of an answer."""
    from runtime.cli import load_command

    folder = tmp_path_factory.mktemp("foreign")
    tokenizer = train_tokenizer()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    torch.manual_seed(3)
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]},
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
        },
        vision_config={"depth": 3, "embed_dim": 32, "hidden_size": 48, "num_heads": 4, "mlp_ratio": 2},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    vlm = Qwen2VLForConditionalGeneration._from_config(config)
    with torch.no_grad():
        for parameter in vlm.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    vlm.generation_config.eos_token_id = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    vlm.save_pretrained(folder / "vlm")
    tokenizer.save_pretrained(folder / "vlm")
    Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 40}).save_pretrained(
        folder / "vlm"
    )
    tiny_autoencoder().save_pretrained(folder / "vae")
    command = "--vlm {0}/vlm --vae {0}/vae --groups 2 --height 32 --width 32 --precision fp32"
    load_command("init").main([str(folder / "checkpoint"), *command.format(folder).split()], standalone_mode=False)
    # Its flow layers are untrained and predict nothing, which verification rightly refuses as a reference.
    arguments = [str(folder / "checkpoint"), str(folder / "bundle"), "--no-verify"]
    load_command("export").main(arguments, standalone_mode=False)
    return load_checkpoint(folder / "checkpoint"), LatteFlowPipeline.from_pretrained(folder / "bundle")


def random_image(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


CONVERSATIONS = {
    "text": [],
    "a small image": [random_image(0, 30, 20)],
    "a wide image": [random_image(1, 224, 56)],
    "an image that is made smaller": [random_image(2, 400, 300)],
    "two images": [random_image(3, 90, 140), random_image(4, 56, 28)],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_it_answers_as_transformers_does(name: str, foreign: tuple[LatteFlow, LatteFlowPipeline]) -> None:
    model, pipe = foreign
    images, question = CONVERSATIONS[name], "what colour is the background?"
    processor = load_image_processor(pipe.bundle)
    answerer = pipe.answerer
    inputs = pipe.chat.encode_conversations([[user_message(images, question)]])
    embeds = None if inputs.images is None else answerer.encode_images(inputs.images)
    output = answerer.language.forward(inputs.input_ids, inputs.attention_mask, inputs.position_ids, embeds)
    expected = reference_logits(model, processor, images, question)
    assert relative_error(output.logits.numpy(), expected.numpy()) < 1e-4
    tokens = [int(token[0]) for token in answerer.tokens(inputs, AnswerSettings(max_new_tokens=32))]
    reference = reference_tokens(model, processor, images, question, 32)
    assert tokens[: len(reference)] == reference
    assert len(reference) == 32 or reference[-1] in pipe.manifest.understanding.eos_token_ids


def test_the_manifest_knows_both_ends(foreign: tuple[LatteFlow, LatteFlowPipeline]) -> None:
    model, pipe = foreign
    names = ("<|endoftext|>", "<|im_end|>")
    expected = sorted(model.tokenizer.convert_tokens_to_ids(name) for name in names)
    assert list(pipe.manifest.understanding.eos_token_ids) == expected
    assert pipe.manifest.understanding.patch_size == 14


def test_names_and_shapes_fit_qwen2_vl_2b() -> None:
    """At the published size, without its weights: the graphs need exactly the weights that the checkpoint has."""
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": 151_936,
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32_768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision_config={"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "mlp_ratio": 4},
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        vlm = Qwen2VLForConditionalGeneration._from_config(config)
        model = assemble(vlm, tiny_autoencoder(), None, num_groups=4, latent_size=(8, 8))
    components = [
        language_component(model.config, "fp16", config),
        vision_component("fp16", config.vision_config, most_patches=4 * 1280),
    ]
    graphs = make_graphs(components, 18, GraphStore(None))
    sources = {"language_model.": vlm.model.language_model, "tower.": vlm.model.visual}
    for graph, (prefix, source) in zip(graphs, sources.items(), strict=True):
        found = {
            name.removeprefix(prefix): tuple(value.shape)
            for name, value in graph.graph.initializers.items()
            if value.const_value is None
        }
        buffers = {name for name, _ in source.named_buffers()}
        wanted = {name: tuple(p.shape) for name, p in source.named_parameters()}
        assert {name: shape for name, shape in found.items() if name not in buffers} == wanted
    language, vision = components
    shapes = {spec.name: spec.shape for spec in (*language.inputs, *language.outputs, *vision.inputs, *vision.outputs)}
    assert shapes["past_kv_3"] == (7, 2, "batch", 2, "past", 128)
    assert shapes["logits"] == ("batch", 151_936)
    assert shapes["pixel_values"] == ("image_tokens", 4, 1176)
    assert shapes["image_embeds"] == ("image_tokens", 1536)
    assert sum(p.numel() for p in vlm.parameters()) == pytest.approx(2.21e9, rel=0.01)


Run = Callable[..., tuple[int, str, str]]


def test_a_wrong_weight_of_the_tower_is_found(bundle_copy: Path, checkpoint: Path, run_command: Run) -> None:
    scale_weight(bundle_copy, "vision_encoder", "merger.mlp.2", 1.02)
    code, _, error = run_command("verify", bundle_copy, checkpoint)
    assert code == 1
    assert "first at rung weights: 20 weights of vision_encoder: differences: tower.merger.mlp.2.weight" in error


def large_queries_and_keys(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Queries and keys as large as a pretrained Qwen2-VL's: `[2, 5, 128]`, with products of 67,614."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn((2, 5, 128), generator=generator) for _ in range(3))
    scale = (67_614 / torch.matmul(query, key.transpose(-1, -2)).abs().max()) ** 0.5
    query, key = scale * query, scale * key
    return query.to(dtype), key.to(dtype), value.to(dtype)


def exact_attention(scaled_query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> np.ndarray:
    """Attention in float64 of queries that are scaled already."""
    query, key, value = (tensor.double() for tensor in (scaled_query, key, value))
    attended = torch.matmul(torch.matmul(query, key.transpose(-1, -2)).softmax(-1), value)
    return np.asarray(attended.numpy())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_with_products_beyond_fp16_is_right(dtype: torch.dtype) -> None:
    """Scores in half precision would be infinite, or off by up to 16. ONNX Runtime's CPU has no bf16: this is torch."""
    query, key, value = large_queries_and_keys(dtype)
    scaled = query * 128**-0.5
    expected = exact_attention(scaled, key, value)
    of_text, _ = wide_softmax_attention(
        torch.nn.Identity(), query[None], key[None], value[None], torch.zeros(1, 1, 5, 5), scaling=128**-0.5
    )
    image_of = torch.zeros(5, dtype=torch.int64)
    of_vision = VisionAttention()(scaled, image_of, key, value, image_of)
    for attended in (of_text[0].transpose(0, 1), of_vision):
        assert np.abs(attended.double().numpy() - expected).max() < 4 * torch.finfo(dtype).eps


class AttentionOfText(torch.nn.Module):
    """`wide_softmax_attention` as a graph."""

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(1, 1, 5, 5)
        attended, _ = wide_softmax_attention(self, query[None], key[None], value[None], mask, scaling=128**-0.5)
        return attended[0].transpose(0, 1)


def test_graphs_with_products_beyond_fp16_are_right(tmp_path: Path) -> None:
    import onnxruntime

    query, key, value = large_queries_and_keys(torch.float16)
    scaled = query * 128**-0.5
    image_of = torch.zeros(5, dtype=torch.int64)
    graphs: dict[str, tuple[torch.nn.Module, tuple[torch.Tensor, ...]]] = {
        "text": (AttentionOfText(), (query, key, value)),
        "vision": (VisionAttention(), (scaled, image_of, key, value, image_of)),
    }
    for name, (module, inputs) in graphs.items():
        path = tmp_path / f"{name}.onnx"
        with quiet_exporter():
            torch.onnx.export(module.eval(), inputs, path, dynamo=True, verbose=False, opset_version=18)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        feed = {spec.name: tensor.numpy() for spec, tensor in zip(session.get_inputs(), inputs, strict=True)}
        (attended,) = session.run(None, feed)
        assert np.abs(attended - exact_attention(scaled, key, value)).max() < 4e-3


def test_the_vision_tower_is_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven chunks of few patches: some are of different size, and for the smallest image some are empty."""
    import onnxruntime

    config = Qwen2VLConfig(
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 48, "num_heads": 2, "mlp_ratio": 2}
    ).vision_config
    outputs: dict[int, list[np.ndarray]] = {}
    for chunks in (1, 7):
        monkeypatch.setattr(vlm_components, "MOST_SCORES_BYTES", 4 * 2 * 100**2 // chunks + 1)
        component = vision_component("fp32", config, most_patches=100)
        (graph,) = make_graphs([component], 18, default_store())
        assert sum(node.op_type == "Softmax" for node in graph.graph) == 2 * chunks
        bound = bind(graph, _random_weights(graph, component))
        session = onnxruntime.InferenceSession(ir.to_proto(bound).SerializeToString())
        for tokens in (1, 6, 11):
            generator = np.random.default_rng(tokens)
            feed = {
                "pixel_values": generator.standard_normal((tokens, 4, 1176)).astype(np.float32),
                "position_ids": generator.integers(0, 9, (tokens, 4, 2)),
                "image_ids": np.arange(tokens, dtype=np.int64) // 4,
            }
            outputs.setdefault(tokens, []).append(session.run(None, feed)[0])
    for whole, in_chunks in outputs.values():
        assert np.abs(whole - in_chunks).max() < 1e-5 * np.abs(whole).max()
