"""What a wheel holds, and what the repository promises about itself."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from latte.shipped import ENTRY_POINTS, shipped_checkpoints
from model_repository.container import KEY_FILE, KEY_VARIABLE
from model_repository.schema import DRAIN_SECONDS
from runtime.cli import load_command
from runtime.doctor import CUDA_OF_EXTRAS, OLDEST_DRIVER
from runtime.serving.metrics import GAUGES

ROOT = Path(__file__).parents[1]
CUDA_OF_CONTAINER = {"25.08": 13, "25.10": 13, "26.04": 13, "26.08": 13}
"""The major version of CUDA in releases of NVIDIA's Triton container, from its compatibility table."""
PACKAGES = {"latte", "export", "runtime", "model_repository"}
TRITON_REPOSITORY = {"latte_flow/config.pbtxt", "latte_flow/1/model.py", "engine/1/model.py"}
SHIPPED_FILES = {
    "config.json",
    "model.safetensors",
    "vlm/config.json",
    "vlm/generation_config.json",
    "vlm/model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "preprocessor_config.json",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", ROOT, source], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", out]
    subprocess.run([*command, source, source / "emoji"], check=True, capture_output=True, timeout=300)
    return next(out.glob("latte_flow-*.whl"))


def test_the_wheel_holds_the_packages_and_the_shipped_checkpoints_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == PACKAGES | {"latte_flow.py"}
    for checkpoint in ("shapes", "shapes-4step"):
        folder = f"latte/checkpoints/{checkpoint}/"
        assert {name.removeprefix(folder) for name in names if name.startswith(folder)} == SHIPPED_FILES
    assert wheel.stat().st_size < 95_000_000
    source = wheel.parent / "source"
    modules = {str(path.relative_to(source)) for package in PACKAGES for path in (source / package).rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules | {"latte_flow.py"}
    assert {f"model_repository/{name}" for name in TRITON_REPOSITORY} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_of_emoji_holds_its_checkpoint_and_says_so(wheel: Path) -> None:
    archive = zipfile.ZipFile(next(wheel.parent.glob("latte_flow_emoji-*.whl")))
    names = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = {f"latte_flow_emoji/emoji/{name}" for name in SHIPPED_FILES}
    assert names == files | {"latte_flow_emoji/__init__.py"}
    (declared,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert archive.read(declared).decode().split("\n\n")[0] == f"[{ENTRY_POINTS}]\nemoji = latte_flow_emoji\n"


@pytest.mark.parametrize(("name", "megabytes"), [("shapes", 30), ("shapes-4step", 30), ("emoji", 60)])
def test_a_shipped_checkpoint_is_small(name: str, megabytes: int) -> None:
    path = shipped_checkpoints()[name]
    assert sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) < 1_000_000 * megabytes


def test_the_readme_says_that_this_is_an_independent_implementation() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "independent implementation" in readme
    assert "2506.06952" in readme
    assert "2506.06952" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


NOT_ON_A_GPU_MACHINE = ("tritonclient", "pytriton", "datasets", "peft", "gradio", "fastapi", "openai", "playwright")
COLLECT = """
import sys
for name in sys.argv.pop(1).split(","):
    sys.modules[name] = None
import pytest
sys.exit(pytest.main([*sys.argv[1:], "--collect-only"]))
"""


def test_make_test_gpu_collects_where_only_its_own_extras_are_installed() -> None:
    """A file that cannot be imported stops the collection, although its tests would not be chosen."""
    (command,) = re.findall(r"^\t\.venv-gpu/bin/python -m pytest (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    arguments = [sys.executable, "-c", COLLECT, ",".join(NOT_ON_A_GPU_MACHINE), *command.split()]
    environment = {**os.environ, "PYTEST_ADDOPTS": ""}  # they may change how a collection is printed
    found = subprocess.run(
        arguments, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment, check=False
    )
    assert found.returncode == 0, found.stdout
    tests = {line.partition("[")[0] for line in found.stdout.splitlines() if "::" in line}
    marked = [path for path in (ROOT / "tests").rglob("*.py") if "mark.gpu" in path.read_text(encoding="utf-8")]
    assert {line.partition("::")[0] for line in tests} == {"tests/test_gpu.py"}
    assert {path.name for path in marked} == {"test_gpu.py", Path(__file__).name}


def test_a_pin_is_a_version_that_every_extra_accepts() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    versions = {pin.name.lower(): next(iter(pin.specifier)).version for pin in pins}
    for extra, texts in project["optional-dependencies"].items():
        for requirement in map(Requirement, texts):
            version = versions.get(requirement.name.lower())
            assert version is None or requirement.specifier.contains(version), (extra, str(requirement))
    assert "tensorrt-cu13" not in versions  # two extras need different ones


def test_what_is_deployed_is_what_the_service_is() -> None:
    """No container engine runs here: the files are parsed, and held to the names and ports of the service."""
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text(encoding="utf-8"))
    service, door = compose["services"]["latte-flow"], compose["services"]["gateway"]
    for built in (service, door):
        assert (ROOT / "deploy" / built["build"]["context"] / built["build"]["dockerfile"]).is_file()
    folder = ROOT / "deploy" / "kubernetes"
    deployment, access = yaml.safe_load_all((folder / "service.yaml").read_text(encoding="utf-8"))
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": 8000, "grpc": 8001, "metrics": 8002}
    (policy,) = yaml.safe_load_all((folder / "network.yaml").read_text(encoding="utf-8"))
    scaler, budget = yaml.safe_load_all((folder / "scaling.yaml").read_text(encoding="utf-8"))
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    selectors = (deployment["spec"]["selector"], policy["spec"]["podSelector"], budget["spec"]["selector"])
    assert all(selector["matchLabels"] == labels for selector in selectors)
    assert access["spec"]["selector"] == labels
    assert {port["name"] for port in access["spec"]["ports"]} == {"http", "grpc"}
    assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert "replicas" not in deployment["spec"]  # each apply would undo what the scaler did
    assert service["restart"] == "unless-stopped"
    (metric,) = scaler["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"].removeprefix("latte_flow_") in GAUGES
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    assert {*kustomization["resources"], "kustomization.yaml"} == {path.name for path in folder.iterdir()}
    for probe in (service["healthcheck"]["test"], container["readinessProbe"]["exec"]["command"]):
        assert any(word.endswith("/v2/models/latte_flow/generate") for word in probe)
        (body,) = (json.loads(word) for word in probe if word.startswith("{"))
        assert body == {"heartbeat": True}  # which waits in no queue
    *alive, key = container["livenessProbe"]["exec"]["command"]
    assert alive == ["latte-flow", "control", "alive"]
    assert {"name": KEY_VARIABLE, "value": key.removeprefix("--key=")} in container["env"]
    # One key, and one number for the end, wherever they are.
    *drain, key = container["lifecycle"]["preStop"]["exec"]["command"]
    assert drain == ["latte-flow", "control", "drain"]
    assert {"name": KEY_VARIABLE, "value": key.removeprefix("--key=")} in container["env"]
    assert f"/run/secrets/{service['secrets'][0]}" == KEY_FILE
    assert pod["terminationGracePeriodSeconds"] > DRAIN_SECONDS
    assert int(service["stop_grace_period"].removesuffix("s")) > DRAIN_SECONDS
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")
    assert 'ENTRYPOINT ["python3", "-m", "model_repository.container"]' in dockerfile
    for line in re.findall(r"^COPY (.+) \S+$", dockerfile, re.MULTILINE):
        for source in line.split():
            assert source.startswith("deploy/models") or (ROOT / source).exists(), source


def test_what_is_deployed_on_gpus_asks_for_one_and_fits_the_rest() -> None:
    deploy = ROOT / "deploy"
    base, on_gpu = (yaml.safe_load((deploy / name).read_text()) for name in ("compose.yaml", "compose.gpu.yaml"))
    assert set(on_gpu["services"]) <= set(base["services"])
    service = on_gpu["services"]["latte-flow"]
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert service["build"]["args"]["EXTRA"] in extras
    patch = yaml.safe_load((deploy / "kubernetes-gpu" / "gpu.yaml").read_text())
    patched = next(yaml.safe_load_all((deploy / "kubernetes" / "service.yaml").read_text()))
    assert patch["metadata"] == patched["metadata"]
    (container,) = patch["spec"]["template"]["spec"]["containers"]
    assert container["name"] in {each["name"] for each in patched["spec"]["template"]["spec"]["containers"]}
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    # One CUDA for the container, ONNX Runtime and TensorRT, and the driver that doctor asks for.
    release = re.search(
        r"^FROM nvcr.io/nvidia/tritonserver:(\S+)-py3$", (deploy / "Dockerfile").read_text(), re.MULTILINE
    )
    assert release is not None
    assert CUDA_OF_CONTAINER[release[1]] == CUDA_OF_EXTRAS
    for extra in ("gpu", "tensorrt", "ort-tensorrt", "rtx"):
        for requirement in map(Requirement, extras[extra]):
            named = re.search(r"-cu(\d+)", requirement.name)
            assert named is None or int(named[1]) == CUDA_OF_EXTRAS, str(requirement)
    driver = str(OLDEST_DRIVER[CUDA_OF_EXTRAS])
    for text in ("Dockerfile", "compose.gpu.yaml", "kubernetes-gpu/kustomization.yaml"):
        assert f"river {driver} or later" in (deploy / text).read_text(), text


def test_every_file_that_the_readme_and_docs_link_to_exists() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_gateway_that_is_deployed_has_the_commands_options_and_paths() -> None:
    folder = ROOT / "deploy"
    compose = yaml.safe_load((folder / "compose.yaml").read_text(encoding="utf-8"))
    deployment, access, ingress = yaml.safe_load_all(
        (folder / "kubernetes" / "gateway.yaml").read_text(encoding="utf-8")
    )
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    known = {option for parameter in load_command("gateway").params for option in parameter.opts}
    used = ["--host", *compose["services"]["gateway"]["command"], *container["args"]]
    assert {option.partition("=")[0] for option in used} <= known
    image = (folder / "Dockerfile.gateway").read_text(encoding="utf-8")
    assert 'ENTRYPOINT ["latte-flow", "gateway", "--host=0.0.0.0"]' in image
    assert access["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"]
    (policy,) = yaml.safe_load_all((folder / "kubernetes" / "network.yaml").read_text(encoding="utf-8"))
    (clients,) = policy["spec"]["ingress"][0]["from"]
    assert clients["podSelector"]["matchLabels"].items() <= deployment["spec"]["template"]["metadata"]["labels"].items()
    paths = {path["path"] for path in ingress["spec"]["rules"][0]["http"]["paths"]}
    assert paths == {"/v1", "/docs", "/openapi.json"}
