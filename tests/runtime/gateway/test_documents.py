"""What the documents show is run as it is written, by real `curl` and Python against a real `latte-flow gateway`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from runtime.gateway.app import GatewaySettings
from runtime.gateway.keys import KeyRing
from runtime.serving.service import LocalService
from tests.runtime.gateway.conftest import gateway_process, running

ROOT = Path(__file__).parents[3]
SHOWN_URL = "http://127.0.0.1:8080"
NOT_RUN = ("latte-flow ", "pip ")
"""Lines that begin so start what is running already."""
TOOLS = ("bash", "curl", "jq", "base64")


def blocks(page: str, language: str) -> list[str]:
    """Returns the blocks of a document that ask a gateway, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for block in found if "curl " in block or language != "bash"]


@pytest.fixture(scope="module")
def url(bundle: Path) -> Iterator[str]:
    with gateway_process(bundle, "--result-cache", "64") as (url, _):
        yield url


def run(folder: Path, url: str, *command: str) -> str:
    """Runs an example; fails if it, or an answer to its `curl`, does."""
    (folder / ".curlrc").write_text("fail-with-body\nshow-error\n")
    env = {**os.environ, "HOME": str(folder), "NO_PROXY": "127.0.0.1"}
    *head, script = command
    finished = subprocess.run(
        [*head, script.replace(SHOWN_URL, url)],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, f"{script}\n{finished.stdout}{finished.stderr}"
    return finished.stdout


def run_bash(folder: Path, url: str, block: str) -> str:
    script = "".join(line for line in block.splitlines(keepends=True) if not line.startswith(NOT_RUN))
    return run(folder, url, "bash", "-euo", "pipefail", "-c", script)


needs_tools = pytest.mark.skipif(
    not all(map(shutil.which, TOOLS)), reason=f"the examples use {', '.join(TOOLS)}, which are not all here"
)


@needs_tools
def test_examples_with_curl_run(url: str, service: LocalService, tmp_path: Path) -> None:
    examples = blocks("docs/gateway.md", "bash")
    with_key = [block for block in examples if "Authorization" in block]
    said = "".join(run_bash(tmp_path, url, block) for block in examples if block not in with_key)
    assert said.count("event: image_generation.partial_image\n") == 2
    assert said.count("event: image_generation.completed\n") == 1
    assert re.findall("x-result-cache: (.+)", said) == ["miss", "hit"]
    for name in ("circle.png", "star.webp", "red.png"):
        with Image.open(tmp_path / name) as image:
            assert (image.size, image.format) == ((32, 24), "WEBP" if name.endswith("webp") else "PNG")

    (keys,) = blocks("docs/gateway.md", "json")
    file = tmp_path / "keys.json"
    file.write_text(keys)
    file.chmod(0o600)
    with running(service, GatewaySettings(KeyRing.from_file(file))) as door:
        (example,) = with_key
        assert '"id":"latte-flow"' in run_bash(tmp_path, door.url, example)


@needs_tools
def test_the_first_screen_of_the_readme_runs(url: str, tmp_path: Path) -> None:
    (example,) = (block for block in blocks("README.md", "bash") if SHOWN_URL in block)
    assert '"b64_json":' in run_bash(tmp_path, url, example)


@pytest.mark.parametrize("page", ["docs/gateway.md", "README.md"])
def test_examples_in_python_run(url: str, tmp_path: Path, page: str) -> None:
    examples = [block for block in blocks(page, "python") if "openai" in block or "client" in block]
    assert examples
    said = run(tmp_path, url, sys.executable, "-c", "".join(examples))
    if page == "docs/gateway.md":
        assert said.startswith("image_generation.partial_image\nimage_generation.partial_image\nimage_generation.comp")
        assert said.endswith("\ndata:image/png;base64,\n")
