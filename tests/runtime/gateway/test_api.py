"""The gateway's description of itself, and whatever a schema-aware fuzzer can think of."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase

from runtime.gateway.app import Gateway, make_app
from runtime.pipeline import LatteFlowPipeline
from runtime.serving.requests import Limits
from runtime.serving.service import LocalService

REQUESTS = int(os.environ.get("LATTE_FLOW_FUZZ_REQUESTS", "200"))
"""For each of the two endpoints. More take minutes: `LATTE_FLOW_FUZZ_REQUESTS=5000 pytest tests/runtime/gateway`."""
PATIENCE_SECONDS = 120
"""Not what is tested: a busy machine needs it."""
RARELY_RIGHT = ("model", "size", "n", "guidance_scale", "shift", "seed", "output_compression", "stop", "extra_body")
"""Fields of which most random values are refused."""
FITTING = {
    "/v1/images/generations": {"num_inference_steps": 2},
    "/v1/chat/completions": {"max_tokens": 2, "max_completion_tokens": 2, "num_inference_steps": 2},
}


def easier(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Returns a body with fewer reasons to be refused."""
    kept = {name: value for name, value in body.items() if name not in RARELY_RIGHT} | FITTING[path]
    if path == "/v1/chat/completions":
        kept["messages"] = [{"role": "user", "content": "a"}]
    return kept


@pytest.mark.filterwarnings("ignore")  # of the fuzzer's own
@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/chat/completions"])
def test_no_request_breaks_the_gateway(bundle: Path, path: str) -> None:
    limits = Limits(max_steps=2, max_images_per_request=2, max_new_tokens=3)
    seen: Counter[int] = Counter()
    with LocalService(LatteFlowPipeline.from_pretrained(bundle), limits) as service:
        app = make_app(Gateway(service))
        operation = schemathesis.openapi.from_asgi("/openapi.json", app)[path]["POST"]

        @hypothesis.settings(
            max_examples=REQUESTS,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @hypothesis.given(case=operation.as_strategy())
        def ask(case: schemathesis.Case) -> None:
            if seen.total() % 2 and isinstance(case.body, dict):
                case.body = easier(path, case.body)
            answer = case.call(timeout=PATIENCE_SECONDS)
            seen[answer.status_code] += 1
            too_late = isinstance(case.body, dict) and case.body.get("deadline") and answer.status_code == 504
            assert answer.status_code < 500 or too_late, answer.text
            assert "Traceback" not in answer.text

        ask()
    assert sum(seen.values()) >= REQUESTS
    assert seen[200], seen
