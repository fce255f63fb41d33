"""The TensorRT backend on doubles of CUDA and TensorRT (tests/doubles): memory, order, graphs, devices and threads.

The doubles raise where a real GPU would compute wrong numbers. That the numbers are right on one is for test_gpu.py.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from runtime.backends import open_backend
from runtime.backends.tensorrt import TrtBackend
from runtime.errors import BundleError, EngineError, InputError
from runtime.manifest import load_manifest, save_manifest
from runtime.pipeline import LatteFlowPipeline
from tests.doubles import GpuDouble, install
from tests.doubles.cuda import BrokenRule, CudaDouble
from tests.plan_files import add_plans
from tests.tiny import scale_weight

NOTHING = {"blocks": 0, "streams": 0, "graphs": 0, "events": 0}


def backend_of(pipeline: LatteFlowPipeline) -> TrtBackend:
    assert isinstance(pipeline.backend, TrtBackend)
    return pipeline.backend


def image_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (64, 64 + 16 * (seed % 3), 3), np.uint8)


def draw(pipeline: LatteFlowPipeline, *prompts: str) -> np.ndarray:
    drawn = pipeline(prompts or ["a red star"], seed=3, num_inference_steps=4, output_type="np")
    images: np.ndarray = drawn.images
    return images


def images_differ_by(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


@pytest.fixture
def native(plan_bundle: Path) -> Iterator[LatteFlowPipeline]:
    with LatteFlowPipeline.from_pretrained(plan_bundle, "tensorrt") as pipeline:
        yield pipeline


# ---- what comes out ----------------------------------------------------------------------------------


def test_drawing_again_launches_graphs_and_changes_nothing(
    native: LatteFlowPipeline, pipe: LatteFlowPipeline, gpu: GpuDouble
) -> None:
    expected = draw(pipe)
    for _ in range(3):
        assert images_differ_by(draw(native), expected) <= 1
    gpu.trt.enqueued.clear()
    before = backend_of(native).graph_launches
    assert images_differ_by(draw(native), expected) <= 1
    assert gpu.trt.enqueued == []
    assert backend_of(native).graph_launches == gpu.cuda.launches >= before + 8


def test_graphs_of_tensorrt_for_rtx_have_the_kernels_of_their_shapes(
    native: LatteFlowPipeline, gpu: GpuDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It compiles them in the background while slower ones run, which a graph captured then would keep."""
    strategy = SimpleNamespace(EAGER="EAGER")
    monkeypatch.setattr(gpu.trt, "DynamicShapesKernelSpecializationStrategy", strategy, raising=False)
    for _ in range(3):
        draw(native)
    captured = [context.how for context in gpu.trt.contexts if context.captures]
    assert {how.dynamic_shapes_kernel_specialization_strategy for how in captured} == {"EAGER"}  # type: ignore[union-attr]


def test_without_graphs_nothing_is_captured(plan_bundle: Path, pipe: LatteFlowPipeline, gpu: GpuDouble) -> None:
    with LatteFlowPipeline.from_pretrained(plan_bundle, "tensorrt", {"cuda_graphs": "0"}) as native:
        for _ in range(3):
            assert images_differ_by(draw(native), draw(pipe)) <= 1
    assert gpu.cuda.graphs == []


def test_what_cannot_be_captured_runs_without_a_graph(
    native: LatteFlowPipeline, pipe: LatteFlowPipeline, gpu: GpuDouble
) -> None:
    gpu.trt.capturable = False
    for _ in range(4):
        assert images_differ_by(draw(native), draw(pipe)) <= 1
    assert gpu.cuda.launches == 0


def test_outputs_stay_what_they_were(native: LatteFlowPipeline, pipe: LatteFlowPipeline) -> None:
    """With two sets of output buffers, the third image's embeddings overwrote the first one's."""
    inputs = [
        pipe.chat.encode_conversations([[{"role": "user", "content": [{"type": "image", "image": image_of(i)}]}]])
        for i in range(4)
    ]
    there = [native.answerer.encode_images(one.images) for one in inputs if one.images is not None]
    here = [pipe.answerer.encode_images(one.images) for one in inputs if one.images is not None]
    assert len(there) == 4
    for ours, expected in zip(there, here, strict=True):
        np.testing.assert_allclose(ours.numpy(), expected.numpy(), rtol=1e-5, atol=1e-5)  # type: ignore[union-attr]


