"""The command `gateway`, as a process."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest

from tests.runtime.gateway.conftest import gateway_process

RunCommand = Callable[..., tuple[int, str, str]]


def test_the_command_serves_and_ends_when_what_it_draws_is_drawn(bundle: Path) -> None:
    with gateway_process(bundle, "--access-log") as (url, process):
        assert process.stderr is not None
        answers: list[int] = []

        def draw() -> None:
            body = {"prompt": "slow", "num_inference_steps": 150, "n": 8}
            answers.append(httpx2.post(f"{url}/v1/images/generations", json=body, timeout=120).status_code)

        drawing = threading.Thread(target=draw)
        drawing.start()
        while "latte_flow_pending_images 8.0" not in httpx2.get(f"{url}/metrics").text:
            assert drawing.is_alive()
        process.send_signal(signal.SIGTERM)
        drawing.join(120)
        assert answers == [200]
        log = process.stderr.read()
        assert process.wait(60) == 0
    assert "path=/v1/images/generations status=200" in log
    assert "Traceback" not in log


@pytest.mark.parametrize(
    ("content", "mode", "message"),
    [
        ("[]", 0o600, "contains no key"),
        ('[{"name": "a", "key": "short"}]', 0o600, "0.key: String should have at least 16 characters"),
        ('[{"name": "a", "key": "long-enough-to-be-a-key"}]', 0o644, r"\(mode 0644\); run: chmod 600"),
        ("{", 0o600, "must be a JSON list of API keys"),
    ],
)
def test_unusable_keys_are_refused_before_anything_is_loaded(
    content: str, mode: int, message: str, tmp_path: Path, run_command: RunCommand
) -> None:
    file = tmp_path / "keys.json"
    file.write_text(content)
    file.chmod(mode)
    code, _, error = run_command("gateway", tmp_path / "no-bundle", "--api-key-file", file)
    assert code == 2
    assert re.search(message, error), error


def test_a_port_that_is_taken_is_one_line(bundle: Path, run_command: RunCommand) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, _, error = run_command("gateway", bundle, "--port", taken.getsockname()[1])
    assert code == 2
    assert "cannot listen on 127.0.0.1:" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--provider", "cuda", "--devices", "0,0"), "expected --devices like 0,1, each once, got '0,0'"),
        (("--provider", "cuda", "--devices", "all"), "expected --devices like 0,1"),
        (("--devices", "0,1"), "--devices needs a provider on GPUs"),
        (("--provider", "cuda", "--devices", "0,1", "--device", "0"), "takes the place of --device"),
    ],
)
def test_devices_that_make_no_sense_are_refused(
    options: tuple[str, ...], message: str, bundle: Path, run_command: RunCommand
) -> None:
    code, _, error = run_command("gateway", bundle, "--port", 0, *options)
    assert code == 2
    assert message in error
