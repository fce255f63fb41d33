"""The gateway: OpenAI's HTTP API over a service. `make_app` returns it for any ASGI server."""

from __future__ import annotations

import asyncio
import base64
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakValueDictionary

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from runtime.errors import DRAINING, InputError, ServiceError, line_of, one_line
from runtime.gateway import chat, images
from runtime.gateway.door import REQUEST_ID, Door
from runtime.gateway.drawing import draw, stream
from runtime.gateway.errors import ApiError, api_error, with_field
from runtime.gateway.fetching import read_url
from runtime.gateway.keys import ApiKey, KeyRing
from runtime.gateway.metrics import Gauges
from runtime.gateway.schema import ChatBody, ImagesBody, field_place
from runtime.gateway.store import BoundedStore, key_of, new_name
from runtime.gateway.streams import Pulse, SseEvent, cancelled_by_disconnect, events_of, first_or_late, sse_lines
from runtime.images import check_number
from runtime.serving.requests import GenerationRequest
from runtime.serving.service import Service

MAX_BODY_BYTES = 64 << 20
NO_BUFFERING = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Headers of streams; nginx would collect their events otherwise."""
RESULT_CACHE = "x-result-cache"
NOT_OF_THE_IMAGE = {"user", "safety_identifier", "priority", "deadline", "response_format", "model"}
"""Fields on which an image does not depend."""
_LOG = logging.getLogger("latte_flow")


@dataclass(frozen=True)
class GatewaySettings:
    """How a gateway is set up."""

    keys: KeyRing = field(default_factory=lambda: KeyRing([]))
    allowed_image_hosts: frozenset[str] = frozenset()
    """Hosts from which images in messages are fetched."""
    allowed_origins: frozenset[str] = frozenset()
    """Origins of pages that may ask from a browser (CORS)."""
    access_log: bool = False
    result_cache_bytes: int = 0
    """Size of the cache of answers to equal requests; 0 for none."""
    store_bytes: int = 256 << 20
    """Size of the store of images that were asked for by URL."""
    store_seconds: float = 3600.0
    """How long these can be fetched."""
    max_body_bytes: int = MAX_BODY_BYTES


class Gateway:
    """The routes of one service."""

    def __init__(
        self, service: Service, settings: GatewaySettings | None = None, report: Callable[[], None] = lambda: None
    ) -> None:
        """Sends nothing yet.

        Args:
            report: called before metrics are read; updates those in `gauges.registry`.
        """
        self.service = service
        self.pulse = Pulse(service)
        self.settings = settings or GatewaySettings()
        self.gauges = Gauges()
        self.report = report
        self.draining = False
        self.created = int(time.time())
        self._files: BoundedStore[tuple[bytes, str]] = BoundedStore(
            self.settings.store_bytes, self.settings.store_seconds
        )
        self._results: BoundedStore[dict[str, Any]] = BoundedStore(self.settings.result_cache_bytes)
        self._drawing: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        """The locks of what is being drawn for the cache."""

    async def generate_images(self, body: ImagesBody, request: Request) -> Response:
        """Draws images from a prompt."""
        self._check_open(body.model)
        key = request.state.key
        drawing = images.generation_request(
            body, body.prompt, self.service.model, self._client_id(key, body), request.state.request_id, body.n
        )
        if body.stream:
            return await self._streamed(request, self._image_events(body, drawing, key))
        place = self._place(body, request, key)
        async with cancelled_by_disconnect(request):
            if place is None:
                result, headers = await self._drawn(body, drawing, key), {}
            else:
                # An equal request that comes while the first is drawn waits for it, and is not drawn again.
                async with self._drawing.setdefault(place, asyncio.Lock()):
                    known, headers = self._results.get(place), {RESULT_CACHE: "hit"}
                    if known is None:
                        known, headers = await self._drawn(body, drawing, key), {RESULT_CACHE: "miss"}
                        self._results.put(place, known, sum(len(item["b64_json"]) for item in known["data"]))
                result = known
        return JSONResponse(self._fresh(result, body, request), headers=headers)

    async def _drawn(self, body: ImagesBody, drawing: GenerationRequest, key: ApiKey | None) -> dict[str, Any]:
        """Draws, and returns the result with files."""
        with self.settings.keys.quota(key, "draw", body.n):
            drawn = await draw(self.pulse, drawing, body)
        items = [{"b64_json": images.base64_text(file)} for file in drawn.files]
        return images.response_body(body, self.service.model, drawing.seed, items, drawn.usage)

    def _fresh(self, result: dict[str, Any], body: ImagesBody, request: Request) -> dict[str, Any]:
        """Returns a result with URLs instead of files, if the request asks for them."""
        if body.response_format == "b64_json":
            return result
        data = []
        for item in result["data"]:
            file = base64.b64decode(item["b64_json"])
            name = f"{new_name()}.{body.output_format}"
            self._files.put(name, (file, images.MEDIA_TYPES[body.output_format]), len(file))
            data.append({"url": str(request.url_for("result", name=name)), "seed": item["seed"]})
        return result | {"data": data}

    def _place(self, body: ImagesBody, request: Request, key: ApiKey | None) -> str | None:
        """Returns where the answer to a request is kept, or None if it is not.

        Equal requests with a seed have equal answers; with an Idempotency-Key, equal requests of one client.
        """
        if not self.settings.result_cache_bytes:
            return None
        fields = body.model_dump(mode="json", exclude=NOT_OF_THE_IMAGE)
        if (given := request.headers.get("idempotency-key")) is not None:
            return key_of(None if key is None else key.name, given, fields)
        return None if body.seed is None else key_of(fields)

    async def _image_events(
        self, body: ImagesBody, drawing: GenerationRequest, key: ApiKey | None
    ) -> AsyncGenerator[SseEvent]:
        every = images.preview_every(drawing.num_inference_steps, body.partial_images)
        request = replace(drawing, preview_every=every)
        with self.settings.keys.quota(key, "draw", 1):
            async for file, index, usage in stream(self.pulse, request, body, body.partial_images):
                event = images.event_body(body, self.service.model, drawing.seed, file, index, usage)
                yield event["type"], event

    async def complete_chat(self, body: ChatBody, request: Request) -> Response:
        """Answers a conversation, or draws what its last message says."""
        self._check_open(body.model)
        return await (self._draw_in_chat if body.draws else self._answer)(body, request)

    async def _answer(self, body: ChatBody, request: Request) -> Response:
        key = request.state.key
        urls = chat.image_urls(body.messages)
        check_number(len(urls))
        with self.settings.keys.quota(key, "ask", 1):
            async with cancelled_by_disconnect(request):
                files = [await read_url(url, self.settings.allowed_image_hosts) for url in urls]
        conversation = await asyncio.to_thread(chat.conversation_of, body.messages, files)
        asking = chat.answer_request(body, conversation, self._client_id(key, body), request.state.request_id)
        completion = chat.Completion(self.service.model.name, reports_usage=body.stream_options.include_usage)

        async def chunks() -> AsyncGenerator[SseEvent]:
            with self.settings.keys.quota(key, "ask", 1):
                async with events_of(self.pulse, asking) as events:
                    yield None, completion.chunk({"role": "assistant", "content": ""})
                    async for event in events:
                        if event.kind == "text":
                            yield None, completion.chunk({"content": event.text})
                        elif event.usage is not None:
                            yield None, completion.chunk({}, chat.finish_reason(event.usage))
                            if body.stream_options.include_usage:
                                yield None, completion.usage_chunk(event.usage)

        if body.stream:
            return await self._streamed(request, chunks(), done="[DONE]")
        texts, usage = [], None
        with self.settings.keys.quota(key, "ask", 1):
            async with cancelled_by_disconnect(request), events_of(self.pulse, asking) as events:
                async for event in events:
                    texts.append(event.text)
                    usage = event.usage or usage
        if usage is None:
            raise ServiceError("an answer ended without its usage")
        return JSONResponse(completion.body({"content": "".join(texts)}, usage))

    async def _draw_in_chat(self, body: ChatBody, request: Request) -> Response:
        key = request.state.key
        drawing = images.generation_request(
            body,
            chat.prompt_of(body.messages),
            self.service.model,
            self._client_id(key, body),
            request.state.request_id,
        )
        completion = chat.Completion(self.service.model.name, reports_usage=body.stream_options.include_usage)

        async def chunks() -> AsyncGenerator[SseEvent]:
            with self.settings.keys.quota(key, "draw", 1):
                drawn = await draw(self.pulse, drawing, body)
            message = chat.drawn_message([images.data_uri(file, body.output_format) for file in drawn.files])
            yield None, completion.chunk({"role": "assistant"} | message)
            yield None, completion.chunk({}, "stop")
            if body.stream_options.include_usage:
                yield None, completion.usage_chunk(drawn.usage)

        if body.stream:
            return await self._streamed(request, chunks(), done="[DONE]")
        with self.settings.keys.quota(key, "draw", 1):
            async with cancelled_by_disconnect(request):
                drawn = await draw(self.pulse, drawing, body)
        uris = [images.data_uri(file, body.output_format) for file in drawn.files]
        return JSONResponse(completion.body(chat.drawn_message(uris), drawn.usage))

    async def _streamed(self, request: Request, events: AsyncGenerator[SseEvent], done: str | None = None) -> Response:
        """Returns a stream of events; what fails soon and before the first is an error with a status of its own."""
        coming = asyncio.ensure_future(anext(events))
        await first_or_late(request, coming)
        name = None if done is not None else "error"

        def describe(error: Exception) -> SseEvent:
            return name, _logged(error).body

        lines = sse_lines(events, coming, describe, done)
        return StreamingResponse(lines, media_type="text/event-stream", headers=NO_BUFFERING)

    def _check_open(self, model: str | None) -> None:
        """Raises `ApiError` unless new requests are taken, and the model they name is served here."""
        if self.draining:
            raise ApiError(503, f"{DRAINING} and takes no new requests", "shutting_down", retry_after=5)
        self._check_model(model)

    def _check_model(self, name: str | None) -> None:
        """Raises `ApiError` unless the model is served here; no name is the one that is."""
        served = self.service.model.name
        if name not in (None, "", served):
            raise ApiError(404, f"the model {name!r} is not served here; use {served!r}", "model_not_found", "model")

    def _client_id(self, key: ApiKey | None, body: ImagesBody | ChatBody) -> str:
        return body.user or body.safety_identifier if key is None else key.name

    async def result(self, name: str) -> Response:
        """Returns an image that was asked for by URL."""
        found = self._files.get(name)
        if found is None:
            raise ApiError(404, "there is no such image, or it has expired", "not_found")
        return Response(found[0], media_type=found[1])

    async def models(self) -> dict[str, Any]:
        """Lists the model."""
        return {"object": "list", "data": [self._model()]}

    async def one_model(self, name: str) -> dict[str, Any]:
        """Describes the model."""
        if not name:
            return await self.models()
        self._check_model(name)
        return self._model()

    def _model(self) -> dict[str, Any]:
        model = self.service.model
        return {"id": model.name, "object": "model", "created": self.created, "owned_by": "latte-flow"}

    async def health(self) -> dict[str, str]:
        """Says whether the service works, without taking a place in the queue. For a liveness probe."""
        await asyncio.to_thread(self.service.check)
        return {"status": "ok"}

    async def ready(self) -> dict[str, str]:
        """Says whether new requests are taken. For a readiness probe."""
        self._check_open(None)
        return await self.health()

    async def metrics(self) -> Response:
        """Returns metrics in Prometheus' text format."""
        self.report()
        return Response(self.gauges.text(), media_type="text/plain; version=0.0.4")


