"""Many streams of images open at once: is one lost, how long are they silent, and what memory do they take?"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass

import numpy as np

from export.benchmarks.gateway_server import GatewayProcess
from export.benchmarks.open_requests import STEPS
from export.benchmarks.report import resident_megabytes
from runtime.console import stdout

BODY = {"stream": True, "partial_images": 1, "num_inference_steps": STEPS}
QUIET_SECONDS = 600.0
"""A stream on which nothing comes for so long is lost."""
WATCH_SECONDS = 0.5
LONGEST_EVENT = 64 << 20


@dataclass(frozen=True)
class StreamsResult:
    """What became of streams that were opened together."""

    streams: int
    lost: int
    """Streams that ended without their image."""
    reasons: list[str]
    """Why, each once."""
    open_at_once: int
    """Most requests in flight by the gateway's own metric."""
    first_event_seconds: dict[str, float]
    """From the request to the partial image: p50, p95, and the longest."""
    seconds: float
    """Until the last image."""
    idle_mb: float | None
    """Resident memory of the gateway before, and the most while streams were open."""
    most_mb: float | None

    def show(self) -> None:
        """Prints the result."""
        first = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.first_event_seconds.items())
        stdout.print(f"{self.streams} streams: {self.open_at_once} open at once, {self.lost} lost", highlight=False)
        for reason in self.reasons:
            stdout.print(f"  lost: {reason}", highlight=False, markup=False)
        stdout.print(f"first event: {first}; last image after {self.seconds:.1f} s", highlight=False)
        if self.idle_mb is not None and self.most_mb is not None:
            each = 1000 * (self.most_mb - self.idle_mb) / self.streams
            stdout.print(
                f"memory of the gateway: {self.idle_mb:.0f} MB before, at most {self.most_mb:.0f} MB, "
                f"{each:.0f} kB a stream",
                highlight=False,
            )


def open_streams(server: GatewayProcess, count: int) -> StreamsResult:
    """Opens `count` streams of an image with one partial image each, all at once, and reads them to their end."""
    return asyncio.run(_open_streams(server, count))


async def _open_streams(server: GatewayProcess, count: int) -> StreamsResult:
    await _stream(server, 0)  # the first request of a gateway is slower
    idle = resident_megabytes(server.pid)
    most_open, most_mb = 0, idle
    began = time.monotonic()
    streams = asyncio.gather(*(_stream(server, index) for index in range(count)), return_exceptions=True)
    while not streams.done():
        await asyncio.wait([streams], timeout=WATCH_SECONDS)
        now_open = await asyncio.to_thread(server.metric, "latte_flow_gateway_open_requests")
        most_open = max(most_open, int(now_open) - 1)  # the one that asks for metrics is open too
        if idle is not None:
            most_mb = max(most_mb or 0, resident_megabytes(server.pid) or 0)
    seconds = time.monotonic() - began
    ends = streams.result()
    firsts = [end for end in ends if isinstance(end, float)]
    p50, p95, longest = np.percentile(firsts or [0.0], [50, 95, 100])
    return StreamsResult(
        count,
        count - len(firsts),
        sorted({str(end) or type(end).__name__ for end in ends if isinstance(end, BaseException)}),
        most_open,
        {"p50": float(p50), "p95": float(p95), "longest": float(longest)},
        seconds,
        idle,
        most_mb,
    )


async def _stream(server: GatewayProcess, index: int) -> float:
    """Reads one stream to its end.

    Returns:
        Seconds until the first event.

    Raises:
        ConnectionError: the stream was refused, or ended without its image.
        TimeoutError: it was silent for too long.
    """
    body = json.dumps(BODY | {"prompt": f"a red star {index % 7}", "seed": index}).encode()
    # HTTP/1.0, so that events come as they are, and not in chunks.
    head = (
        f"POST /v1/images/generations HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    began, first, last = time.monotonic(), 0.0, ""
    reader, writer = await asyncio.open_connection(server.host, server.port, limit=LONGEST_EVENT)
    try:
        writer.write(head.encode() + body)
        status = await _line(reader)
        if b" 200 " not in status:
            raise ConnectionError(f"answered with {status.decode(errors='replace').strip()}")
        while line := await _line(reader):
            if line.startswith(b"event: "):
                first = first or time.monotonic() - began
                last = line.removeprefix(b"event: ").decode().strip()
    finally:
        writer.close()
    if last != "image_generation.completed":
        raise ConnectionError(f"ended after {last or 'no event'}")
    return first


async def _line(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(QUIET_SECONDS):
        return await reader.readline()
