"""A small client of the model `latte_flow` over Triton's gRPC: pictures, answers, progress, cancel, retries.

A request that the service had no place for is sent again after a pause. One that was cut off is not:
whoever wants that can send it again with the same seed and gets the same picture.
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
from runtime.errors import CancelledError, InputError, ServiceError, one_line
from runtime.pictures import png_bytes

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
    """Talks to one server.

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
        """Pictures of a prompt.

        Args:
            on_response: sees progress and previews, if `progress` or `preview_every` asks for them.
            options: inputs of the model by name: `seed=7`, `num_inference_steps=20`, …

        Raises:
            InputError: the service refuses the request.
            ServiceError: it could not be served.
        """
        for response in self.stream(prompt=prompt, **options):
            if response.event == "done" and response.images is not None:
                return [Image.fromarray(image) for image in response.images]
            if on_response is not None:
                on_response(response)
        raise ServiceError(f"{self.url} ended its answer without pictures")

    def ask(self, images: Any, question: str, **options: Any) -> str:
        """The answer to a question about pictures: paths, PIL images or `[H, W, 3]` uint8, one or a list.

        Raises:
            InputError, ServiceError: as `generate`.
        """
        pictures = images if isinstance(images, (list, tuple)) else [] if images is None else [images]
        inputs = {"question": question} | ({"image": [_encoded(picture) for picture in pictures]} if pictures else {})
        for response in self.stream(**inputs, **options):
            if response.event == "done" and response.text is not None:
                return response.text
        raise ServiceError(f"{self.url} ended its answer without a text")

    def stream(self, **inputs: Any) -> Iterator[Response]:
        """Responses as they come; closing the iterator cancels the request."""
        for attempt in range(self._retries + 1):
            try:
                yield from self._stream_once(inputs)
                return
            except _NoPlace as error:
                if attempt == self._retries:
                    raise ServiceError(str(error)) from error
                # Apart from each other, so that clients refused together do not come back together.
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
                except Empty:  # short waits, so that Ctrl-C is heard
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
        """Whether the model draws a picture in time; a server's own word for it is not enough."""
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


class _NoPlace(Exception):
    """The service had no place now."""


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
    """The exception for an error of the service.

    A stream tells no status code, and the header that asks for one crashes server 2.51 now and then, so
    the model's messages begin with the code.
    """
    code, colon, message = one_line(Exception(error.message())).partition(": ")
    if code == INVALID or (not colon and "inference input" in code):
        return InputError(message or code)
    if code == CANCELLED:
        return CancelledError(message)
    if code == UNAVAILABLE and not begun:
        return _NoPlace(f"{url}: {message}")
    return ServiceError(f"{url}: {code}{colon}{message}")


def _encoded(picture: Any) -> bytes:
    if isinstance(picture, (str, os.PathLike)):
        try:
            return Path(picture).read_bytes()
        except OSError as error:
            raise InputError(f"cannot read {picture}: {error.strerror or error}") from error
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    return png_bytes(image.convert("RGB"))
