"""TensorRT plans: real builds by TensorRT for RTX, which needs no GPU. Running a plan needs one: see docs/gpu.md."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import torch
from torch import Tensor

from export.benchmarks.random_models import PAPER, export_random_expert
from export.bundle import export_bundle
from export.plans.build import BuildOptions, _job, build_plans
from export.plans.precision import score_layers, wrong_built_layers, wrong_layers
from export.plans.profiles import AxisChoices, parse_choices, profiles_of
from export.plans.worker import BuildJob, _module, _must_ask_for_types, refit
from latte.checkpoint import save_checkpoint
from latte.shapes.vlm import small_image_processor
from runtime.errors import BundleError, EngineError, InputError
from runtime.manifest import (
    EngineEntry,
    Manifest,
    PlanEntry,
    file_entry,
    load_manifest,
    save_manifest,
)
from runtime.plans import most_in_plans, usable_plan
from runtime.serving.requests import Limits
from tests.doubles import GpuDouble
from tests.doubles.tensorrt import EngineDouble
from tests.tiny import scale_weight, tiny_model

RTX = BuildOptions(provider="tensorrt-rtx")
RunCommand = Callable[..., tuple[int, str, str]]


def built(bundle: Path, options: BuildOptions = RTX, **kwargs: object) -> dict[str, bool]:
    """Which engines were built, and which kept."""
    report = build_plans(bundle, options, **kwargs)  # type: ignore[arg-type]
    return {decision.engine: decision.build for decision in report.decisions}


@pytest.fixture(scope="session")
def built_bundle(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with all its plans. Tests that change it take `plans`."""
    path = Path(shutil.copytree(bundle, tmp_path_factory.mktemp("plans") / "tiny"))
    assert all(built(path).values())
    return path


