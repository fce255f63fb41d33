"""Many requests open at once against a real server: does the last answer come as soon as the last image is drawn?"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

from export.benchmarks.triton_server import settled_figures, triton_server
from model_repository.client import input_tensor
from model_repository.connection import Connection
from model_repository.schema import MODEL
from model_repository.server import TritonServer
from runtime.errors import ServiceError
from runtime.images import png_bytes
from runtime.pipeline import LatteFlowPipeline
from runtime.serving.requests import Limits

LIMITS = Limits(max_queued_images=100_000, max_queued_questions=100_000)
STEPS = 4
"""Few steps: the fewer, the more answers there are to send for each second of drawing."""
MAX_NEW_TOKENS = 8
QUIET_SECONDS = 300.0
"""A server that answers nothing for so long has lost the requests."""
DRAW: dict[str, Any] = {"num_inference_steps": STEPS}
KINDS: dict[str, dict[str, Any]] = {
    "images": {},
    "images with previews": {"preview_every": 2},
    "PNG": {"image_format": "png"},
    "images and answers": {},
}
ASKS = "images and answers"
"""Every second request of this kind is a question about an image."""


@dataclass(frozen=True)
class OpenResult:
    """When requests that were sent together were answered, from the first one's sending."""

    load: str
    open_requests: int
    median_answer_seconds: float
    last_image_seconds: float
    """When the service had drawn the last image."""
    last_answer_seconds: float
    """When the last answer with an image was here."""

    @property
    def lag(self) -> float:
        """Seconds from the last image to the last answer."""
        return self.last_answer_seconds - self.last_image_seconds


def open_loads(bundle: Path, counts: Sequence[int]) -> Iterator[OpenResult]:
    """Measures each kind of requests with each number of open requests."""
    with LatteFlowPipeline.from_pretrained(bundle) as pipe:
        image = png_bytes(pipe("a red star", num_inference_steps=STEPS, seed=0).images[0])
    with triton_server(bundle, LIMITS) as server:
        for kind in KINDS:
            for count in counts:
                yield measure(server, kind, count, image)


def measure(server: TritonServer, kind: str, count: int, image: bytes) -> OpenResult:
    """Sends `count` requests on one stream at once and waits for all answers.

    Args:
        image: a PNG file, to ask about.

    Raises:
        ServiceError: a request failed, or was not answered.
    """
    responses: SimpleQueue[tuple[Any, Any, float]] = SimpleQueue()
    questions = set(range(1, count, 2)) if kind == ASKS else set()
    client = Connection(server.grpc_url).open()
    client.start_stream(lambda result, error: responses.put((result, error, time.time())))
    answers: dict[int, float] = {}
    try:
        began = time.time()
        for index in range(count):
            inputs: dict[str, Any] = {"prompt": f"a red star {index % 7}", "seed": index} | DRAW | KINDS[kind]
            if index in questions:
                inputs = {"question": "what is it?", "image": image, "max_new_tokens": MAX_NEW_TOKENS}
            tensors = [input_tensor(name, value) for name, value in inputs.items()]
            client.async_stream_infer(MODEL, tensors, request_id=str(index))
        while len(answers) < count:
            try:
                result, error, moment = responses.get(timeout=QUIET_SECONDS)
            except Empty:
                raise ServiceError(f"{count - len(answers)} of {count} requests were not answered") from None
            if error is not None:
                raise ServiceError(f"a request of {count} failed: {error}")
            if result.as_numpy("event")[0] == b"done":
                answers[int(result.get_response().id)] = moment - began
    finally:
        client.stop_stream(cancel_requests=len(answers) < count)
        client.close()
    drawn = settled_figures(server)["last_image_timestamp_seconds"] - began
    return OpenResult(
        load=f"{count} open, {kind}",
        open_requests=count,
        median_answer_seconds=float(np.median(list(answers.values()))),
        last_image_seconds=drawn,
        last_answer_seconds=max(moment for index, moment in answers.items() if index not in questions),
    )
