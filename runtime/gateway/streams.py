"""A service's events for asyncio: whoever stops listening cancels the request."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Request

from runtime.errors import CancelledError, ServiceError
from runtime.serving.requests import AnyRequest, Event, Handle
from runtime.serving.service import Service

QUIET_SECONDS = 5.0
"""After so long without an event the service is asked whether it still works."""


@asynccontextmanager
async def events_of(service: Service, request: AnyRequest) -> AsyncIterator[AsyncIterator[Event]]:
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

    handle = service.submit(request, listen)
    ended = False

    async def events() -> AsyncIterator[Event]:
        nonlocal ended
        while not ended:
            try:
                async with asyncio.timeout(QUIET_SECONDS):
                    event = await queue.get()
            except TimeoutError:
                await asyncio.to_thread(service.check)
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