def make_app(
    gateway: Gateway,
    on_shutdown: Callable[[], None] = lambda: None,
    extend: Callable[[FastAPI], FastAPI] = lambda app: app,
) -> Door:
    """Returns the ASGI application of a gateway.

    Args:
        on_shutdown: called after the last request.
        extend: adds routes that are not of the API; those of the API go before them.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(on_shutdown)

    settings = gateway.settings
    app = FastAPIOffline(
        title="LaTtE-Flow gateway",
        version="1",
        lifespan=lifespan,
        redoc_url=None,
        max_body_size=settings.max_body_bytes,
    )
    routes: list[tuple[str, str, Callable[..., Any]]] = [
        ("POST", "/v1/images/generations", gateway.generate_images),
        ("POST", "/v1/chat/completions", gateway.complete_chat),
        ("GET", "/v1/images/results/{name}", gateway.result),
        ("GET", "/v1/models", gateway.models),
        ("GET", "/v1/models/{name:path}", gateway.one_model),
        ("GET", "/health", gateway.health),
        ("GET", "/ready", gateway.ready),
        ("GET", "/metrics", gateway.metrics),
    ]
    for method, path, endpoint in routes:
        app.add_api_route(path, endpoint, methods=[method], name=endpoint.__name__, response_model=None)
    for path, endpoint in (("/health", gateway.health), ("/ready", gateway.ready)):  # some probes and proxies ask so
        app.add_api_route(path, endpoint, methods=["HEAD"], response_model=None, include_in_schema=False)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=sorted(settings.allowed_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[REQUEST_ID, RESULT_CACHE],
        )
    app.add_exception_handler(RequestValidationError, _on_invalid_body)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_error)
    for kind in (ApiError, InputError, ServiceError):
        app.add_exception_handler(kind, _on_error)
    return Door(
        extend(app),
        keys=settings.keys,
        gauges=gateway.gauges,
        access_log=settings.access_log,
        max_body_bytes=settings.max_body_bytes,
    )


async def _on_error(request: Request, error: Exception) -> Response:
    failure = _logged(error)
    return JSONResponse(failure.body, failure.status, failure.headers)


_FRAMEWORK_ERRORS = {
    400: ("the body cannot be read as JSON in UTF-8", "invalid_json"),
    404: ("there is nothing at this path; /docs describes the API", "not_found"),
    405: ("this path takes another method; /docs describes the API", "method_not_allowed"),
    413: ("the body is larger than the limit; send smaller images", "request_too_large"),
}
"""What a client reads instead of the framework's word or two."""


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    status = error.status_code
    failure = ApiError(status, *_FRAMEWORK_ERRORS.get(status, (str(error.detail), f"http_{status}")))
    return JSONResponse(failure.body, status, error.headers)


async def _on_invalid_body(request: Request, error: Exception) -> Response:
    """A body that is not JSON is 400; one that does not fit is 422 and names the field."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        failure = ApiError(400, f"the body is not JSON: {first.get('ctx', {}).get('error', 'broken')}", "invalid_json")
    else:
        named = field_place(first["loc"][1:])
        place = ".".join(str(part) for part in named)
        failure = ApiError(422, line_of({**first, "loc": named}, "the body"), first["type"], place or None)
    return JSONResponse(failure.body, failure.status)


def _logged(error: Exception) -> ApiError:
    failure = with_field(api_error(error))
    if failure.status == 500:
        _LOG.error("a request failed: %s", one_line(error), exc_info=error)
    return failure
