"""A service's events for asyncio: whoever stops listening cancels the request; and server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Request

from runtime.errors import CancelledError, ServiceError
from runtime.serving.requests import AnyRequest, Event, Handle
from runtime.serving.service import Service

QUIET_SECONDS = 5.0
"""After so long without an event the service is asked whether it still works."""
COMMENT_SECONDS = 15.0
"""After so long without an event a stream sends a comment, so that no proxy takes it for dead."""
COMMENT = b": waiting\n\n"


class Pulse:
    """A service, and whether it still works: asked once for all streams that wait."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._lock = asyncio.Lock()
        self._asked = -math.inf
        self._error: Exception | None = None

    async def check(self) -> None:
        """Raises `ServiceError` unless the service works, or did `QUIET_SECONDS` ago at most."""
        async with self._lock:
            if time.monotonic() - self._asked >= QUIET_SECONDS:
                self._error = None
                try:
                    await asyncio.to_thread(self.service.check)
                except Exception as error:
                    self._error = error
                self._asked = time.monotonic()
        if self._error is not None:
            raise self._error


@asynccontextmanager
async def events_of(pulse: Pulse, request: AnyRequest) -> AsyncIterator[AsyncIterator[Event]]:
    """Submits a request and yields its events. Leaving the block cancels the request.

    "progress" is left out, and "failed" is raised.

    Raises:
        LatteFlowError: the request was refused, failed, or the service broke down.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[Event] = asyncio.Queue()

    def listen(handle: Handle, event: Event) -> None:
        if event.kind == "progress":
            return
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody listens
            loop.call_soon_threadsafe(queue.put_nowait, event)

    handle = pulse.service.submit(request, listen)
    ended = False

    async def events() -> AsyncIterator[Event]:
        nonlocal ended
        while not ended:
            try:
                async with asyncio.timeout(QUIET_SECONDS):
                    event = await queue.get()
            except TimeoutError:
                await pulse.check()
                continue
            ended = event.kind in ("done", "failed")
            if event.kind == "failed":
                raise event.error or ServiceError("the request failed without a reason")
            yield event

    try:
        yield events()
    finally:
        if not ended:
            handle.cancel()


@asynccontextmanager
async def cancelled_by_disconnect(request: Request) -> AsyncIterator[None]:
    """Ends the block with `CancelledError` when the client closes the connection.

    For answers that are sent at their end, and until the first event of a stream: then its response notices by itself.
    """
    task = asyncio.current_task()
    assert task is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if not gone:
            raise
        task.uncancel()
        raise CancelledError("the client closed the connection") from None
    finally:
        watcher.cancel()


SseEvent = tuple[str | None, dict[str, Any]]
"""Name, which may be missing, and data of a server-sent event."""


async def first_or_late(request: Request, coming: asyncio.Future[SseEvent]) -> None:
    """Waits for the first event of a stream, but not for ever; what fails until then is raised.

    Raises:
        CancelledError: the client closed the connection.
    """
    try:
        async with cancelled_by_disconnect(request):
            await asyncio.wait({coming}, timeout=COMMENT_SECONDS)
    except BaseException:
        coming.cancel()
        raise
    if coming.done():
        coming.result()


async def sse_lines(
    events: AsyncGenerator[SseEvent],
    coming: asyncio.Future[SseEvent],
    describe: Callable[[Exception], SseEvent],
    done: str | None,
) -> AsyncIterator[bytes]:
    """Yields server-sent events as bytes, and comments while there are none.

    Args:
        coming: the next of the events.
        describe: makes the last event of an error.
        done: the data of a last event that is not JSON.
    """
    try:
        while True:
            if not (await asyncio.wait({coming}, timeout=COMMENT_SECONDS))[0]:
                yield COMMENT
                continue
            try:
                event = coming.result()
            except StopAsyncIteration:
                break
            except Exception as error:
                yield sse(*describe(error))
                return
            coming = asyncio.ensure_future(anext(events))
            yield sse(*event)
        if done is not None:
            yield f"data: {done}\n\n".encode()
    finally:
        coming.cancel()
        with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration, Exception):
            await coming
        await events.aclose()


def sse(name: str | None, data: dict[str, Any]) -> bytes:
    """Returns a server-sent event."""
    event = f"event: {name}\n" if name else ""
    return f"{event}data: {json.dumps(data, separators=(',', ':'))}\n\n".encode()