@pytest.fixture
def plans(built_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the built bundle to change."""
    return Path(shutil.copytree(built_bundle, tmp_path / "bundle"))


# ---- every graph builds, in the precision that it says ----------------------------------------------


def test_the_decoding_profile_holds_one_answer_unless_the_plan_is_built_for_more(plans: Path) -> None:
    def together() -> int | None:
        return most_in_plans(load_manifest(plans), "tensorrt-rtx", "vlm", "batch", tokens=1, past=1)

    assert together() == 1
    assert built(plans, engines=["vlm"], choices=parse_choices({"maximum": ["batch=8"]}, {"batch"})) == {"vlm": True}
    assert together() == 8


@pytest.mark.parametrize(("precision", "name"), [("fp16", "shapes"), ("bf16", "tiny")])
def test_every_graph_is_built_in_half_precision(precision: str, name: str, checkpoint: Path, tmp_path: Path) -> None:
    """`built_bundle` is in fp32."""
    bundle = tmp_path / "bundle"
    source = "shapes" if name == "shapes" else checkpoint
    export_bundle(source, bundle, precision=precision, verify=False)  # type: ignore[arg-type]
    assert len(built(bundle)) == (8 if name == "shapes" else 6)
    manifest = load_manifest(bundle)
    precisions = {engine.name: engine.precision for engine in manifest.engines}
    assert precisions.pop("solver_step") == precisions.pop("vae_decoder") == "fp32"
    assert set(precisions.values()) == {precision}
    for engine in manifest.engines if name == "shapes" else ():
        plan = engine.plan("tensorrt-rtx")
        assert plan is not None
        assert plan.file.size > 0.5 * sum(file.size for file in engine.files)
        assert plan.build_peak_bytes > 50e6


def test_an_expert_of_the_papers_size_is_built(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "paper"
    entry = export_random_expert(folder, "fp16")
    assert sum(file.size for file in entry.files) > 689e6
    geometry = load_manifest(bundle).geometry.model_copy(update={"latent_size": PAPER.latent_size})
    manifest = load_manifest(bundle).model_copy(
        update={"engines": (entry,), "tokenizer_files": (), "geometry": geometry}
    )
    save_manifest(manifest, folder)
    assert built(folder) == {"expert_0": True}
    plan = load_manifest(folder).engine("expert_0").plan("tensorrt-rtx")
    assert plan is not None
    assert plan.file.size > 689e6


# ---- the proof of precision -------------------------------------------------------------------------


def change_engine(bundle: Path, name: str, change: Callable[[EngineEntry], EngineEntry]) -> None:
    """Rewrites an engine's entry, its files as they are now."""
    manifest = Manifest.model_validate_json((bundle / "manifest.json").read_text())
    engines = []
    for engine in manifest.engines:
        if engine.name == name:
            engine = change(engine)
            files = tuple(file_entry(bundle, file.path) for file in engine.files)
            engine = engine.model_copy(update={"files": files})
        engines.append(engine)
    save_manifest(manifest.model_copy(update={"engines": tuple(engines)}), bundle)


def test_an_fp32_graph_that_says_it_is_fp16_is_not_built(plans: Path) -> None:
    change_engine(plans, "expert_1", lambda engine: engine.model_copy(update={"precision": "fp16"}))
    with pytest.raises(EngineError, match=r"expert_1 is not in fp16 in \d+ layers, first .* is FLOAT, not HALF"):
        build_plans(plans, RTX)
    plan = load_manifest(plans).engine("expert_1").plan("tensorrt-rtx")
    assert plan is not None
    assert plan.ingredients["precision"] == "fp32"
    assert not list((plans / "expert_1").glob(".*"))


def test_one_product_in_another_type_fails_the_build(plans: Path) -> None:
    """Nothing else would tell: the graph is valid, and its result is nearly right."""
    path = plans / "expert_0" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    index, product = next((i, node) for i, node in enumerate(model.graph.node) if node.op_type == "MatMul")
    casts = [
        onnx.helper.make_node("Cast", [name], [f"{name}_half_{i}"], to=onnx.TensorProto.FLOAT16)
        for i, name in enumerate(product.input)
    ]
    output = product.output[0]
    back = onnx.helper.make_node("Cast", [f"{output}_half"], [output], to=onnx.TensorProto.FLOAT)
    del product.input[:], product.output[:]
    product.input.extend(cast.output[0] for cast in casts)
    product.output.append(back.input[0])
    for node in reversed(casts):
        model.graph.node.insert(index, node)
    model.graph.node.insert(index + len(casts) + 1, back)
    path.write_bytes(model.SerializeToString())
    change_engine(plans, "expert_0", lambda engine: engine)
    with pytest.raises(EngineError, match=r"expert_0 is not in fp32 in \d+ layers, first CAST .* is FLOAT/HALF in"):
        build_plans(plans, RTX)


class AttentionInTypes(torch.nn.Module):
    """Scores with a scale, a mask and the scores of a layer before, as in the flow layers, in types to choose."""

    def __init__(self, scores: torch.dtype, gate: torch.dtype = torch.float16) -> None:
        super().__init__()
        self.scores, self.gate = scores, gate
        self.to_gate = torch.nn.Linear(8, 1, bias=False, dtype=gate)

    def forward(self, query: Tensor, key: Tensor, time: Tensor, previous: Tensor, hidden: Tensor) -> Tensor:
        gate = torch.tanh(self.to_gate(time.to(self.gate))).float()
        context = torch.matmul(query.to(self.scores), hidden.to(self.scores).transpose(0, 1)).float()
        scores = torch.matmul(query.to(self.scores), key.to(self.scores).transpose(0, 1)).float() + gate * previous
        weights = torch.cat([context, scores], dim=-1).softmax(dim=-1).to(query.dtype)
        return torch.matmul(weights, torch.cat([hidden, key]))


@pytest.mark.parametrize(
    ("scores", "gate", "wrong"),
    [
        (torch.float32, torch.float16, []),
        (torch.float16, torch.float16, ["HALF, not FLOAT", "HALF, not FLOAT"]),
        (torch.float32, torch.float32, ["FLOAT, not HALF"]),
    ],
)
def test_scores_must_be_fp32_and_other_products_half(
    scores: torch.dtype, gate: torch.dtype, wrong: list[str], tmp_path: Path
) -> None:
    """Scores in half precision are infinite for keys of a pretrained model; a cast after the product hides nothing."""
    from export.graphs import quiet_exporter

    query, key, time, hidden = (torch.ones(size, 8, dtype=torch.float16) for size in (3, 4, 3, 2))
    with quiet_exporter():
        torch.onnx.export(
            AttentionInTypes(scores, gate).eval(),
            (query, key, time, torch.ones(3, 4), hidden),
            tmp_path / "model.onnx",
            dynamo=True,
            verbose=False,
            opset_version=18,
        )
    trt = _module("tensorrt-rtx")
    from polygraphy.backend.trt import network_from_onnx_path

    _, network, _ = network_from_onnx_path(str(tmp_path / "model.onnx"))
    assert len(score_layers(network)) == 2
    found = wrong_layers(network, trt, "fp16")
    assert [line.partition(" is ")[2] for line in found] == wrong


def test_an_inspected_product_may_be_fp32_if_it_is_of_scores() -> None:
    def layer(name: str, metadata: str, dtype: str) -> dict[str, object]:
        inputs = [{"Name": "x", "Format/Datatype": f"Row major linear {dtype}"}]
        return {"LayerType": "gemm", "Name": name, "Metadata": metadata, "Inputs": inputs}

    layers = [
        layer("layer_1/node_matmul_myl0_3", "[ONNX Layer: layer_1/node_matmul]", "FP32"),
        layer("layer_1/node_matmul_1_myl0_4", "[ONNX Layer: layer_1/node_matmul_1]", "FP32"),
        layer("layer_1/node_linear_myl0_5", "[ONNX Layer: layer_1/node_linear]", "FP16"),
    ]
    wrong = wrong_built_layers(json.dumps({"Layers": layers}), "fp16", {"layer_1/node_matmul"})
    assert wrong == ["gemm layer_1/node_matmul_1_myl0_4 is FLOAT"]


def inspected(**layer: object) -> str:
    """The inspector's answer for an engine of one layer besides a reformat of shapes."""
    shape = {"LayerType": "Constant", "Name": "shape", "Inputs": [], "Outputs": [{"Format/Datatype": "Int64"}]}
    return json.dumps({"Layers": [shape, layer], "Bindings": ["x", "y"]})


def product(**tensor: object) -> str:
    """A product as inspectors describe it, whose tensors have these fields."""
    about = {"Location": "Device", "Dimensions": [1, 64]} | tensor
    sides = {side: [{"Name": side} | about] for side in ("Inputs", "Outputs")}
    return inspected(LayerType="gemm", Name="node_linear_myl0_5", Metadata="[ONNX Layer: node_linear]", **sides)


INSPECTED = {
    # TensorRT 10: type and format in one field; fused kernels have the type only.
    "10, fp32": (product(**{"Format/Datatype": "Row major linear FP32"}), "fp32"),
    "10, fp16": (product(**{"Format/Datatype": "Row major linear FP16 format"}), "fp16"),
    "10, fp16, fused": (product(**{"Format/Datatype": "Half"}), "fp16"),
    "10, bf16, fused": (product(**{"Format/Datatype": "BFloat16"}), "bf16"),
    # TensorRT 11: a field for each.
    "11, fp32": (product(Format="Row major linear FP32 format (kLINEAR)", DataType="Float"), "fp32"),
    "11, fp16": (product(Format="Row major linear FP16 format (kLINEAR)", DataType="Half"), "fp16"),
    "11, bf16": (product(Format="Row major linear BF16 format (kLINEAR)", DataType="BFloat16"), "bf16"),
}


@pytest.mark.parametrize("name", INSPECTED)
def test_inspectors_of_tensorrt_10_and_11_are_understood(name: str) -> None:
    """bf16 of TensorRT 10 was taken for fp32, and in the fields of TensorRT 11 no type was found."""
    text, precision = INSPECTED[name]
    assert wrong_built_layers(text, precision, set()) == []  # type: ignore[arg-type]
    for other in {"fp32", "fp16", "bf16"} - {precision}:
        (line,) = wrong_built_layers(text, other, set())  # type: ignore[arg-type]
        assert re.fullmatch("gemm node_linear_myl0_5 is (FLOAT|HALF|BF16)", line)


@pytest.mark.parametrize(
    "text",
    [
        product(**{"Format/Datatype": "N/A due to dynamic shapes"}),
        product(Format="linear", Kind="Half"),
        json.dumps({"Layers": ["node_linear_myl0_5", "softmax"], "Bindings": ["x"]}),
    ],
)
def test_an_inspector_that_says_no_types_is_no_proof(text: str) -> None:
    (line,) = wrong_built_layers(text, "fp16", set())
    assert "says no types that are known" in line


def test_a_product_of_no_known_type_is_wrong() -> None:
    layers = json.loads(product(DataType="Half"))["Layers"]
    layers[1]["Inputs"][0]["DataType"] = "Posit16"
    (line,) = wrong_built_layers(json.dumps({"Layers": layers}), "fp16", set())
    assert line.endswith("is of no known type")


@pytest.mark.parametrize(("flags", "asked"), [({"STRONGLY_TYPED": 1}, True), ({"EXPLICIT_BATCH": 0}, False)])
def test_tensorrt_10_is_asked_for_a_strongly_typed_network(flags: dict[str, int], asked: bool) -> None:
    """It chooses types itself otherwise; TensorRT 11 has no such flag, and refuses the question."""
    assert _must_ask_for_types(SimpleNamespace(NetworkDefinitionCreationFlag=SimpleNamespace(**flags))) is asked


# ---- rebuilt when, and only when ---------------------------------------------------------------------


def test_nothing_is_built_twice(plans: Path, tmp_path: Path) -> None:
    assert not any(built(plans).values())
    assert not any(built(plans, RTX.model_copy(update={"timing_cache": tmp_path / "cache"})).values())


def test_engines_of_a_build_share_what_tensorrt_measures(plan_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts have equal graphs, and each was measured anew."""
    jobs: list[BuildJob] = []

    def run(name: str, job: BuildJob, on_progress: object) -> dict[str, object]:
        jobs.append(job)
        job.plan.write_bytes(b"a plan")
        return {"inspected": False, "peak_bytes": 1}

    monkeypatch.setattr("export.plans.build._run", run)
    assert all(built(plan_bundle).values())
    assert len(jobs) == len(load_manifest(plan_bundle).engines)
    (cache,) = {job.timing_cache for job in jobs}
    assert not cache.parent.exists()


def test_experts_are_built_once_and_refitted(plan_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their graphs differ in nothing but the place and values of weights."""
    jobs: dict[str, BuildJob] = {}

    def run(name: str, job: BuildJob, on_progress: object) -> dict[str, object]:
        jobs[name] = job
        job.plan.write_bytes(b"a plan")
        return {"inspected": False, "peak_bytes": 1}

    monkeypatch.setattr("export.plans.build._run", run)
    monkeypatch.setattr("export.plans.build._describe", lambda _: {"version": "11.4", "architecture": "sm_90"})
    options = BuildOptions(provider="tensorrt", refit=True)
    assert all(built(plan_bundle, options).values())
    assert all(job.refit for job in jobs.values())
    made_of = {name: job.refit_from for name, job in jobs.items() if job.refit_from is not None}
    assert made_of == {"expert_1": plan_bundle / "expert_0" / "model.plan"}
    assert not any(built(plan_bundle, options).values())


def test_a_plan_is_refitted_and_keeps_what_refits_it(
    plan_bundle: Path, gpu: GpuDouble, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: list[tuple[str, str]] = []

    def config(engine: EngineDouble) -> SimpleNamespace:
        return SimpleNamespace(
            clear_flag=lambda flag: written.append(("without", flag)),
            set_flag=lambda flag: written.append(("with", flag)),
        )

    monkeypatch.setattr(EngineDouble, "create_serialization_config", config, raising=False)
    monkeypatch.setattr(EngineDouble, "serialize_with_config", lambda engine, _: b"another plan", raising=False)
    monkeypatch.setattr("export.plans.worker._module", lambda _: gpu.trt)
    job = _job(
        plan_bundle, load_manifest(plan_bundle).engine("expert_1"), BuildOptions(provider="tensorrt"), Path(), ()
    )
    refit(job.model_copy(update={"refit_from": plan_bundle / "expert_0" / "model.plan"}))
    assert job.plan.read_bytes() == b"another plan"
    assert written == [("without", "EXCLUDE_WEIGHTS"), ("with", "INCLUDE_REFIT")]
    assert json.loads(capsys.readouterr().out)["event"] == "built"
    with pytest.raises(RuntimeError, match="takes no weights"):
        refit(job.model_copy(update={"refit_from": plan_bundle / "solver_step" / "model.plan"}))


def test_plans_to_refit_need_a_gpu(plans: Path) -> None:
    with pytest.raises(InputError, match="are built on a machine with a GPU; leave out --refit"):
        build_plans(plans, RTX.model_copy(update={"refit": True}))


def test_changing_one_expert_rebuilds_one_engine(plans: Path) -> None:
    before = (plans / "expert_0" / "model.rtx.plan").stat().st_mtime_ns
    scale_weight(plans, "expert_1", "heads", 1.02)
    report = build_plans(plans, RTX)
    assert {d.engine: d.reason for d in report.decisions if d.build} == {"expert_1": "changed: weights"}
    assert (plans / "expert_0" / "model.rtx.plan").stat().st_mtime_ns == before


def test_exporting_again_with_one_expert_changed_keeps_the_other_plans(plans: Path, tmp_path: Path) -> None:
    model = tiny_model()
    model.flow.heads[1].proj.weight.data *= 1.02
    save_checkpoint(model, small_image_processor(), tmp_path / "changed")
    export_bundle(tmp_path / "changed", plans, verify=False, force=True)
    assert [name for name, again in built(plans).items() if again] == ["expert_1"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"optimization_level": 1}, "changed: options"),
        ({"workspace_mib": 64}, "changed: options"),
        ({"compute_capabilities": ("8.9",)}, "changed: GPU architecture"),
    ],
)
def test_other_options_make_other_plans(change: dict[str, object], reason: str, plans: Path) -> None:
    report = build_plans(plans, RTX.model_copy(update=change), ["solver_step"], dry_run=True)
    assert [decision.reason for decision in report.decisions] == [reason]
    assert build_plans(plans, RTX.model_copy(update=change), ["solver_step"]).decisions[0].build
    assert not build_plans(plans, RTX.model_copy(update=change), ["solver_step"]).decisions[0].build


