"""A client of the model `latte_flow` over Triton's gRPC: images, answers, progress, cancellation, retries.

A request that found the queue full is sent again after a pause. A request that was cut off is not: the caller can
send it again, and the same seed gives the same image.
"""

from __future__ import annotations

import io
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Self

import numpy as np
import tritonclient.grpc as grpc
from PIL import Image
from tritonclient.utils import InferenceServerException

from model_repository.schema import CANCELLED, INPUTS, INVALID, MODEL, NUMPY_DTYPES, UNAVAILABLE
from runtime.errors import DRAINING, CancelledError, DrainingError, InputError, QueueFullError, ServiceError, one_line
from runtime.images import png_bytes

_FIELDS = {field.name: field for field in INPUTS}
RETRIES = 5
FIRST_PAUSE_SECONDS = 0.2
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Response:
    """One response of the service."""

    event: str
    """"progress", "preview", "text" or, last, "done"."""
    image_index: int | None = None
    step: int | None = None
    images: np.ndarray | None = None
    """`[n, height, width, 3]` uint8."""
    text: str | None = None


class Client:
    """Sends requests to one server.

    Example:
        >>> with Client("localhost:8001") as client:
        ...     client.generate("a small red circle", seed=7)[0].save("circle.png")
        ...     client.ask("circle.png", "what colour is the circle?")
    """

    def __init__(self, url: str, retries: int = RETRIES) -> None:
        self.url = url
        self._retries = retries

    def generate(
        self,
        prompt: str,
        *,
        on_response: Callable[[Response], None] | None = None,
        **options: Any,
    ) -> list[Image.Image]:
        """Generates images from a prompt.

        Args:
            on_response: called with progress and previews, if `progress` or `preview_every` is set.
            options: inputs of the model by name: `seed=7`, `num_inference_steps=20`, …

        Raises:
            InputError: the request is not valid.
            ServiceError: the service could not serve it.
        """
        for response in self.stream(prompt=prompt, **options):
            if response.event == "done" and response.images is not None:
                return [Image.fromarray(image) for image in response.images]
            if on_response is not None:
                on_response(response)
        raise ServiceError(f"{self.url} ended its answer without images")

    def ask(self, images: Any, question: str, **options: Any) -> str:
        """Answers a question about images.

        Args:
            images: a path, a PIL image or `[H, W, 3]` uint8; a list of these; or None.
            options: inputs of the model by name: `max_new_tokens=64`, …

        Raises:
            InputError, ServiceError: as `generate`.
        """
        several = images if isinstance(images, (list, tuple)) else [] if images is None else [images]
        inputs = {"question": question} | ({"image": [_encoded(image) for image in several]} if several else {})
        for response in self.stream(**inputs, **options):
            if response.event == "done" and response.text is not None:
                return response.text
        raise ServiceError(f"{self.url} ended its answer without a text")

    def stream(self, **inputs: Any) -> Iterator[Response]:
        """Yields responses as they come; closing the iterator cancels the request."""
        for attempt in range(self._retries + 1):
            try:
                yield from self._stream_once(inputs)
                return
            except QueueFullError:
                if attempt == self._retries:
                    raise
                # At random, so that clients that were refused together do not come back together.
                time.sleep(FIRST_PAUSE_SECONDS * 2**attempt * random.uniform(0.5, 1.5))

    def _stream_once(self, inputs: dict[str, Any]) -> Iterator[Response]:
        responses: SimpleQueue[tuple[Any, InferenceServerException | None]] = SimpleQueue()
        client = grpc.InferenceServerClient(self.url)
        finished = False
        begun = False
        try:
            client.start_stream(lambda result, error: responses.put((result, error)))
            client.async_stream_infer(MODEL, [_tensor(name, value) for name, value in inputs.items()])
            while not finished:
                try:
                    result, error = responses.get(timeout=POLL_SECONDS)
                except Empty:  # short waits, so that Ctrl-C works
                    continue
                if error is not None:
                    finished = True
                    raise _as_error(error, self.url, begun)
                response = _response(result)
                finished = response.event == "done"
                begun = True
                yield response
        finally:
            client.stop_stream(cancel_requests=not finished)
            client.close()

    def is_alive(self, timeout: float = 10.0) -> bool:
        """Returns whether the model draws an image in time. A server's own report is not enough."""
        client = grpc.InferenceServerClient(self.url)
        try:
            if not client.is_server_live(client_timeout=timeout):
                return False
            quick = Client(self.url, retries=0)
            quick.generate("", num_inference_steps=1, guidance_scale=1.0, deadline=timeout)
            return True
        except (InferenceServerException, ServiceError):
            return False
        finally:
            client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is kept open between calls."""


def _tensor(name: str, value: Any) -> Any:
    if name not in _FIELDS:
        raise InputError(f"unknown input {name!r}; known are {', '.join(_FIELDS)}")
    field = _FIELDS[name]
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if field.dtype == "BYTES":
        values = [item.encode() if isinstance(item, str) else item for item in values]
    try:
        array = np.array(values, dtype=NUMPY_DTYPES[field.dtype])
    except (OverflowError, TypeError, ValueError) as error:
        raise InputError(f"{name} must be {field.dtype}, got {value!r}") from error
    tensor = grpc.InferInput(name, list(array.shape), field.dtype)
    tensor.set_data_from_numpy(array)
    return tensor


def _response(result: Any) -> Response:
    def value(name: str) -> Any:
        array = result.as_numpy(name)
        return None if array is None else array[0]

    images = result.as_numpy("images")
    if images is None and (files := result.as_numpy("png")) is not None:
        images = np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])
    text, index, step = value("text"), value("image_index"), value("step")
    return Response(
        event=value("event").decode(),
        image_index=None if index is None else int(index),
        step=None if step is None else int(step),
        images=images,
        text=None if text is None else text.decode(),
    )


def _as_error(error: InferenceServerException, url: str, begun: bool) -> Exception:
    """Returns the exception for an error of the service.

    A stream has no status codes, and the header that asks for them crashes server 2.51 now and then, so the model's
    messages begin with the code.
    """
    code, colon, message = one_line(Exception(error.message())).partition(": ")
    if code == INVALID or (not colon and "inference input" in code):
        return InputError(message or code)
    if code == CANCELLED:
        return CancelledError(message)
    if code == UNAVAILABLE and DRAINING in message:
        return DrainingError(f"{url}: {message}")
    if code == UNAVAILABLE and not begun:
        return QueueFullError(f"{url}: {message}")
    return ServiceError(f"{url}: {code}{colon}{message}")


def _encoded(image: Any) -> bytes:
    if isinstance(image, (str, os.PathLike)):
        try:
            return Path(image).read_bytes()
        except OSError as error:
            raise InputError(f"cannot read {image}: {error.strerror or error}") from error
    decoded = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    return png_bytes(decoded.convert("RGB"))
