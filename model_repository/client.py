"""A client of the model `latte_flow` over Triton's gRPC: images, answers, progress, cancellation, retries.

A request that was not accepted is sent again after a pause: the queue was full, and the service said when to try again,
or the model is being replaced. A request that was cut off is not: the caller can send it again, and the same seed gives
the same image.

Every wait ends: a request has a timeout, and while nothing comes the client asks whether the model still answers.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Self

import numpy as np
import tritonclient.grpc as grpc
from PIL import Image
from tritonclient.utils import InferenceServerException

from model_repository.connection import Connection
from model_repository.schema import CANCELLED, DEADLINE, INPUTS, INVALID, MODEL, NUMPY_DTYPES, UNAVAILABLE
from runtime.errors import (
    DRAINING,
    TRY_AGAIN,
    CancelledError,
    DeadlineError,
    DrainingError,
    InputError,
    QueueFullError,
    ServiceError,
    one_line,
)
from runtime.images import png_bytes
from runtime.serving.requests import Usage

Responses = SimpleQueue[tuple[Any, InferenceServerException | None]]
_FIELDS = {field.name: field for field in INPUTS}
RETRIES = 6
FIRST_PAUSE_SECONDS = 0.2
POLL_SECONDS = 0.1
TIMEOUT_SECONDS = 1800.0
GRACE_SECONDS = 10.0
"""A request with a deadline is waited for that much longer."""
QUIET_SECONDS = 5.0
"""After so long without a response the client asks whether the model still answers."""
PING_SECONDS = 10.0
CANCEL_SECONDS = 2.0
"""How long the service may take to end a request that was cancelled; after that its stream is cut."""
REPLACED_SECONDS = 30.0
"""How long a request waits for a model that is being replaced, before it is sent again."""
NOT_SERVING = ("Stub process", "Server is stopping")
UNLOADED = ("Request for unknown model", "Model is not ready")
"""Begin Triton's messages while a model is being replaced or restarted."""


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
    usage: Usage | None = None
    """In "done"."""


class _NotServingError(ServiceError):
    """The model is being replaced or restarted; the request was not accepted."""


class _CancelledHereError(CancelledError):
    """The caller does not want the request any more; the service does not know yet."""


class _ReplacedError(_NotServingError):
    """The server lives, but its model is unloaded: it is being replaced, or drains."""