def test_another_tensorrt_another_shape_and_a_lost_file_are_reasons(plans: Path) -> None:
    def older(engine: EngineEntry) -> EngineEntry:
        (plan,) = engine.plans
        old = plan.model_copy(update={"ingredients": plan.ingredients | {"TensorRT": "1.0"}})
        return engine.model_copy(update={"plans": (old,)})

    change_engine(plans, "expert_0", older)
    (plans / "vae_decoder" / "model.rtx.plan").unlink()
    reasons = {d.engine: d.reason for d in build_plans(plans, RTX, dry_run=True).decisions if d.build}
    assert reasons == {
        "expert_0": "changed: TensorRT",
        "vae_decoder": "vae_decoder/model.rtx.plan is missing or was altered",
    }
    choices = {"rows": AxisChoices(maximum=(4,))}
    reasons = {d.engine: d.reason for d in build_plans(plans, RTX, ["expert_1"], choices, dry_run=True).decisions}
    assert reasons == {"expert_1": "changed: shapes"}


# ---- profiles ----------------------------------------------------------------------------------------


def axes_of_profiles(manifest: Manifest, engine: str, **choices: AxisChoices) -> list[dict[str, tuple[int, int, int]]]:
    profiles = profiles_of(manifest, manifest.engine(engine), choices)
    return [{axis: (r.min, r.opt, r.max) for axis, r in profile.axes.items()} for profile in profiles]


