"""Images of a service for asyncio, encoded while others are drawn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from runtime.gateway.images import encode
from runtime.gateway.schema import DrawingOptions
from runtime.gateway.streams import Pulse, events_of
from runtime.serving.requests import GenerationRequest, Usage


@dataclass(frozen=True)
class Drawn:
    """The images of a request, as files."""

    files: list[bytes]
    usage: Usage


async def draw(pulse: Pulse, request: GenerationRequest, options: DrawingOptions) -> Drawn:
    """Draws all images of a request; each is encoded as soon as it is drawn."""
    files: dict[int, asyncio.Task[bytes]] = {}
    usage = Usage(0, 0)
    async with events_of(pulse, request) as events:
        async for event in events:
            if event.kind == "image" and event.pixels is not None:
                files[event.image] = asyncio.create_task(asyncio.to_thread(encode, event.pixels, options))
            usage = event.usage or usage
    return Drawn([await files[index] for index in sorted(files)], usage)


async def stream(
    pulse: Pulse, request: GenerationRequest, options: DrawingOptions, partial_images: int
) -> AsyncGenerator[tuple[bytes, int | None, Usage | None]]:
    """Yields partial images with their index, then the image with its usage."""
    sent = 0
    final = b""
    async with events_of(pulse, request) as events:
        async for event in events:
            if event.kind == "preview" and event.pixels is not None and sent < partial_images:
                yield await asyncio.to_thread(encode, event.pixels, options), sent, None
                sent += 1
            elif event.kind == "image" and event.pixels is not None:
                final = await asyncio.to_thread(encode, event.pixels, options)
            elif event.kind == "done":
                yield final, None, event.usage or Usage(0, 0)
