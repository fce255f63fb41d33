"""What every HTTP request passes: its id, its key, the limits of its body, metrics and the access log.

A plain ASGI middleware, because a request that is refused here costs nothing more, and a stream is passed on untouched.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from runtime.gateway.errors import CLIENT_CLOSED, ApiError
from runtime.gateway.keys import KeyRing
from runtime.gateway.metrics import Gauges

API_PATH = "/v1"
"""Bodies of the API are JSON; a page that is beside it has uploads."""
OPEN_PATHS = ("/health", "/ready", "/metrics", "/docs", "/static-offline-docs/", "/openapi.json", "/v1/images/results/")
"""Paths that need no key. The names of results cannot be guessed."""
REQUEST_ID = "x-request-id"
_PLAIN_ID = re.compile(r"[\w.:@/+-]{1,128}", re.ASCII)
_LOG = logging.getLogger("latte_flow")
Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Door:
    """The middleware, outside of everything else."""

    def __init__(self, app: App, *, keys: KeyRing, gauges: Gauges, access_log: bool, max_body_bytes: int) -> None:
        self._app, self._keys, self._gauges = app, keys, gauges
        self._access_log, self._max_body_bytes = access_log, max_body_bytes
        self.leaving = asyncio.Event()
        """Set when the server ends: streams of a page, which have no end, are left, and requests to the API finish."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get(REQUEST_ID, "")
        request_id = given if _PLAIN_ID.fullmatch(given) else secrets.token_hex(8)
        state = scope.setdefault("state", {})
        state["request_id"], state["key"] = request_id, None
        begun, status = CLIENT_CLOSED, CLIENT_CLOSED

        async def answer(message: Message) -> None:
            nonlocal begun, status
            if message["type"] == "http.response.start":
                begun = message["status"]
                message["headers"] = [*message.get("headers", []), (REQUEST_ID.encode(), request_id.encode())]
            elif not message.get("more_body", False):
                status = begun  # a stream that does not come to its end was left
            await send(message)

        started = time.monotonic()
        self._gauges.open.inc()
        try:
            refusal = self._refusal(scope, headers, state)
            if refusal is not None:
                await JSONResponse(refusal.body, refusal.status, refusal.headers)(scope, receive, answer)
            else:
                own = receive if scope["path"].startswith(API_PATH) else self._until_leaving(receive)
                await self._app(scope, own, answer)
        finally:
            self._gauges.open.dec()
            self._count(scope, status, time.monotonic() - started, request_id, state["key"])

    def _until_leaving(self, receive: Receive) -> Receive:
        """Returns a `receive` to which the client disconnects as soon as the server ends."""

        async def receive_or_leave() -> Message:
            tasks = {asyncio.ensure_future(receive()), asyncio.ensure_future(self.leaving.wait())}
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
            messages = [task.result() for task in done]
            return next((message for message in messages if isinstance(message, dict)), {"type": "http.disconnect"})

        return receive_or_leave

    def _refusal(self, scope: Scope, headers: Headers, state: dict[str, Any]) -> ApiError | None:
        path = scope["path"]
        is_preflight = scope["method"] == "OPTIONS"  # a browser asks so whether it may send a key
        if not self._keys.is_empty and not path.startswith(OPEN_PATHS) and not is_preflight:
            scheme, _, token = headers.get("authorization", "").partition(" ")
            state["key"] = self._keys.find(token.strip()) if scheme.lower() == "bearer" else None
            if state["key"] is None:
                message = "send a valid API key: Authorization: Bearer KEY"
                return ApiError(401, message, "invalid_api_key")
        if scope["method"] == "POST":
            length = headers.get("content-length", "")
            if length.isdecimal() and int(length) > self._max_body_bytes:
                message = f"the body has {length} bytes, the limit is {self._max_body_bytes}; send smaller images"
                return ApiError(413, message, "request_too_large")
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if path.startswith(API_PATH) and kind != "application/json":
                return ApiError(
                    415,
                    f"the body must be JSON with Content-Type: application/json, got {kind or 'none'}",
                    "unsupported_media_type",
                )
        return None

    def _count(self, scope: Scope, status: int, seconds: float, request_id: str, key: Any) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self._gauges.requests.labels(route, str(status)).inc()
        self._gauges.seconds.labels(route).observe(seconds)
        if self._access_log:
            fields = {
                "event": "http",
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "seconds": round(seconds, 4),
                "request_id": request_id,
            } | ({} if key is None else {"key": key.name})
            text = " ".join(f"{name}={value}" for name, value in fields.items() if name != "event")
            _LOG.info("http %s", text, extra={"fields": fields})