def test_profiles_follow_from_the_manifest(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    (expert,) = axes_of_profiles(manifest, "expert_0")
    assert expert == {"latent_height": (6,) * 3, "latent_width": (8,) * 3, "prefix": (1, 32, 128), "rows": (1, 2, 32)}
    assert expert["rows"][2] == Limits().max_rows_per_tick
    prompts, prefill, decode = axes_of_profiles(manifest, "vlm")
    assert prompts["past"] == prefill["past"] == (0, 0, 0)
    assert decode["tokens"] == (1, 1, 1)
    for profile in (prompts, prefill, decode):
        assert profile["total"] == tuple(a + b for a, b in zip(profile["past"], profile["tokens"], strict=True))


def test_axes_take_what_was_asked_for(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    (wider,) = axes_of_profiles(manifest, "expert_0", rows=AxisChoices(maximum=(64,)))
    assert wider["rows"] == (1, 2, 64)
    (static,) = axes_of_profiles(manifest, "expert_0", rows=AxisChoices((4,), (4,), (4,)))
    assert static["rows"] == (4, 4, 4)
    (larger,) = axes_of_profiles(manifest, "expert_0", latent_height=AxisChoices(maximum=(12,)))
    assert larger["latent_height"] == (6, 6, 12)
    (best,) = axes_of_profiles(manifest, "expert_0", rows=AxisChoices(optimum=(32,)))
    assert best["rows"] == (1, 32, 32)
    several = axes_of_profiles(manifest, "expert_0", rows=AxisChoices((), (2, 8), (2, 16)))
    assert [profile["rows"] for profile in several] == [(1, 2, 2), (1, 8, 16)]


def test_static_and_several_profiles_are_built(plans: Path) -> None:
    choices = {"rows": AxisChoices((2, 8), (2, 8), (2, 8)), "prefix": AxisChoices((16,), (16,), (16,))}
    assert built(plans, engines=["expert_0"], choices=choices) == {"expert_0": True}
    plan = load_manifest(plans).engine("expert_0").plan("tensorrt-rtx")
    assert plan is not None
    assert [profile.axes["rows"].max for profile in plan.profiles] == [2, 8]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"minimum": ["rows=x"]}, "expected AXIS=N"),
        ({"minimum": ["rows"]}, "expected AXIS=N"),
        ({"maximum": ["columns=3"]}, "no engine has an axis 'columns'; there are prefix, rows"),
        ({"minimum": ["rows=1,2"], "maximum": ["rows=1,2,3"]}, "different numbers of profiles"),
    ],
)
def test_a_range_that_is_none_is_refused(options: dict[str, list[str]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_choices(options, {"rows", "prefix"})


def test_a_range_in_the_wrong_order_is_refused(bundle: Path) -> None:
    with pytest.raises(InputError, match="axis rows: expected min <= opt <= max, got 4, 2 and 2"):
        axes_of_profiles(load_manifest(bundle), "expert_0", rows=AxisChoices((4,), (), (2,)))


# ---- plans of elsewhere ------------------------------------------------------------------------------


def plan_of(bundle: Path, **change: object) -> EngineEntry:
    engine = load_manifest(bundle).engine("expert_0")
    (plan,) = engine.plans
    return engine.model_copy(update={"plans": (plan.model_copy(update=change),)})


def test_a_plan_for_here_is_taken(built_bundle: Path) -> None:
    def use(version: str, architecture: str, **change: object) -> PlanEntry:
        return usable_plan(built_bundle, plan_of(built_bundle, **change), "tensorrt-rtx", version, architecture)

    assert use("1.7.1.116", "sm_89")
    assert use("1.9.0", "sm_89", version_compatible=True)
    assert use("1.7.1.116", "sm_90", architectures=("sm_80+",))


@pytest.mark.parametrize(
    ("change", "version", "architecture", "message"),
    [
        (
            {},
            "1.8.0",
            "sm_89",
            "the plan of expert_0 was built with tensorrt-rtx 1.7.1.116; this is 1.8.0; run: latte-flow",
        ),
        ({"version_compatible": True}, "2.0", "sm_89", "this is 2.0"),
        ({"version_compatible": True}, "1.7.0", "sm_89", "this is 1.7.0"),
        ({}, "1.7.1.116", "sm_90", "is for sm_80, sm_86, .*; this GPU is sm_90; run: latte-flow build"),
        ({"architectures": ("sm_80+",)}, "1.7.1.116", "sm_75", "this GPU is sm_75"),
        ({}, "1.7.1.116", None, "there is no GPU here"),
    ],
)
def test_a_plan_for_elsewhere_is_refused(
    change: dict[str, object], version: str, architecture: str | None, message: str, built_bundle: Path
) -> None:
    with pytest.raises(BundleError, match=message):
        usable_plan(built_bundle, plan_of(built_bundle, **change), "tensorrt-rtx", version, architecture)


def test_an_engine_without_a_plan_says_how_to_build_it(bundle: Path) -> None:
    with pytest.raises(
        BundleError, match=r"no tensorrt plan of expert_0; run: latte-flow build .* --provider tensorrt"
    ):
        usable_plan(bundle, load_manifest(bundle).engine("expert_0"), "tensorrt", "11.0", "sm_90")


# ---- the command -------------------------------------------------------------------------------------


def test_build_shows_what_it_did_and_explain_why(plans: Path, run_command: RunCommand) -> None:
    scale_weight(plans, "expert_1", "heads", 1.02)
    command = ("build", plans, "--provider", "tensorrt-rtx", "--engine", "expert_0", "--engine", "expert_1")
    code, out, _ = run_command(*command, "--dry-run")
    assert code == 0
    assert "changed: weights" in out
    assert "it is up to date" in out
    code, out, error = run_command(*command, "--timing-cache", plans / "timing.cache")
    assert code == 0, error
    assert "expert_0 │ kept" in out
    assert "expert_1 │ built" in out
    assert (plans / "timing.cache").stat().st_size > 0
    assert json.loads((plans / "manifest.json").read_text())["engines"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "tensorrt is not installed"),
        (("--provider", "tensorrt-rtx", "--engine", "expert_9"), "the bundle has no engine 'expert_9'"),
        (("--provider", "tensorrt-rtx", "--version-compatible"), "neither --version-compatible nor"),
        (("--compute-capability", "8.9"), "TensorRT builds for the GPU that it runs on"),
        (
            ("--provider", "tensorrt-rtx", "--compute-capability", "ada"),
            'expected --compute-capability like 8.9, or "cu',
        ),
        (("--provider", "tensorrt-rtx", "--compute-capability", "9.0"), "Compute capability 9.0 .* not supported"),
        (("--provider", "tensorrt-rtx", "--compute-capability", "current"), "there is no GPU here"),
        (("--provider", "tensorrt-rtx", "--max", "rows"), "expected AXIS=N"),
    ],
)
def test_what_cannot_be_built_is_said_in_one_line(
    arguments: tuple[str, ...], message: str, bundle_copy: Path, run_command: RunCommand
) -> None:
    code, _, error = run_command("build", bundle_copy, *arguments)
    assert code in (1, 2)
    lines = [line for line in error.splitlines() if line.strip()]
    assert lines[-1].startswith("error: ")
    assert re.search(message, " ".join(lines))