class Client:
    """Sends requests to one server.

    Example:
        >>> with Client("localhost:8001") as client:
        ...     client.generate("a small red circle", seed=7)[0].save("circle.png")
        ...     client.ask("circle.png", "what colour is the circle?")
    """

    def __init__(
        self,
        url: str,
        retries: int = RETRIES,
        *,
        timeout: float = TIMEOUT_SECONDS,
        tls: bool = False,
        ca: str | os.PathLike[str] | None = None,
        headers: Mapping[str, str] | None = None,
        token: str | None = None,
        own: bool = False,
    ) -> None:
        """Sends nothing yet.

        Args:
            url: address of Triton's gRPC endpoint, `host:port`.
            retries: how often a request that was not accepted is sent again.
            timeout: seconds that a request without a `deadline` may take, with its retries.
            tls: connect over TLS.
            ca: file with the certificates of the authorities to trust, PEM; implies `tls`.
            headers: sent with every request.
            token: sent as a bearer token; None for the environment variable LATTE_FLOW_TOKEN.
            own: this process runs the server, so that no HTTP proxy is between them.

        Raises:
            InputError: a header cannot be sent, a token would be sent in the clear, or `ca` cannot be read.
        """
        self.url = url
        self._connection = Connection(url, tls, None if ca is None else Path(ca), headers or {}, token, own)
        self._retries = retries
        self._timeout = timeout
        self._reached = False

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
            images: a path, the content of a file, a PIL image or `[H, W, 3]` uint8; a list of these; or None.
            options: inputs of the model by name: `max_new_tokens=64`, …

        Raises:
            InputError, ServiceError: as `generate`.
        """
        several = images if isinstance(images, (list, tuple)) else [] if images is None else [images]
        inputs = {"question": question} | ({"image": [encoded(image) for image in several]} if several else {})
        for response in self.stream(**inputs, **options):
            if response.event == "done" and response.text is not None:
                return response.text
        raise ServiceError(f"{self.url} ended its answer without a text")

    def stream(self, **inputs: Any) -> Generator[Response, None, None]:
        """Yields responses as they come; closing the iterator cancels the request.

        Raises:
            InputError, ServiceError: as `generate`.
        """
        return self.responses(inputs)

    def responses(
        self, inputs: Mapping[str, Any], is_cancelled: Callable[[], bool] = lambda: False
    ) -> Generator[Response, None, None]:
        """Yields responses as `stream` does.

        Args:
            inputs: of the model, by name.
            is_cancelled: asked several times a second, also while nothing comes; once it is true, the request is
                cancelled and `CancelledError` raised.
        """
        deadline = inputs.get("deadline")
        seconds = self._timeout if deadline is None else float(deadline) + GRACE_SECONDS
        give_up = time.monotonic() + seconds
        for attempt in range(self._retries + 1):
            try:
                yield from self._stream_once(inputs, give_up, is_cancelled=is_cancelled)
                return
            except (QueueFullError, DrainingError, _NotServingError) as error:
                # At random, so that clients that were refused together do not come back together.
                pause = FIRST_PAUSE_SECONDS * 2**attempt * random.uniform(0.5, 1.5)
                if isinstance(error, QueueFullError):
                    pause += error.retry_after
                if attempt == self._retries or time.monotonic() + pause > give_up:
                    raise
                time.sleep(pause)
                if isinstance(error, _NotServingError):
                    self._wait_until_ready(give_up)

    def _stream_once(
        self,
        inputs: Mapping[str, Any],
        give_up: float,
        *,
        watch: bool = True,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> Iterator[Response]:
        """Sends a request once.

        Args:
            give_up: the time on the monotonic clock at which to stop waiting.
            watch: ask whether the model still answers while nothing comes.
        """
        responses: Responses = SimpleQueue()
        tensors = [input_tensor(name, value) for name, value in inputs.items()]
        client = self._connection.open()
        finished = False
        begun = False
        request_id = uuid.uuid4().hex
        last_sign = time.monotonic()
        try:
            client.start_stream(
                lambda result, error: responses.put((result, error)),
                stream_timeout=max(give_up - time.monotonic(), 0.0) + POLL_SECONDS,
                headers=dict(self._connection.headers),
            )
            with contextlib.suppress(InferenceServerException):  # a stream that broke at once: the callback is told why
                client.async_stream_infer(MODEL, tensors, request_id=request_id)
            while not finished:
                if is_cancelled():
                    raise _CancelledHereError("the request was cancelled")
                try:
                    result, error = responses.get(timeout=POLL_SECONDS)  # short waits, so that Ctrl-C works
                except Empty:
                    now = time.monotonic()
                    if now > give_up:
                        raise ServiceError(f"{self.url} did not finish the request in time") from None
                    if watch and now - last_sign > QUIET_SECONDS:
                        self._ping(min(PING_SECONDS, give_up - now))
                        last_sign = time.monotonic()
                    continue
                last_sign = time.monotonic()
                if error is not None:
                    finished = True
                    raise self._as_error(error, begun)
                response = _response(result)
                finished = response.event == "done"
                begun = self._reached = True
                yield response
        except (GeneratorExit, KeyboardInterrupt, _CancelledHereError):
            if not finished:
                own = {"client_id": inputs["client_id"]} if "client_id" in inputs else {}
                finished = _cancel(client, responses, {"cancel": request_id} | own)
            raise
        finally:
            client.stop_stream(cancel_requests=not finished)
            client.close()

    def _wait_until_ready(self, give_up: float) -> None:
        """Waits a while for a model that is being replaced or restarted."""
        give_up = min(give_up, time.monotonic() + REPLACED_SECONDS)
        while time.monotonic() < give_up and not self._is_ready(PING_SECONDS):
            time.sleep(POLL_SECONDS)

    def _is_ready(self, timeout: float) -> bool:
        """Returns whether the server calls the model ready; streams that come before it is can end server 2.51."""
        client = self._connection.open()
        try:
            headers = dict(self._connection.headers)
            return bool(client.is_model_ready(MODEL, headers=headers, client_timeout=max(timeout, 0.001)))
        except InferenceServerException:
            return False
        finally:
            client.close()

    def _ping(self, seconds: float) -> None:
        """Checks that the model's process answers and its engines move.

        Raises:
            ServiceError: they do not.
        """
        try:
            self.describe(seconds)
        except (DrainingError, QueueFullError, _ReplacedError):
            return  # the server lives, and finishes what it has taken
        except ServiceError as error:
            raise ServiceError(f"{self.url} does not answer any more, and the request is lost: {error}") from error

    def describe(self, timeout: float = PING_SECONDS) -> dict[str, Any]:
        """Returns what the service says of itself: its queue, its model and its limits.

        Raises:
            ServiceError: it does not answer.
        """
        for response in self._stream_once({"heartbeat": True}, time.monotonic() + timeout, watch=False):
            if response.text is not None:
                return dict(json.loads(response.text))
        raise ServiceError(f"{self.url} does not say what it serves")

    def answers(self, timeout: float = PING_SECONDS) -> bool:
        """Returns whether the model's process answers within so many seconds. It takes no place in the queue."""
        try:
            self._ping(timeout)
        except ServiceError:
            return False
        return True

    def is_alive(self, timeout: float = 10.0) -> bool:
        """Returns whether the model draws an image within so many seconds. A server's own report is not enough.

        A full queue counts as alive.
        """
        give_up = time.monotonic() + timeout
        cheapest = {"num_inference_steps": 1, "guidance_scale": 1.0}
        try:
            if not self._is_ready(timeout):
                return False
            try:
                self._draw_once(cheapest, give_up)
            except InputError:  # distilled weights cannot do that; their own number of steps is small
                self._draw_once({}, give_up)
        except QueueFullError:
            return True
        except (ServiceError, InputError):
            return False
        return True

    def _draw_once(self, inputs: Mapping[str, Any], give_up: float) -> None:
        whole = {"prompt": "", "deadline": max(0.0, give_up - time.monotonic()), **inputs}
        for _ in self._stream_once(whole, give_up, watch=False):
            pass

    def _as_error(self, error: InferenceServerException, begun: bool) -> Exception:
        """Returns the exception for an error of the service.

        A stream has no status codes, and the header that asks for them crashes server 2.51 now and then, so the model's
        messages begin with the code.
        """
        status, whole = str(error.status()), one_line(Exception(error.message()))
        if status.startswith("StatusCode."):  # of gRPC itself, or of a proxy
            unreachable = status.endswith(".UNAVAILABLE") and "failed to connect" in whole
            if status.endswith(".DEADLINE_EXCEEDED"):
                return ServiceError(f"{self.url} did not finish the request in time")
            kind = _NotServingError if unreachable and self._reached and not begun else ServiceError
            return kind(f"{self.url}: {status.removeprefix('StatusCode.')}: {whole}")
        self._reached = True
        code, colon, message = whole.partition(": ")
        if code == INVALID or (not colon and "inference input" in code):
            return InputError(message or code)
        if code == DEADLINE:
            return DeadlineError(message)
        if code == CANCELLED:
            return CancelledError(message)
        if code == UNAVAILABLE and DRAINING in message and not begun:
            return DrainingError(f"{self.url}: {message}")
        if code == UNAVAILABLE and TRY_AGAIN in message and not begun:
            return QueueFullError(f"{self.url}: {message}")
        if whole.startswith(UNLOADED) and not begun:
            return _ReplacedError(f"{self.url}: {whole}")
        kind = _NotServingError if whole.startswith(NOT_SERVING) and not begun else ServiceError
        return kind(f"{self.url}: {whole}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is kept open between calls."""


def _cancel(client: grpc.InferenceServerClient, responses: Responses, inputs: Mapping[str, Any]) -> bool:
    """Cancels a request by another one on the same stream; returns whether the service has ended both.

    Server 2.51 now and then ends, or never unloads the model, when a stream is cut while its last response is sent.
    """
    give_up = time.monotonic() + CANCEL_SECONDS
    with contextlib.suppress(InferenceServerException, Empty):
        client.async_stream_infer(MODEL, [input_tensor(name, value) for name, value in inputs.items()])
        ends = 0
        while ends < 2:
            result, error = responses.get(timeout=max(give_up - time.monotonic(), 0.0))
            if error is not None and str(error.status()).startswith("StatusCode."):
                return False  # the stream broke
            ends += error is not None or result.as_numpy("event")[0] == b"done"
        return True
    return False


def input_tensor(name: str, value: Any) -> Any:
    """Returns an input of the model as the client library sends it.

    Raises:
        InputError: there is no such input, or the value does not fit it.
    """
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
    text, index, step, reason = value("text"), value("image_index"), value("step"), value("finish_reason")
    tokens = [value(name) for name in ("input_tokens", "output_tokens")]
    usage = None if reason is None else Usage(int(tokens[0]), int(tokens[1]), reason == b"length")
    return Response(
        event=value("event").decode(),
        image_index=None if index is None else int(index),
        step=None if step is None else int(step),
        images=images,
        text=None if text is None else text.decode(),
        usage=usage,
    )


def encoded(image: Any) -> bytes:
    """Returns an image as a file: the content of one is that already; what is at a path; or else a PNG."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, (str, os.PathLike)):
        try:
            return Path(image).read_bytes()
        except OSError as error:
            raise InputError(f"cannot read {image}: {error.strerror or error}") from error
    decoded = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    return png_bytes(decoded.convert("RGB"))