def test_an_answer_goes_on_while_prompts_are_encoded(native: LatteFlowPipeline, pipe: LatteFlowPipeline) -> None:
    expected = pipe.ask(image_of(1), "what is it?", max_new_tokens=12)
    pieces = []
    for piece in native.ask_stream(image_of(1), "what is it?", max_new_tokens=12):
        pieces.append(piece)
        native.encode_prompts([f"a {len(pieces)}", f"b {len(pieces)}"])
        native.encode_prompts([f"c {len(pieces)}"])
    assert "".join(pieces) == expected


def test_several_threads_draw_and_answer(native: LatteFlowPipeline, pipe: LatteFlowPipeline) -> None:
    """Runs come one after another, each with the memory that it was given."""
    prompts = ["a red star", "a ring", "a large blue circle"]
    expected = [draw(pipe, prompt) for prompt in prompts]
    answer = pipe.ask(image_of(0), "what?", max_new_tokens=6)
    with ThreadPoolExecutor(4) as pool:
        drawn = [pool.submit(draw, native, prompt) for prompt in prompts]
        asked = pool.submit(native.ask, image_of(0), "what?", max_new_tokens=6)
        for image, future in zip(expected, drawn, strict=True):
            assert images_differ_by(future.result(60), image) <= 1
        assert asked.result(60) == answer


def test_an_answers_tokens_are_graphs(native: LatteFlowPipeline, pipe: LatteFlowPipeline, gpu: GpuDouble) -> None:
    """Each token had a longer past than the one before, in other memory: no graph was ever launched."""
    expected = pipe.ask(image_of(0), "what?", max_new_tokens=20)
    gpu.trt.enqueued.clear()
    assert native.ask(image_of(0), "what?", max_new_tokens=20) == expected
    written = gpu.cuda.launches
    assert gpu.trt.enqueued.count("vlm") == 3  # the question, then two tokens before the graph
    assert written == 17
    gpu.cuda.copies.clear()
    assert native.ask(image_of(0), "what?", max_new_tokens=20) == expected
    assert gpu.cuda.launches >= written + 19
    # Of the keys and values that a run puts out, one token stays; nothing of them goes to the host.
    groups = native.manifest.schedule.num_groups
    moved = [size for kind, size in gpu.cuda.copies if kind == "2D"]
    assert len(moved) == 20 * groups
    assert moved[0] > moved[-1]
    # Nor do logits, which may be of 150,000 tokens: only the token that the engine chose.
    assert {size for kind, size in gpu.cuda.copies if kind == "DeviceToHost"} == {8}
    gpu.cuda.copies.clear()
    native.ask(image_of(0), "what?", max_new_tokens=3, temperature=1.0)
    vocabulary = int(native.manifest.engine("vlm").outputs[0].shape[-1])
    assert {size for kind, size in gpu.cuda.copies if kind == "DeviceToHost"} == {4 * vocabulary}


def test_answers_go_beyond_the_capacity_that_they_began_with(
    native: LatteFlowPipeline, pipe: LatteFlowPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.backends.cuda_key_values.BUCKET", 8)
    settings = {"max_new_tokens": 30, "temperature": 1.0, "seed": 2}
    assert native.ask(image_of(1), "what is it?", **settings) == pipe.ask(image_of(1), "what is it?", **settings)  # type: ignore[arg-type]


def test_keys_and_values_fill_the_context_to_the_last_token(gpu: GpuDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.backends.cuda_key_values.BUCKET", 4)
    rng = np.random.default_rng(0)
    backend = open_backend("tensorrt")
    everything = rng.standard_normal((2, 2, 3, 2, 10, 4), np.float32)  # [M, 2, B, Hkv, T, D]
    mask = np.ones((3, 10), bool)
    mask[1, 1] = False
    kv = backend.key_values((everything[:, :, :, :, :2],), mask[:, :2], limit=9)
    for tokens in range(2, 10):
        (past,) = kv.past
        assert past.shape[4] == min(9, 4 * -(-tokens // 4))
        np.testing.assert_array_equal(kv.mask[:, :tokens], mask[:, :tokens])
        assert kv.mask[:, -1].all()
        assert not kv.mask[:, tokens:-1].any()
        feed = np.concatenate([past.numpy(), everything[:, :, :, :, tokens : tokens + 1]], axis=4)  # type: ignore[union-attr]
        np.testing.assert_array_equal(feed[:, :, :, :, :tokens], everything[:, :, :, :, :tokens])
        assert not feed[:, :, :, :, tokens:-1].any()
        kv.add((backend.upload(feed),))
    (group,), used = kv.to_host()
    np.testing.assert_array_equal(group, everything)
    np.testing.assert_array_equal(used, mask)
    backend.close()


def test_a_prompt_of_another_length_launches_the_graphs_of_the_first(
    native: LatteFlowPipeline, pipe: LatteFlowPipeline, gpu: GpuDouble
) -> None:
    for _ in range(4):
        draw(native, "a red star")
    gpu.trt.enqueued.clear()
    longer = "a small red star"
    assert len(native.chat.prompt_tokens(longer)) != len(native.chat.prompt_tokens("a red star"))
    assert images_differ_by(draw(native, longer), draw(pipe, longer)) <= 1
    assert set(gpu.trt.enqueued) <= {"vlm"}


def test_the_time_grid_is_uploaded_once(native: LatteFlowPipeline, gpu: GpuDouble) -> None:
    def uploads(steps: int) -> int:
        gpu.cuda.copies.clear()
        native("a red star", seed=3, num_inference_steps=steps, output_type="np")
        return sum(kind == "HostToDevice" for kind, _ in gpu.cuda.copies)

    uploads(3)
    assert uploads(3) == uploads(9)


# ---- devices, threads, memory ------------------------------------------------------------------------


def test_another_gpu_is_used_from_every_thread(plan_bundle: Path, pipe: LatteFlowPipeline, gpu: GpuDouble) -> None:
    """A thread's device is the first one until it is set: engines were loaded in one thread, and run in others."""
    with LatteFlowPipeline.from_pretrained(plan_bundle, "tensorrt", {"device_id": "1"}) as native:
        drawn = [draw(native)]
        thread = threading.Thread(target=lambda: drawn.append(draw(native)))
        thread.start()
        thread.join()
        assert len(drawn) == 2
        assert {block.device for block in gpu.cuda.blocks.values()} == {1}
    assert all(images_differ_by(image, draw(pipe)) <= 1 for image in drawn)


def test_two_gpus_are_used_by_turns_in_one_thread(plan_bundle: Path, gpu: GpuDouble) -> None:
    first, second = (
        LatteFlowPipeline.from_pretrained(plan_bundle, "tensorrt", {"device_id": str(number)}) for number in (0, 1)
    )
    with first, second:
        for _ in range(3):
            np.testing.assert_array_equal(draw(first), draw(second))


def test_closing_frees_everything_that_was_taken(plan_bundle: Path, gpu: GpuDouble) -> None:
    with LatteFlowPipeline.from_pretrained(plan_bundle, "tensorrt") as native:
        for _ in range(3):
            draw(native)
        native.ask(image_of(0), "what?", max_new_tokens=3)
        kept = native.backend.upload(np.ones(3, np.float32))
    assert gpu.cuda.alive() == NOTHING
    with pytest.raises(EngineError, match="the GPU's engines were closed"):
        kept.numpy()


def test_memory_that_is_kept_for_reuse_is_returned_when_the_gpu_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = install(monkeypatch, CudaDouble(memory=10_000))
    backend = open_backend("tensorrt")
    for size in (6_000, 7_000, 2_000, 5_000):  # together more than there is
        backend.upload(np.zeros(size, np.uint8))
    held = backend.upload(np.zeros(6_000, np.uint8))
    with pytest.raises(EngineError, match="cudaMalloc failed with cudaErrorMemoryAllocation"):
        backend.upload(np.zeros(6_000, np.uint8))
    np.testing.assert_array_equal(held.numpy(), np.zeros(6_000, np.uint8))
    del held
    backend.upload(np.zeros(9_000, np.uint8))
    backend.close()
    assert gpu.cuda.alive() == NOTHING


def test_memory_does_not_grow_from_call_to_call(native: LatteFlowPipeline, gpu: GpuDouble) -> None:
    for _ in range(4):
        draw(native)
        native.ask(image_of(0), "what?", max_new_tokens=8)
    before = gpu.cuda.alive()
    for _ in range(3):
        draw(native)
        native.ask(image_of(0), "what?", max_new_tokens=8)
    assert gpu.cuda.alive() == before


def test_one_engine_at_a_time_fits_too(plan_bundle: Path, pipe: LatteFlowPipeline, gpu: GpuDouble) -> None:
    with LatteFlowPipeline.from_pretrained(plan_bundle, "tensorrt", low_memory=True) as native:
        for _ in range(2):
            assert images_differ_by(draw(native), draw(pipe)) <= 1
    assert gpu.cuda.alive() == NOTHING


# ---- plans -------------------------------------------------------------------------------------------


def test_only_the_plan_is_read_and_checked(plan_bundle: Path, native: LatteFlowPipeline) -> None:
    """Weights and graph were hashed for nothing: gigabytes before the first image."""
    weights = plan_bundle / "expert_0" / "weights.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))
    draw(native)
    (plan_bundle / "vision_encoder" / "model.plan").write_text("altered")
    with pytest.raises(BundleError, match=r"vision_encoder/model.plan was altered"):
        native.ask(image_of(0), "what?")


def test_a_size_that_no_profile_covers_says_what_to_build(native: LatteFlowPipeline) -> None:
    with pytest.raises(InputError, match=r"no optimisation profile of the plan covers .*latent_height=8"):
        native("a red star", height=32, num_inference_steps=1)


def test_a_larger_profile_gets_more_scratch_memory_and_new_graphs(
    bundle_copy: Path, gpu: GpuDouble, pipe: LatteFlowPipeline
) -> None:
    add_plans(bundle_copy, "tensorrt", rows=((1, 3), (2, 4), (2, 8)))
    gpu.trt.show(bundle_copy)
    with LatteFlowPipeline.from_pretrained(bundle_copy, "tensorrt") as native:
        for count in (1, 1, 1, 2, 2, 2, 1, 1, 1):
            assert images_differ_by(draw(native, *["a ring"] * count), draw(pipe, *["a ring"] * count)) <= 1
        assert backend_of(native).graph_launches > 0
    assert gpu.cuda.alive() == NOTHING


# ---- other weights -----------------------------------------------------------------------------------


def other_weights(bundle: Path, to: Path) -> Path:
    """A bundle like this one, with other weights in one expert, and without plans."""
    shutil.copytree(bundle, to)
    scale_weight(to, "expert_1", "q_proj", 1.5)
    return to


def test_weights_are_replaced_and_taken_back(
    bundle: Path, native: LatteFlowPipeline, pipe: LatteFlowPipeline, gpu: GpuDouble, tmp_path: Path
) -> None:
    other = other_weights(bundle, tmp_path / "other")
    with LatteFlowPipeline.from_pretrained(other) as expected:
        for _ in range(4):
            draw(native)
        assert backend_of(native).graph_launches > 0
        for source, like in ((other, expected), (bundle, pipe), (other, expected)):
            native.refit(source)
            assert native.manifest.engine("expert_1").plans
            for _ in range(4):
                assert images_differ_by(draw(native), draw(like)) <= 1
        assert images_differ_by(draw(expected), draw(pipe)) > 1
    native.close()
    assert gpu.cuda.alive() == NOTHING


def test_fixed_weights_stay_and_say_what_to_build(
    bundle: Path, native: LatteFlowPipeline, gpu: GpuDouble, tmp_path: Path
) -> None:
    gpu.trt.refittable = False
    other = other_weights(bundle, tmp_path / "other")
    with pytest.raises(EngineError, match="expert_1: its plan has fixed weights; build it with --refit"):
        native.refit(other)


def test_providers_that_replace_no_weights_say_so(bundle: Path, tmp_path: Path) -> None:
    other = other_weights(bundle, tmp_path / "other")
    with LatteFlowPipeline.from_pretrained(bundle) as pipeline:
        with pytest.raises(EngineError, match="this provider replaces no weights"):
            pipeline.refit(other)
        pipeline.refit(bundle)  # the same weights


def test_another_model_is_not_a_refit(native: LatteFlowPipeline, bundle: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(bundle, tmp_path / "other"))
    manifest = load_manifest(other)
    prompt = manifest.prompt.model_copy(update={"max_tokens": 9})
    save_manifest(manifest.model_copy(update={"prompt": prompt}), other)
    with pytest.raises(InputError, match="differs from this bundle in more than weights"):
        native.refit(other)


def test_weights_are_not_replaced_under_a_run(native: LatteFlowPipeline, gpu: GpuDouble) -> None:
    """The double refuses it, so that the tests above prove that the backend waits."""
    session = native.engines["expert_1"]
    draw(native)
    latents = np.zeros((1, *(4, 6, 8)), np.float32)
    spec = session.entry.input("prefix_kv")
    sizes = {"rows": 1, "prefix": 3}
    kv = np.zeros([sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape], spec.dtype)
    feed = {
        "latents": latents,
        "timestep": np.ones(1, np.float32),
        "prefix_kv": kv,
        "prefix_mask": np.ones((1, 3), bool),
    }
    kept = session.run(feed)
    engine = session._engine  # type: ignore[attr-defined]
    refitter = gpu.trt.Refitter(engine, gpu.trt.Logger(2))
    with pytest.raises(BrokenRule, match="while runs of the engine are queued"):
        refitter.refit_cuda_engine()
    assert kept["velocity"].numpy().shape == latents.shape
